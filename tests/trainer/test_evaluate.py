"""Evaluation: documents put together again, bits per byte and losses by position by hand, probes and exact match."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mixer.reader import ShardLog
from tests.trainer.shards import VOCABULARY, documents, write_stage
from tests.trainer.training import CONFIG, MODEL
from trainer import probes
from trainer.attention import Layout
from trainer.evaluate import evaluate
from trainer.loop import evaluate_newest
from trainer.model import Decoder, Output, initialise
from trainer.parallel import world
from trainer.probes import Item, Rows, held_out
from trainer.vocabulary import Vocabulary, load


class Letters:
    """A vocabulary for tests: a character is the token of its code, modulo the vocabulary's size."""

    token_bytes = np.arange(VOCABULARY) % 5

    def encode(self, text):
        return np.array([1 + ord(c) % (VOCABULARY - 1) for c in text], np.int64)


@pytest.fixture
def log(tmp_path):
    write_stage(tmp_path, "held-out", 99, 48, 2000)
    return ShardLog(str(tmp_path / "pack-held-out"))


def test_held_out_documents_are_whole_again(log):
    originals = [d.tolist() for d in documents(99, 2000, longest=36)]
    items = held_out(log, log.wait(1 << 60), 1 << 60, context=1000)
    assert sorted(item.tokens.tolist() for item in items) == sorted(originals)
    some = held_out(log, log.wait(1 << 60), 500, context=1000)
    assert [i.tokens.tolist() for i in some] == [i.tokens.tolist() for i in items[: len(some)]]
    assert 500 <= sum(len(i.tokens) for i in some) < 540
    cut = held_out(log, log.wait(1 << 60), 500, context=7)
    assert np.array_equal(np.concatenate([i.tokens for i in cut]), np.concatenate([i.tokens for i in some]))
    assert max(len(i.tokens) for i in cut) == 7


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30))
@settings(max_examples=30)
def test_rows_hold_every_item_once(tmp_path_factory, lengths):
    root = tmp_path_factory.mktemp("rows")
    write_stage(root, "held-out", 99, 48, 100)
    stage = ShardLog(str(root / "pack-held-out")).stage
    items = [Item(np.full(n, i % 50 + 1)) for i, n in enumerate(lengths)]
    rows = Rows(items, 20, stage)
    batch = rows.read(0, len(rows.tokens))
    found = {int(s["doc"]): batch.tokens[s["sequence"], s["start"] : s["start"] + s["length"]] for s in batch.segments}
    assert {i: t.tolist() for i, t in found.items()} == {i: item.tokens.tolist() for i, item in enumerate(items)}
    parts = [rows.read(r, r + 1) for r in range(len(rows.tokens))]
    assert sum(len(p.segments) for p in parts) == len(items)
    assert all((p.segments["sequence"] == 0).all() for p in parts)


def test_report_against_every_document_alone(log):
    decoder = Decoder(MODEL, VOCABULARY, 1e4).double()
    initialise(decoder, 0)
    with world(CONFIG) as ranks:
        report = evaluate(
            decoder, log, log.stage, Letters(), CONFIG.model_copy(update={"evaluate_tokens": 1500}), ranks
        )
    items = held_out(log, log.wait(1 << 60), 1500, log.stage.context)
    losses, positions, size = {"web": [], "books": []}, {}, 0
    for item in items:
        token = torch.from_numpy(item.tokens)
        nll = F.cross_entropy(
            decoder(token, Layout.of([0, len(token)], MODEL.block)).logits_TV[:-1], token[1:], reduction="none"
        )
        losses[item.about["source"]] += nll.tolist()
        for place, value in enumerate(nll.tolist()):
            positions.setdefault(int(np.log2(place + 1)), []).append(value)
        size += int(Letters.token_bytes[item.tokens[1:]].sum())
    together = [value for values in losses.values() for value in values]
    assert report["held_out"]["tokens"] == len(together) and report["held_out"]["bytes"] == size
    assert report["held_out"]["loss"] == pytest.approx(np.mean(together), rel=1e-9)
    assert report["held_out"]["bits_per_byte"] == pytest.approx(np.sum(together) / np.log(2) / size, rel=1e-9)
    for name, values in losses.items():
        assert report["sources"][name]["loss"] == pytest.approx(np.mean(values), rel=1e-9)
    assert report["classes"]["short"] | {"documents": len(items)} == report["held_out"]
    assert [p["loss"] for p in report["positions"]] == pytest.approx([np.mean(positions[k]) for k in sorted(positions)])
    assert [(p["from"], p["to"]) for p in report["positions"]][:3] == [(0, 1), (1, 3), (3, 7)]
    json.dumps(report)


