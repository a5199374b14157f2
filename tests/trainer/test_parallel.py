"""Every mesh computes what one process computes: loss, every parameter's gradient, their norm, the initial weights."""

import functools

import pytest
import torch

from dataprep.storage import UserError
from tests.trainer import meshes
from tests.trainer.meshes import CASES, CONTEXT, ROUTINGS, config, step
from tests.trainer.ranks import spawn
from trainer.data import micro_batches
from trainer.parallel import build_model, fsdp_ranks, world


@functools.cache
def alone(routing, micro_tokens=7 * CONTEXT):
    return step(config(routing, micro_tokens))


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What the processes of one world size found, by case; what the global router drops; states that were saved, and
    where. One start for all."""

    @functools.cache
    def of(size):
        path = tmp_path_factory.mktemp("meshes") / f"{size}.pt"
        spawn(size, meshes.__name__, str(path))
        found, drops, states = torch.load(path)
        return {case: meshes.Result(**values) for case, values in found.items()}, drops, states, path.with_suffix("")

    return of


def close(found, expected, bound):
    assert found.loss == pytest.approx(expected.loss, rel=bound)
    assert found.norm == pytest.approx(expected.norm, rel=bound)
    assert torch.equal(found.load_LE, expected.load_LE)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert gradient.norm() > 0
        assert (found.gradients[name] - gradient).norm() <= bound * gradient.norm(), name


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("size", "case"), [(size, case) for size, cases in CASES.items() for case in cases])
def test_a_mesh_computes_what_one_process_computes(together, size, case, routing):
    found, expected = together(size)[0][case, routing], alone(routing)
    close(found, expected, 1e-4 if "float32" in case else 1e-9)
    for name, weight in expected.initial.items():
        assert torch.equal(found.initial[name], weight.to(found.initial[name].dtype)), name


@pytest.mark.parametrize("routing", ROUTINGS)
def test_so_does_accumulation(routing):
    assert alone("capacity").load_LE.sum() < alone("dropless").load_LE.sum()
    close(alone(routing, 2 * CONTEXT), alone(routing), 1e-9)


@pytest.mark.parametrize("size", CASES)
def test_experts_without_a_token(together, size):
    """Two tokens: of four ranks with one expert each, some are sent no row."""
    found, expected = together(size)[0]["two tokens", "dropless"], step(config("dropless"), [[2]])
    assert found.loss == pytest.approx(expected.loss, rel=1e-9)
    assert torch.equal(found.load_LE, expected.load_LE) and (found.load_LE == 0).any()
    for name, gradient in expected.gradients.items():
        assert (found.gradients[name] - gradient).norm() <= 1e-9 * gradient.norm(), name


@pytest.mark.parametrize("size", CASES)
def test_what_a_mesh_saves_others_read(together, size):
    """The first mesh writes, the others and one process read."""
    *_, (written, *read), directory = together(size)
    name = "layers.0.mlp.experts.down_proj"
    assert not torch.equal(written[f"{name} weight"], alone("dropless").initial[name])
    for found in [*read, meshes.saved(config("dropless"), directory)]:
        assert found.keys() == written.keys()
        assert all(torch.equal(found[name], written[name]) for name in written)


def test_compiled_layers_break_only_where_experts_exchange(together):
    """One graph per layer under FSDP; under expert parallelism one break, which makes two graphs of one."""
    dense, exchanging = (together(2)[0][case, "dropless"] for case in ("dp2 compiled", "ep2 compiled"))
    assert dense.breaks == 0 and 2 <= dense.graphs <= 4  # two layers; one graph more for batches of another length
    assert exchanging.breaks >= 2 and 2 * exchanging.breaks <= exchanging.graphs + 1


def test_half_precision_is_near_and_its_router_in_float32():
    found = step(config("dropless", dtype="bfloat16", checkpointing="selective"))
    expected = alone("dropless")
    assert found.loss == pytest.approx(expected.loss, rel=0.01)
    for name, gradient in expected.gradients.items():
        assert found.gradients[name].dtype == torch.float32
        assert (found.gradients[name] - gradient).norm() <= 0.5 * gradient.norm(), name
    with world(config("dropless", dtype="bfloat16")) as ranks:
        model = build_model(config("dropless", dtype="bfloat16"), 50, 1e4, ranks)
        model.layers[0].unshard()
        model.layers[0].mlp.gate.unshard()
        assert model.layers[0].mlp.gate.weight.dtype == torch.float32
        assert model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16


def test_a_context_that_ranks_cannot_share_is_refused():
    with world(config("dropless")) as ranks, pytest.raises(UserError, match="cp is 5; it must divide the stage's con"):
        next(micro_batches(meshes.Log(), 0, 1, config("dropless", cp=5), ranks))


@pytest.mark.parametrize("size", CASES)
def test_the_global_router_drops_no_more_than_each_rank_alone(together, size):
    drops = together(size)[1]
    assert drops["again"] == drops["etp"] == drops[True]
    assert all(a <= b for a, b in zip(drops[True], drops[False], strict=True))
    assert sum(drops[True]) < sum(drops[False])


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"cp": 2}, r"dp_replicate 1 x dp_shard 0 x cp 2 is 0, but there are 1 processes"),
        ({"dp_shard": 4}, r"dp_shard 4 x cp 1 is 4, but there are 1 processes"),
        ({"ep": 3}, r"train.parallel: ep is 3; it must divide train.model.experts, which is 4"),
        ({"etp": 5}, r"train.parallel: etp is 5; it must divide train.model.ffn, which is 24"),
        ({"ep": 2, "etp": 2}, r"train.parallel: ep x etp is 4; it must divide dp_shard x cp, which is 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, message):
    with pytest.raises(UserError, match=message), world(config("dropless", **mesh)):
        pass


def test_so_is_one_whose_rest_does_not_divide_the_hidden_size():
    assert fsdp_ranks(config("dropless"), 6) == 6
    said = r"dp_shard x cp / .ep x etp. is 3; it must divide train.model.hidden, which is 32"
    with pytest.raises(UserError, match=said):
        fsdp_ranks(config("dropless", etp=2), 6)
