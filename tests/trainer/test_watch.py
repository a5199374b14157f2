"""What the trainer notices (bad steps, spikes, SIGTERM), and what it keeps, checks and refuses to load."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from dataprep.storage import UserError
from mixer.reader import ShardLog
from mixer.shards import beat
from tests.trainer.training import CONFIG, STAGES, records, weights, whole, without_speed
from trainer import checkpoint, cost, loop, metrics, signals
from trainer.config import ModelConfig, TrainConfig
from trainer.data import pack
from trainer.loop import train
from trainer.metrics import Metrics
from trainer.untrusted import Planner, Unpickler


def poison(parameter):
    parameter.grad.fill_(float("nan"))


def spoil(monkeypatch, bad_step):
    """Make the gradient of one step not finite: every pass of it comes back through here."""
    real = loop.step

    def step(run, *arguments):
        hook = None
        if run.progress.step + 1 == bad_step:
            hook = run.model.norm.weight.register_post_accumulate_grad_hook(poison)
        out = real(run, *arguments)
        if hook:
            hook.remove()
        return out

    monkeypatch.setattr(loop, "step", step)


def test_a_step_that_is_not_finite_changes_nothing_and_is_told(root, monkeypatch, capfd):
    spoil(monkeypatch, 3)
    config = CONFIG.model_copy(update={"checkpoint_steps": 1, "keep": 20, "evaluate_tokens": 0, "export": False})
    done = train(config, str(root), ["base"])["stages"]["base"]
    rows = records(root, "base")
    assert [r["loss"] is None for r in rows] == [i == 2 for i in range(len(rows))] and done["last_loss"] < 5
    (directory,) = root.glob("train-*/base")
    (event,) = metrics.read(directory / "events.jsonl")
    log = ShardLog(str(root / "pack-base"))
    batch = log.read(20, 30)
    assert (event["event"], event["step"]) == ("skipped", 3)
    assert [d["doc"] for d in event["documents"]] == batch.segments["doc"].tolist()
    assert "step 3: skipped" in capfd.readouterr().out
    assert json.loads((directory / "step-00000004" / "checkpoint.json").read_text())["skipped"] == 1
    same = [checkpoint_weights(config, directory / f"step-0000000{i}") for i in (2, 3, 4)]
    assert all(torch.equal(a, b) for a, b in zip(same[0], same[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(same[1], same[2], strict=True))


def checkpoint_weights(config, path):
    from tests.trainer.shards import VOCABULARY
    from trainer.parallel import build_model, build_optimizer, world

    with world(config) as ranks:
        model = build_model(config, VOCABULARY, 1e4, ranks)
        checkpoint.load(path, model, build_optimizer(config, model))
        return [whole(p).clone() for p in model.parameters()]


def test_spikes_are_logged_with_their_documents(packed, tmp_path, capsys):
    log = ShardLog(str(packed / "pack-base"))
    plain = {"stage": "base", "tokens": 0, "stage_tokens": 0, "gradient": 1.0, "lr": 0.1, "tokens_per_second": 1.0}
    plain |= {"mfu": None, "memory_gb": 1.0, "wait_seconds": 0.0, "seconds": 1.0}
    board = Metrics(tmp_path / "m", log, 0, spike=6.0)
    losses = [3.0 + 0.01 * (i % 3) for i in range(40)] + [9.0] + [3.0] * 3
    for i, loss in enumerate(losses):
        board.log(plain | {"step": i + 1, "loss": loss}, i, i + 1)
    board.close()
    (event,) = metrics.read(tmp_path / "m" / "events.jsonl")
    assert (event["event"], event["step"], event["loss"]) == ("spike", 41, 9.0)
    assert event["mean"] == pytest.approx(3.01, abs=0.01)
    assert [d["doc"] for d in event["documents"]] == log.read(40, 41).segments["doc"].tolist()
    scalars = EventAccumulator(str(tmp_path / "m" / "tensorboard")).Reload().Scalars("loss")
    assert [(s.step, s.value) for s in scalars] == [(i + 1, pytest.approx(loss)) for i, loss in enumerate(losses)]
    Metrics(tmp_path / "m", log, 40, spike=6.0).close()  # resumed before it
    assert metrics.read(tmp_path / "m" / "events.jsonl") == [] and len(metrics.read(tmp_path / "m/metrics.jsonl")) == 40


def test_losses_by_group(packed):
    log = ShardLog(str(packed / "pack-base"))
    batch = log.read(0, 4)
    batch.segments["copy"] = np.arange(len(batch.segments)) % 11
    packed_batch = pack(batch, 16)
    nll = torch.arange(batch.tokens.size).double() * (packed_batch.target_T >= 0)
    routing = SimpleNamespace(load_E=torch.ones(4, 4), entropy=torch.ones(4))
    tally = metrics.Tally(CONFIG.model, log.stage, torch.device("cpu"))
    tally.add(packed_batch, SimpleNamespace(loss_sum=nll.sum(), nll_T=nll, routing=routing), torch.ones(()))
    means = tally.means(100)
    by_copy: dict[str, list[float]] = {}
    for s in batch.segments:
        first = s["sequence"] * 48 + s["start"]
        copy = str(s["copy"] + 1) if s["copy"] < 7 else "8+"
        by_copy.setdefault(copy, []).extend(range(first, first + s["length"] - 1))
    assert means["copies"] == pytest.approx({copy: np.mean(values) for copy, values in by_copy.items()})
    every = np.mean([v for values in by_copy.values() for v in values])
    assert means["tiers"] == pytest.approx({"high": every}) and set(means["sources"]) == {"web", "books"}


def test_milestones_are_kept(root):
    config = CONFIG.model_copy(update={"checkpoint_steps": 2, "keep": 1, "keep_every": 6, "evaluate_tokens": 0})
    done = train(config, str(root), ["base"])["stages"]["base"]
    (directory,) = root.glob("train-*/base")
    steps = [int(c.name[5:]) for c in checkpoint.checkpoints(directory)]
    assert steps == [*range(6, done["steps"], 6), done["steps"]]


def test_one_bit_is_noticed(trained, tmp_path):
    path = checkpoint.checkpoints(Path(trained[1]["directory"]) / "base")[-1]
    file = next(path.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    try:
        file.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :])
        with pytest.raises(checkpoint.Damaged):
            weights(trained[0], "base")
    finally:
        file.write_bytes(data)
    weights(trained[0], "base")


class Pickled:
    """Is pickled as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    "call", [(os.system, "1"), (eval, "1"), (subprocess.Popen, "1"), (getattr, torch.Size, "count"), (torch.load, "1")]
)
def test_a_checkpoint_runs_nothing(call):
    with pytest.raises(pickle.UnpicklingError, match="nothing that checkpoint"):
        Unpickler(io.BytesIO(pickle.dumps(Pickled(*call)))).load()
    torch.save(Pickled(*call), number := io.BytesIO())
    number.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        Planner().load_bytes(None, number)