class Oracle(torch.nn.Module):
    """A "model" that knows what follows, but in one sort of item."""

    def __init__(self, fails):
        super().__init__()
        self.fails = fails

    def forward(self, token_T, layout, target_T):
        hit_T = target_T >= 0
        if self.fails:
            last = torch.cat([layout.position_T[1:] == 0, torch.tensor([True])])
            hit_T = hit_T & ~torch.roll(last, -1)  # wrong at every document's last target
        return Output(torch.zeros(()), torch.zeros(len(token_T)), hit_T, None, None)


@pytest.mark.parametrize("fails", [False, True])
def test_exact_match_wants_every_token_of_the_answer(tmp_path, fails):
    write_stage(tmp_path, "held-out", 99, 48, 2000)
    write_stage(tmp_path, "longer", 1, 512, 3000)
    log, stage = (ShardLog(str(tmp_path / f"pack-{name}")) for name in ("held-out", "longer"))
    with world(CONFIG) as ranks:
        config = CONFIG.model_copy(update={"evaluate_needles": 2, "micro_tokens": 1024})
        report = evaluate(Oracle(fails), log, stage.stage, Letters(), config, ranks)
    grid = {(n, d) for n in (128, 256, 512) for d in probes.DEPTHS}
    assert {(c["length"], c["depth"]) for c in report["needle"]} == grid
    assert {c["length"] for c in report["recall"]} == {64, 128, 256, 512}
    cells = report["needle"] + report["recall"]
    assert all(c["samples"] == 2 and c["exact"] == (0.0 if fails else 1.0) for c in cells)


@given(st.integers(100, 400), st.sampled_from(probes.DEPTHS), st.integers(0, 50))
def test_needles_are_where_they_should_be(length, depth, sample):
    vocabulary = Letters()
    item = probes.needle(np.full(30, 60), vocabulary, length, depth, sample)
    assert len(item.tokens) == length
    answer = item.tokens[-item.answer :].tolist()
    inside = item.tokens[: length - item.answer].tolist()
    starts = [i for i in range(len(inside)) if inside[i : i + len(answer)] == answer]
    assert len(starts) >= 1  # the answer is in the text, once before the question
    if depth == 1.0:
        assert inside.count(60) <= length and inside[0] == 60


def test_without_documents(tmp_path):
    write_stage(tmp_path, "held-out", 99, 48, 600)
    log = ShardLog(str(tmp_path / "pack-held-out"))
    with world(CONFIG) as ranks:
        report = evaluate(Oracle(False), log, log.stage, None, CONFIG.model_copy(update={"evaluate_tokens": 0}), ranks)
    assert report["held_out"]["loss"] is report["held_out"]["bits_per_byte"] is None and report["needle"] == []


def test_on_demand(trained, call):
    root, result = trained
    done = result["stages"]["longer"]
    report = json.loads(next(root.glob("train-*/longer/evaluation.json")).read_text())
    assert (report["step"], report["held_out"]["loss"]) == (done["steps"], done["held_out_loss"])
    assert evaluate_newest(CONFIG, str(root), "longer") == report
    code, said = call("--stage", "base", "--evaluate")
    assert code == 1 and "there is no checkpoint of stage base" in said.err


def test_bytes_of_tokens_add_up_to_the_texts(tmp_path):
    """For a byte-level tokeniser trained here and a SentencePiece model trained here."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = ["The quick brown fox, naïve café; 東京 and Ελλάδα!", "one two  three\nfour"] * 20
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    )
    path = tmp_path / "latest" / "vocabulary.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"path": "tokenizer.json", "tokenizer": "t"}))
    (tmp_path / "tokenizer.json").write_text(bpe.to_str())
    vocabulary = load(str(tmp_path), "t", 300)
    for text in texts[:2]:
        assert vocabulary.token_bytes[vocabulary.encode(text)].sum() == len(text.encode())
    assert vocabulary.token_bytes[bpe.token_to_id("<|endoftext|>")] == 0
    assert load(str(tmp_path), "another", 300) is None

    (tmp_path / "t.txt").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "t.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=320, byte_fallback=True,
        model_type="bpe", minloglevel=2, add_dummy_prefix=False, normalization_rule_name="identity",
        remove_extra_whitespaces=False, character_coverage=0.98,
    )  # fmt: skip
    spm = Vocabulary((tmp_path / "sp.model").read_bytes(), True, 320)
    assert spm.token_bytes[spm.encode("naïve 東京 one")].sum() == len("naïve 東京 one".encode())
