"""Plans against compiled programs of eight devices: memory and what is exchanged."""

import itertools

import jax
import pytest
from helpers.grids import REPEATS
from helpers.plans import compiled, plan_of, planned_volumes, run_of, volumes

from stellarbyte_jax.config import MoEConfig
from stellarbyte_jax.inspect.ring_bytes import Ring
from stellarbyte_jax.ops.attention.blocks_xla import TILE
from stellarbyte_jax.training import placement

EXPERTS = MoEConfig(num_experts=8, num_experts_per_tok=2, intermediate_size=512)
UNROLLED = {"scan_unroll": None, "num_hidden_layers": 2}
CAPACITY = MoEConfig(num_experts=8, num_experts_per_tok=2, intermediate_size=512, dispatch="capacity")


@pytest.fixture(autouse=True)
def eight_devices(monkeypatch):
    monkeypatch.setattr(placement, "devices", jax.devices)


def temporary(run):
    """Bytes of a plan that a program makes anew: all but state and batch."""
    found = plan_of(run, packed=False).bytes
    return found.total - found.weights - found.optimizer - found.ema - found.carried - found.batch


@pytest.mark.parametrize(
    ("mesh", "remats"),
    [
        ({}, ("none", "dots", "full")),
        ({"fsdp": 8}, ("none", "dots")),
        ({"tensor": 8}, ("none", "full")),
        ({"data": 2, "context": 4}, ("none", "full")),
        ({"data": 2, "expert": 4, "moe": CAPACITY}, ("none", "full")),
    ],
    ids=str,
)
def test_activations_are_ordered_as_programs_are(mesh, remats):
    """Programs of the CPU hold more: they fuse less, and keep the scores of attention. At most four times as much."""
    mesh = dict(mesh)
    more = {"moe": mesh.pop("moe")} if "moe" in mesh else {}
    ours, theirs = [], []
    for remat in remats:
        run, program, _ = compiled(mesh, remat=remat, **more)
        ours.append(temporary(run))
        theirs.append(program.memory_analysis().temp_size_in_bytes)
    assert all(more > less for each in (ours, theirs) for more, less in itertools.pairwise(each))
    assert all(theirs[i] / 4 < ours[i] < 1.25 * theirs[i] for i in range(len(remats))), (ours, theirs)


def test_more_parts_hold_fewer_activations_and_gradients_twice():
    one, two = (plan_of(run_of({"data": 8}, parts=parts)).bytes for parts in (1, 2))
    assert (two.activations, two.gradients) == (one.activations // 2, 2 * one.gradients)
    programs = [compiled({"data": 8}, parts, remat="none")[1] for parts in (1, 2)]
    first, second = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert second > first / 2 + one.gradients / 2


@pytest.mark.parametrize(
    ("mesh", "remat"),
    [
        ({"data": 8}, "none"),
        ({"fsdp": 8}, "none"),
        ({"tensor": 8}, "none"),
        ({"tensor": 8}, "full"),
        ({"data": 2, "fsdp": 4}, "full"),
        ({"data": 2, "expert": 4}, "full"),
    ],
    ids=str,
)
def test_exchanges_are_those_of_the_program(mesh, remat):
    """The volumes of the collectives that XLA made."""
    more = {"moe": EXPERTS} if "expert" in mesh else {}
    run, program, _ = compiled(mesh, remat=remat, **more)
    theirs, ours = volumes(program.as_text()), planned_volumes(plan_of(run))
    for name in ("gathered", "summed"):
        assert ours[name] == pytest.approx(theirs[name], rel=0.01)


@pytest.mark.parametrize(
    ("mesh", "more"),
    [
        ({"fsdp": 8}, {"remat": "full"}),
        ({"data": 2, "fsdp": 4}, {"remat": "weights"}),
        ({"data": 2, "fsdp": 4}, {"tie_word_embeddings": True}),
    ],
    ids=str,
)
def test_bfloat16_travels_as_the_program_has_it(mesh, more):
    """Before the passes of the CPU, which widen it: table and matrices in two bytes, gradients of the head in four."""
    run, _, partitioned = compiled(mesh, compute_dtype="bfloat16", **UNROLLED, **more)
    theirs, ours = volumes(partitioned), planned_volumes(plan_of(run))
    for name in ("gathered", "summed"):
        assert ours[name] == pytest.approx(theirs[name], rel=0.001)


@pytest.mark.parametrize(
    "more",
    [{"remat": "dots", **UNROLLED}, pytest.param({"remat": "dots"}, marks=REPEATS), {"remat": "full"}],
    ids=["dots", "dots in a loop", "full in a loop"],
)
def test_slots_go_to_their_experts_and_back(more):
    run, program, _ = compiled({"data": 2, "expert": 4}, **more, moe=CAPACITY)
    assert planned_volumes(plan_of(run))["exchanged"] == volumes(program.as_text())["exchanged"] > 0


@pytest.mark.parametrize(
    ("mesh", "segments", "more"),
    [
        ({"data": 2, "context": 4}, False, {}),
        ({"data": 2, "context": 4}, False, {"remat": "full"}),
        ({"data": 4, "context": 2}, True, {"remat": "full", "num_key_value_heads": 2}),
    ],
    ids=str,
)
def test_keys_and_their_gradients_go_round_as_in_the_program(mesh, segments, more):
    """Blocks of XLA, as all is float32. What a mask says of keys goes round less often than is counted."""
    run, program, _ = compiled(mesh, segments=segments, **{"remat": "none", **more})
    ours = planned_volumes(plan_of(run, packed=segments))["passed"]
    assert 1 <= ours / volumes(program.as_text())["passed"] < 1.02


def ring(length=32768, devices=2, *, packed=False, **model):
    run = run_of({"context": devices}, rows=1, length=length, **{"compute_dtype": "bfloat16", **model})
    return Ring.of(run.model, 1, length, devices, packed=packed)


def test_fused_rings_pass_on_narrow_numbers():
    """Of two devices: keys and values forward and backward, gradients there and home, all in the compute dtype."""
    of_keys = 2 * 16384 * 128
    assert ring().sent(1) == 2 * 4 * of_keys
    # A sum is float32: behind keys that were added to it, and where squares of documents are.
    assert ring(packed=True).sent(1) == 2 * (2 * of_keys + 4 * 16384) + (4 + 2) * of_keys
    four = ring(devices=4)
    assert four.sent(1) == 3 * 2 * (2 * of_keys // 2) + (3 * 4 + 2) * of_keys // 2


def test_scores_of_a_ring_are_those_of_a_tile():
    """None of the fused kernels, squares of packed documents' tokens besides, whole tiles of XLA's products."""
    assert ring().working == 16384 * 128 * (4 * 4 + 3)  # float32 gradients, copies of three halves in bfloat16
    squares, tile = (4 * 4 * 8 * scores for scores in (4 * 512**2, TILE**2))
    assert ring(packed=True).working - ring().working == squares
    assert ring(2048, packed=True).working - ring(2048).working == 4 * 4 * 8 * 2 * 512**2, "two squares"
    for refused in ({"attention_logit_softcap": 30.0}, {"sliding_window": 128}, {"attention_implementation": "xla"}):
        assert not ring(**refused).fused
        assert ring(**refused).working - ring().working == tile
    assert ring(sliding_window=32768).fused and not ring(compute_dtype="float32").fused
    assert ring(2**20).working < 1.01 * 32 * ring().working, "scores do not grow with rows"
