"""The quality benchmark on small inputs whose answers are known."""

import json
import sys

from benchmarks import quality
from tests.corpora import write
from tests.dataprep.test_signals import SENTENCES


def test_figures_of_a_small_corpus(tmp_path, monkeypatch):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/multi_hplt_quality_labelled.tsv").write_text("id\tlang\nhplt/rus_Cyrl/0\trus_Cyrl\t0\t0\t1\n")
    rows = {
        "en_tales": {f"en_tales/{k}": SENTENCES["en"] * (k + 2) for k in range(3)},
        "multi_gnome_help": {
            "gnome/C/a": SENTENCES["en"] * 2,
            "gnome/de/a": SENTENCES["de"] * 2,
            "gnome/fr/a": SENTENCES["en"] * 2,  # not translated
            "gnome/ko/b": SENTENCES["ko"] * 2,
        },
        "multi_hplt_quality_labelled": {"hplt/rus_Cyrl/0": SENTENCES["ru"], "hplt/rus_Cyrl/1": SENTENCES["en"]},
    }
    for name, documents in rows.items():
        write(tmp_path, name, ({"id": i, "text": text} for i, text in documents.items()))
    monkeypatch.setattr(quality, "PEERS", {"pycld2": quality.cld2})
    monkeypatch.delitem(quality.SECTIONS, "classifier")  # tests/benchmarks/test_classifier_benchmark.py
    arguments = ["x", "--corpus", str(tmp_path), "--json", str(tmp_path / "figures.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    quality.main()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["language_accuracy"] == 1 and figures["signals_mb_s_core"] > 0 and figures["language_mb_s_core"] > 0
    found = [(kind, code) for kind, code, _ in quality.labelled(tmp_path, 10, 1)]
    assert sorted(found) == sorted(
        [("one language", "en")] * 3
        + [("multi_gnome_help", code) for code in ("en", "de", "ko")]
        + [("multi_hplt_quality_labelled", "ru")]
    )