def test_metadata_of_a_python_that_writes_enums_by_name():
    call = getattr, _MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT"
    assert Unpickler(io.BytesIO(pickle.dumps(Pickled(*call)))).load() is _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT


def sigterm_when(condition, process=None):
    def send():
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process or os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_sigterm_saves_and_what_follows_is_the_same(trained, root):
    sender = sigterm_when(lambda: list(root.glob("train-*/base/step-00000004")))
    with pytest.raises(signals.Stopped, match=r"saved .*/base/step-"):
        train(CONFIG, str(root), STAGES)
    sender.join()
    (directory,) = root.glob("train-*")
    assert not (directory / "base" / loop.DONE).exists()
    train(CONFIG, str(root), STAGES)
    for stage in STAGES:
        assert without_speed(records(root, stage)) == without_speed(records(trained[0], stage))


def start_process(root):
    """The trainer on stage "base" as torchrun would start it."""
    config = root / "config.yaml"
    config.write_text(
        json.dumps({"root": str(root), "mix": {"stages": [{"name": "base"}]}, "train": CONFIG.model_dump(mode="json")})
    )
    command = [sys.executable, "-m", "trainer", str(config), "--stage", "base"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def lines(root):
    return [line for path in root.glob("train-*/base/metrics.jsonl") for line in path.read_text().splitlines()]


def test_sigterm_while_waiting_for_the_packer(root):
    base = root / "pack-base"
    for path in [*base.glob("00001*"), base / "end.json"]:
        path.unlink()
    beat(str(base))
    process = start_process(root)
    there = ShardLog(str(base)).wait(1) // 10  # whole steps
    sigterm_when(lambda: len(lines(root)) >= there, process.pid).join()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped by SIGTERM and saved" in out
    (saved,) = root.glob(f"train-*/base/step-{there:08d}")
    assert saved.is_dir()


def test_killed_at_any_step_the_losses_are_the_same_bits(trained, root):
    """kill -9, which may be in the middle of a checkpoint that is being written; the second time, after resuming."""
    for steps in (5, 9):
        process = start_process(root)
        deadline = time.monotonic() + 60
        while len(lines(root)) < steps and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert len(lines(root)) >= steps and not list(root.glob("train-*/base/done.json"))
    train(CONFIG, str(root), ["base"])
    assert without_speed(records(root, "base")) == without_speed(records(trained[0], "base"))


def test_flops_are_those_of_a_count_by_hand():
    m = ModelConfig(hidden=32, heads=2, kv_heads=1, head_dim=16, rotary_dim=8, ffn=24, layers=4, softmax_every=4)
    per_layer = 2 * 3 * 32 * 24 + 4 * 32  # experts and router
    lightning, softmax = 5 * 32 * 32, 32 * (32 + 16 + 16 + 32)
    matrices = 4 * per_layer + 3 * lightning + softmax + 61 * 32
    state = 3 * 3 * 2 * 2 * 2 * 16 * 16  # forward and backward (3), layers, heads, in and out, multiply and add
    attention = 3 * 2 * 2 * 32 / 2  # scores and values, half of them causal
    assert cost.step_flops(m, 61, 100, 5000) == (6 * matrices + state) * 100 + attention * 5000


def test_not_enough_memory(root, monkeypatch):
    needed = cost.memory_needed(TrainConfig(), 1 << 16, 4096, 10**12, 8)
    assert needed["state"] == 16 * 10**12 / 8 / 1e9
    with pytest.raises(UserError, match=r"not enough memory: .* 2,000.0 GB per worker, the device has"):
        cost.check_memory(needed, torch.device("cpu"))

    def refuse(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(loop, "step", refuse)
    with pytest.raises(UserError, match="not enough memory for a step; lower"):
        train(CONFIG, str(root), ["base"])


def test_experts_of_other_ranks_are_not_gathered():
    def gathered(**mesh):
        return cost.memory_needed(TrainConfig(parallel=mesh), 1000, 4096, 10**9, 8)["gathered"]

    m = TrainConfig().model
    layer = 3 * m.experts * m.ffn * m.hidden * 4 / 1e9
    assert gathered() - gathered(ep=2, etp=2) == pytest.approx(2 * layer * 3 / 4)


def test_a_schedule_longer_than_its_stage(root):
    phases = TrainConfig(schedule=[{"tokens": 10**9, "lr": 1e-3}]).schedule
    with pytest.raises(UserError, match="the phases last 1,000,000,000 tokens, but the stage has"):
        train(CONFIG.model_copy(update={"schedule": phases}), str(root), ["base"])


def test_batches_grow_at_their_marks(root):
    config = CONFIG.model_copy(
        update={"batch_tokens": 100, "batch_marks": {1000: 480, 3000: 960}, "evaluate_tokens": 0}
    )
    train(config, str(root), ["base"])
    rows = records(root, "base")
    before = 0  # sequences x context
    for row in rows[:-1]:
        assert row["sequences"] == (3 if before < 1000 else 10 if before < 3000 else 20)
        before += row["sequences"] * 48


def test_check_tells_what_would_be(call):
    """Nothing is trained; marks count from the run's beginning, so that of the first stage's end is in the second."""
    tokens = 6000  # of stage base, or a little more
    train = CONFIG.model_dump(mode="json") | {"batch_marks": {tokens + 1000: 960}}
    said = {stage: call("--stage", stage, "--check", train=train)[1].out for stage in STAGES}
    for stage, parts in {
        "base": [
            "batch: 10 sequences (480 tokens) from 0",
            "learning rate: cosine to 0.0005 at 6,0",
            "; about 13 steps",
        ],
        "longer": ["batch: 5 sequences (480 tokens) from 0", "batch: 10 sequences (960 tokens) from 9", "steps"],
    }.items():
        for part in (*parts, "M parameters", "memory: about", f"/{stage}"):
            assert part in said[stage], part
    code, said = call("--stage", "base", "--check", train=train | {"parallel": {"dp_replicate": 4}})
    assert code == 1 and "dp_replicate 4 x dp_shard 0 x cp 1 is 0, but there are 1 processes" in said.err
