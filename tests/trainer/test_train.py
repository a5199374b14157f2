"""Training as a whole: against a plain loop, interrupted and resumed, on two processes, stage after stage."""

import json
import shutil
import threading
import time
from pathlib import Path

import fsspec
import pytest
import torch
from torch.nn import functional as F

from dataprep.storage import UserError, read_json
from mixer.reader import ShardLog
from mixer.shards import beat
from tests.trainer.ranks import run
from tests.trainer.shards import VOCABULARY, write_stage
from tests.trainer.training import CONFIG, MODEL, STAGES, records, repack, weights, whole, without_speed
from trainer import __main__, checkpoint, loop
from trainer.attention import Layout
from trainer.config import ParallelConfig
from trainer.loop import train
from trainer.model import Decoder, initialise
from trainer.parallel import build_model, build_optimizer, world
from trainer.schedule import learning_rate
from trainer.stages import open_log


def plain_loop(root, stage, model, optimizer):
    """The same training, written as one would without any of the trainer but the model."""
    log = open_log(CONFIG, str(root), stage)
    info = log.stage
    model.rope_base = info.rope_base
    per_step = 480 // info.context
    seen, losses = 0, []
    for first in range(0, total := log.wait(1 << 40), per_step):
        batch = log.read(first, min(total, first + per_step))
        terms, targets = [], 0
        rows = range(len(batch.tokens))  # counts and probabilities by row: each is a routing group
        counts, probs, tokens = [0 for _ in rows], [0 for _ in rows], [0 for _ in rows]
        for s in batch.segments:  # every document alone
            row = batch.tokens[s["sequence"]].astype("int64")
            token = torch.from_numpy(row[s["start"] : s["start"] + s["length"]])
            out = model(token, Layout.of([0, len(token)], MODEL.block))
            terms.append(F.cross_entropy(out.logits_TV[:-1], token[1:], reduction="sum"))
            targets += len(token) - 1
            seen += len(token)
            counts[s["sequence"]] += out.routing.count_GE
            probs[s["sequence"]] += out.routing.prob_GE
            tokens[s["sequence"]] += len(token)
        nll = sum(terms) / targets
        balance = 0
        for count, prob, n in zip(counts, probs, tokens, strict=True):
            balance += n / sum(tokens) * MODEL.experts * (count / count.sum(2, keepdim=True) * prob / n).sum()
        (nll + MODEL.aux_loss * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(CONFIG.schedule, seen, info.tokens)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(nll.item())
    return losses


def test_losses_are_those_of_a_plain_loop(trained):
    root, _ = trained
    model = Decoder(MODEL, VOCABULARY, 1e4).double()
    initialise(model, 0)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    for stage in STAGES:
        expected = plain_loop(root, stage, model, optimizer)
        assert [r["loss"] for r in records(root, stage)] == pytest.approx(expected, rel=1e-9)
    for name, value in weights(root, "longer").items():
        assert (model.get_parameter(name) - value).norm() <= 1e-7 * value.norm(), name


def test_it_learns_and_says_so(trained):
    _, result = trained
    base, longer = (result["stages"][s] for s in STAGES)
    assert base["last_loss"] < base["first_loss"] - 0.7
    assert longer["held_out_loss"] < base["held_out_loss"] < 4.0
    assert longer["tokens"] == base["tokens"] + longer["stage_tokens"]
    assert longer["steps"] == base["steps"] + longer["stage_steps"]


def test_loss_by_source_makes_up_the_loss(trained):
    for record in records(trained[0], "base"):
        low, high = sorted(record["sources"].values())
        assert low <= record["loss"] <= high


@pytest.mark.parametrize("interrupted_at", [3, 10, 16])
def test_resume_is_exact(trained, root, interrupted_at, monkeypatch):
    whole = trained[0]
    real_step, calls = loop.step, []

    def step(*arguments):
        if len(calls) == interrupted_at:
            raise KeyboardInterrupt
        calls.append(1)
        return real_step(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "step", step)
        train(CONFIG, str(root), STAGES)
    train(CONFIG, str(root), STAGES)
    for stage in STAGES:
        assert without_speed(records(root, stage)) == without_speed(records(whole, stage))
    mine, theirs = weights(root, "longer"), weights(whole, "longer")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_two_processes_train_the_same(trained, packed, tmp_path, monkeypatch):
    """With the experts shared out; also a checkpoint of one process resumed so. At context 96 a step's last pass leaves
    a rank idle."""
    whole = trained[0]
    config = CONFIG.model_copy(update={"micro_tokens": 96, "export": False, "parallel": ParallelConfig(ep=2)})
    roots = {name: shutil.copytree(packed, tmp_path / name) for name in ("two", "resumed")}
    real_step = loop.step

    def step(run, *arguments):
        if run.progress.step == 6:
            raise KeyboardInterrupt
        return real_step(run, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "step", step)
        train(CONFIG, str(roots["resumed"]), STAGES)
    run(2, config, list(roots.values()))
    for root in roots.values():
        for stage in STAGES:
            for mine, theirs in zip(records(root, stage), records(whole, stage), strict=True):
                assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
                assert mine["gradient"] == pytest.approx(theirs["gradient"], rel=1e-7)
                assert mine["sources"] == pytest.approx(theirs["sources"], rel=1e-9)
                assert mine["balance"] == pytest.approx(theirs["balance"], rel=1e-9)


def test_a_stage_begins_where_the_last_one_ended(trained, root):
    _, result = trained
    previous = Path(result["directory"]) / "base" / result["stages"]["base"]["checkpoint"]
    with world(CONFIG) as ranks:
        run = loop.begin(CONFIG, str(root), "longer", root / "nothing", previous, ranks)
        model = build_model(CONFIG, VOCABULARY, 1e4, ranks)
        models, optimizers = (run.model, model), (run.optimizer, build_optimizer(CONFIG, model))
        checkpoint.load(previous, models[1], optimizers[1])
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(whole(a), whole(b))
            for moment in ("exp_avg", "exp_avg_sq"):
                x, y = (whole(o.state[p][moment]) for o, p in zip(optimizers, (a, b), strict=True))
                assert torch.equal(x, y) and x.abs().sum() > 0
            assert optimizers[0].state[a]["step"] == result["stages"]["base"]["steps"]
    assert (run.progress.stage, run.progress.sequence, run.progress.stage_tokens) == ("longer", 0, 0)
    assert run.progress.tokens == result["stages"]["base"]["tokens"]


def test_finished_stages_are_skipped(trained, monkeypatch):
    monkeypatch.setattr(loop, "build_model", None)
    root, result = trained
    assert train(CONFIG, str(root), STAGES) == result
    assert read_json(str(root / "latest" / "train.json")) == {"directory": Path(result["directory"]).name}


def test_only_the_newest_checkpoints_are_kept(trained):
    for stage, done in trained[1]["stages"].items():
        names = [p.name for p in checkpoint.checkpoints(Path(trained[1]["directory"]) / stage)]
        assert len(names) <= CONFIG.keep and names[-1] == done["checkpoint"]


def test_training_follows_the_packer(trained, root):
    """The time it waits for the second shard is told."""
    base, away = root / "pack-base", root / "away"
    away.mkdir()
    late = [*base.glob("00001*"), base / "end.json"]
    for path in late:
        path.rename(away / path.name)
    beat(str(base))
    there = ShardLog(str(base)).wait(1) // 10  # whole steps

    def finish():
        deadline = time.monotonic() + 60
        while not (list(root.glob("train-*")) and len(records(root, "base")) == there) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        for path in late:
            (away / path.name).rename(path)

    packer = threading.Thread(target=finish)
    packer.start()
    train(CONFIG, str(root), ["base"])
    packer.join()
    assert records(root, "base")[there]["wait_seconds"] > 0.2
    assert without_speed(records(root, "base")) == without_speed(records(trained[0], "base"))


def test_a_loss_that_is_not_finite_stops_the_run(root, monkeypatch):
    monkeypatch.setattr(loop, "learning_rate", lambda *_: 1e200)
    with pytest.raises(UserError, match=r"step \d+: loss .* lower train.schedule"):
        train(CONFIG, str(root), ["base"])


def test_another_tokenizer_is_refused(trained, root):
    previous = Path(trained[1]["directory"]) / "base" / trained[1]["stages"]["base"]["checkpoint"]
    repack(root, "longer", tokenizer="other")
    message = "trained with tokenizer t, but stage longer was packed with other"
    with world(CONFIG) as ranks, pytest.raises(UserError, match=message):
        loop.begin(CONFIG, str(root), "longer", root / "x", previous, ranks)


def test_command_line(root, call):
    code, said = call("--stage", "base", "--check")
    assert code == 0 and "context 48" in said.out and not list(root.glob("train-*"))
    code, said = call("--stage", "longer")
    assert code == 1 and "stage longer starts from stage base; train that first" in said.err
    code, said = call("--stage", "typo")
    assert code == 1 and "it has base, longer" in said.err
    assert call("--stage", "base")[0] == 0
    code, said = call("--stage", "longer")
    assert code == 0 and len(records(root, "longer")) > 3


def test_misspelt_names_are_not_passed_over(root, call, tmp_path, monkeypatch, capsys):
    code, said = call("--stage", "base", train={"stages": {"bsae": [{"lr": 1e-3}]}})
    assert code == 1 and said.err == "error: train.stages names bsae; the configuration has base, longer\n"
    path = tmp_path / "misspelt.yaml"
    path.write_text(json.dumps({"root": str(root), "mix": {"stages": [{"name": "base"}]}, "trian": {}}))
    monkeypatch.setattr("sys.argv", ["trainer", str(path), "--stage", "base"])
    with pytest.raises(SystemExit):
        __main__.main()
    assert "must be YAML with `root` and the sections `mix` and `train`" in capsys.readouterr().err


def test_an_older_configurations_shards_are_not_in_the_way(root, call):
    write_stage(root, "older", 0, 48, 500)
    repack(root, "older", plan="older")
    for mix in (None, {"preset": "any"}):
        code, said = call("--stage", "longer", mix=mix)
        assert code == 1 and "stage longer starts from stage base" in said.err
        assert call("--stage", "base", "--check", mix=mix)[0] == 0
    repack(root, "longer", plan="older")
    code, said = call("--stage", "longer")
    assert code == 1 and "stage longer was packed for another plan than stage base; run jobs/mix.py" in said.err


def test_shards_from_elsewhere(trained, root, tmp_path):
    """An object store's shards, kept on disk; checkpoints at home."""
    memory = fsspec.filesystem("memory")
    memory.put(str(root), "/elsewhere", recursive=True)
    shutil.rmtree(root)
    try:
        config = CONFIG.model_copy(update={"shards": "memory://elsewhere"})
        train(config, str(root), ["base"])
        assert without_speed(records(root, "base")) == without_speed(records(trained[0], "base"))
        assert len(list((root / "shard-cache").glob("*.arrow"))) == 4  # two stages' two shards
    finally:
        memory.rm("/elsewhere", recursive=True)


def test_another_plans_held_out_shards_are_refused(root):
    repack(root, "held-out", plan="older")
    with pytest.raises(UserError, match="stage held-out was packed for another plan than stage base"):
        train(CONFIG, str(root), ["base"])


def test_a_context_that_the_shards_do_not_have(call):
    stages = [{"name": "base", "context": 48}, {"name": "longer", "context": 192}]
    assert call("--stage", "base", "--check", mix={"stages": stages})[0] == 0
    code, said = call("--stage", "longer", mix={"stages": stages})
    assert code == 1 and said.err == (
        "error: stage longer was packed at context 96, but mix.stages says 192; run jobs/mix.py\n"
    )


def test_roots(root, call, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    expected = call("--stage", "base", "--check")[1].out
    for spelling in ("~/root", f"file://{root}", f"{root}/"):
        assert call("--stage", "base", "--check", "--root", spelling)[1].out == expected
    code, said = call("--stage", "base", "--root", "s3://bucket/root")
    assert code == 1 and said.err.startswith("error: root is s3://bucket/root: checkpoints need a file system")
    with pytest.raises(UserError, match="root is s3://bucket: "):
        train(CONFIG, "s3://bucket", STAGES)
