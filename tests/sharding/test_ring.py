"""Rings of each kernel for blocks, on eight CPU devices: numbers, programs for GPUs, memory, order of what is sent."""

import logging
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.fused_blocks import fake_backward, fake_forward
from helpers.rows_on_a_mesh import AXES, T, arrays, mask_of, output_and_gradients
from jax._src.cudnn import fused_attention_stablehlo as fused

from stellarbyte_jax.ops import attention as op
from stellarbyte_jax.ops import dispatch
from stellarbyte_jax.ops.attention import Mask, blocks_cudnn, blocks_xla
from stellarbyte_jax.sharding import make_mesh
from stellarbyte_jax.sharding.attention import attention
from stellarbyte_jax.sharding.ring import dealt_order


def mesh(devices):
    return make_mesh({**AXES, "context": devices, "data": 8 // devices})


def compare(kind, devices, softcap=None):
    *given, slope = arrays()
    order = dealt_order(T, devices)

    def whole(q, k, v):
        return op.attention(q, k, v, mask_of(kind), softcap=softcap, implementation="reference").out_BTNH

    def ring(q, k, v):
        return attention(q, k, v, mask_of(kind, order), softcap=softcap, dealt=True).out_BTNH

    expected = output_and_gradients(whole, given, slope)
    with jax.set_mesh(mesh(devices)):
        found = output_and_gradients(ring, [x[:, order] for x in given], slope[:, order])
    for name, a, b in zip(("output", "queries", "keys", "values"), found, expected, strict=True):
        np.testing.assert_allclose(a, b[:, order], atol=2e-5, err_msg=name)


@pytest.mark.parametrize(  # the last tile is filled up, or full
    ("kind", "softcap", "tile"), [("plain", None, 3), ("packed, window, sinks", 2.0, 4)]
)
def test_tiles_of_a_block_equal_the_whole_row(monkeypatch, kind, softcap, tile):
    monkeypatch.setattr(blocks_xla, "TILE", tile)
    monkeypatch.setattr(blocks_xla.XlaBlocks, "whole", tile)
    compare(kind, 2, softcap)


@pytest.mark.parametrize("length", [6, 12])  # their halves, or the halves of these, have three positions
def test_a_block_is_halved_as_long_as_it_is_even(monkeypatch, length):
    monkeypatch.setattr(blocks_xla.XlaBlocks, "whole", 2)
    q, k, v, slope = (x[:, :length] for x in arrays())
    rows_1T = jnp.arange(length, dtype=jnp.int32)[None]
    mask = Mask(rows_1T, rows_1T[..., None])
    queries, keys = blocks_cudnn.Queries(q, rows_1T), blocks_cudnn.Keys(k, v, rows_1T[..., None])
    queries, keys = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(q), *x.shape[1:])), (queries, keys))
    whole = output_and_gradients(
        lambda *x: op.attention(*x, mask, implementation="reference").out_BTNH, (q, k, v), slope
    )
    merged = jax.jit(blocks_xla.XlaBlocks().attend_own)(queries, keys)
    dq, (dk, dv) = jax.jit(blocks_xla.XlaBlocks().gradients_own)(queries, keys, merged, slope)
    for name, a, b in zip(("output", "q", "k", "v"), (merged.out_BTNH, dq, dk, dv), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


def test_scores_of_16_bits_are_summed_in_32():
    """They are merged with those of other blocks, by a log-sum-exp that must not be rounded."""
    q, k, v, _ = (8 * x.astype(jnp.bfloat16) for x in arrays())
    rows_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), q.shape[:2])

    def lse(q, k, v):
        queries, keys = blocks_cudnn.Queries(q, rows_BT), blocks_cudnn.Keys(k, v, rows_BT[..., None])
        return blocks_xla.XlaBlocks().attend(queries, keys).lse_BTN

    exact = lse(*(x.astype(jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(lse(q, k, v), exact, rtol=1e-5)


@pytest.mark.parametrize(("devices", "kind"), [(2, "packed"), (4, "packed"), (4, "plain")])
def test_a_ring_of_fused_kernels_equals_the_whole_row(monkeypatch, devices, kind):
    """With kernels of the same contract, on squares of documents that are smaller than a device's tokens."""
    calls = []

    def counted(function):
        def call(*args):
            calls.append((function, args[-2:]))
            return function(*args)

        return call

    monkeypatch.setattr("stellarbyte_jax.sharding.ring.refuse_blocks", lambda *args, **settings: None)
    monkeypatch.setattr(blocks_cudnn, "_forward", counted(fake_forward))
    monkeypatch.setattr(blocks_cudnn, "_backward", counted(fake_backward))
    monkeypatch.setattr(blocks_cudnn.CudnnBlocks, "whole", 2)
    compare(kind, devices)
    assert {function for function, _ in calls} == {fake_forward, fake_backward}
    assert {causal for _, (causal, _) in calls} == ({True, False} if kind == "plain" else {False})


def test_a_document_that_reaches_no_other_block_gives_its_keys_nothing(monkeypatch):
    """Row 1 of the blocks shares no document; row 0 shares two queries and one key."""
    monkeypatch.setattr(blocks_cudnn, "_forward", fake_forward)
    random = np.random.default_rng(0)
    q, k, v = (jax.device_put(np.asarray(random.standard_normal((2, 4, 2, 8)), np.float32)) for _ in range(3))
    places = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32), (2, 4))
    queries = blocks_cudnn.Queries(q, places + 4, jax.device_put(np.asarray([[2, 2, 3, 3], [5, 5, 5, 5]], np.int32)))
    keys = blocks_cudnn.Keys(
        k, v, places[..., None], jax.device_put(np.asarray([[1, 1, 1, 2], [4, 4, 4, 4]], np.int32))
    )
    found = blocks_cudnn.CudnnBlocks().attend(queries, keys)
    np.testing.assert_allclose(found.out_BTNH[0, :2], jnp.broadcast_to(v[0, 3], (2, 2, 8)), atol=1e-6)
    np.testing.assert_array_equal(found.out_BTNH[0, 2:], 0)
    np.testing.assert_array_equal(found.out_BTNH[1], 0)
    np.testing.assert_array_equal(found.lse_BTN[1], jnp.float32(blocks_cudnn.NOTHING))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Programs are lowered as for a GPU of today; nothing can run."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda capability: False)
    monkeypatch.setattr(dispatch, "_logged", set())


def traced(
    length, *, documents=False, window=None, softcap=None, devices=4, dtype=jnp.bfloat16, heads=(8, 2), size=64, **more
):
    """The gradient of a ring over rows of this length."""
    order = dealt_order(length, devices)
    rows_1T = jax.device_put(order)[None]

    def loss(q, k, v, segments):
        segments = segments if documents else None
        mask = Mask(rows_1T, rows_1T[..., None], segments, segments, window=window)
        return jnp.sum(attention(q, k, v, mask, softcap=softcap, dealt=True, **more).out_BTNH.astype(jnp.float32))

    def split(shape, dtype):
        spec = jax.sharding.PartitionSpec(None, "context")
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(jax.sharding.get_mesh(), spec))

    with jax.set_mesh(make_mesh({**AXES, "context": devices})):
        given = [split((1, length, n, size), dtype) for n in (8, 2, 2)]
        return jax.jit(jax.grad(loss, (0, 1, 2))).trace(*given, split((1, length), jnp.int32))


@pytest.mark.parametrize("documents", [False, True])
def test_a_program_for_gpus_calls_the_fused_kernels(as_on_a_gpu, caplog, documents):
    with caplog.at_level(logging.INFO):
        program = traced(16384, documents=documents).lower(lowering_platforms=("cuda",)).as_text()
    assert "attention over rows that are split by position: using cudnn" in caplog.text
    for name in ("__cudnn$fmhaSoftmax(", "__cudnn$fmhaSoftmaxBackward("):
        assert name in program
    assert set(re.findall(r"fmha_scale\\22: ([\d.]+)", program)) == {"0.125"}, "64 channels: 64 ** -0.5, both ways"
    kinds = Counter(re.findall(r"mask_type\\22: \\22(\w+)\\22", program))
    # Four pairs of chunks, in the loop and behind it. With documents, also the halves of 4096, 2048 and 1024 tokens.
    assert kinds == ({"PADDING": 2 * (4 + 3)} if documents else {"NO_MASK": 2 * 4, "CAUSAL": 2})
    assert "2048x2048x" not in program and "4096x4096x" not in program  # no scores, and no mask of them
    assert ("dot_general" in program) == documents  # squares of documents on the diagonal


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"dtype": jnp.float32}, "dtype float32"),
        ({"size": 60}, "head size 60: a multiple of 8 up to 256 is needed"),
        ({"size": 264}, "head size 264: a multiple of 8 up to 256 is needed"),
        ({"softcap": 30.0}, "a logit soft cap"),
        ({"window": 63}, "a window, whose edge would cross blocks of other devices' keys"),
        ({"length": 56}, "14 positions a device: a multiple of 4 is needed"),
    ],
)
def test_what_the_fused_kernels_refuse_goes_to_xla_and_the_log_says_why(as_on_a_gpu, caplog, settings, reason):
    with caplog.at_level(logging.INFO):
        program = traced(**{"length": 64, **settings}).lower(lowering_platforms=("cuda",)).as_text()
    assert "cudnn" not in program
    assert f"attention over rows that are split by position: using xla (cudnn refused: {reason})" in caplog.text
    with pytest.raises(NotImplementedError, match=f"split by position: cudnn refused: {reason}"):
        traced(**{"length": 64, **settings}, implementation="cudnn")


def test_a_window_that_hides_nothing_is_none(as_on_a_gpu):
    assert "cudnn" in traced(64, window=64).lower(lowering_platforms=("cuda",)).as_text()


def test_another_jax_whose_backward_pass_takes_other_arguments_is_refused(as_on_a_gpu, monkeypatch, caplog):
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(fused, "_dot_product_attention_bwd_abstract", lambda query, key, *, scale, seed: None)
        assert "cudnn" not in traced(64).lower(lowering_platforms=("cuda",)).as_text()
    assert f"cudnn refused: jax {jax.__version__}, whose backward pass of cuDNN attention takes other" in caplog.text
    with monkeypatch.context() as patch:
        patch.delattr(fused, "_dot_product_attention_bwd_p_wrapper")
        with pytest.raises(NotImplementedError, match=r"takes other arguments than 0\.10 to 0\.12"):
            traced(64, implementation="cudnn")


@pytest.mark.parametrize("documents", [False, True])
def test_scores_of_long_rows_are_never_in_memory_as_a_whole(documents):
    """16,384 positions a device: scores of one pair of chunks alone would take 2 GiB in float32."""
    compiled = traced(32768, documents=documents, devices=2, dtype=jnp.float32, implementation="xla").lower().compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**30


def computations(program):
    """Instructions of each computation of compiled HLO: what they are and what they read, by name."""
    found, name = {}, None
    for line in program.splitlines():
        if line and not line[0].isspace() and line.endswith("{"):
            name = re.match(r"(?:ENTRY )?%?([^\s(]+)", line)[1]
            found[name] = {}
        elif instruction := re.match(r"\s+(?:ROOT )?%?(\S+) = (.*)", line):
            found[name][instruction[1]] = instruction[2]
    return found


def waits(program, *, of, for_):
    """For each instruction that does ``of``: its computation, and whether it waits there for one that does ``for_``."""
    parts = computations(program)

    def read(text):
        return re.findall(r"%([\w.-]+)", text.split(", metadata=")[0])

    def does(text, what, seen=()):
        called = [name for name in read(text) if name in parts and name not in seen]
        return f" {what}(" in text or any(
            does(each, what, (*seen, name)) for name in called for each in parts[name].values()
        )

    for name, part in parts.items():
        for text in part.values():
            if not does(text, of):
                continue
            waiting, reached = [one for one in read(text) if one in part], set()
            while waiting:
                if (one := waiting.pop()) not in reached:
                    reached.add(one)
                    waiting += [each for each in read(part[one]) if each in part]
            yield name, any(does(part[one], for_) for one in reached)


def test_keys_are_sent_on_before_the_products_that_read_them():
    """In the loops neither what is sent waits for a product, nor a product for what is sent: both go on at once."""
    program = traced(64, dtype=jnp.float32, documents=True).lower().compile().as_text()
    entry = re.search(r"ENTRY %?([^\s(]+)", program)[1]
    sent = list(waits(program, of="collective-permute", for_="dot"))
    bodies = {name for name, _ in sent} - {entry}
    inside = [late for name, late in sent if name in bodies]
    assert len(inside) == 4 + 6 and not any(inside)  # keys, values, positions, documents; and two gradients
    products = [late for name, late in waits(program, of="dot", for_="collective-permute") if name in bodies]
    assert len(products) >= 4 and not any(products)
    outside = [late for name, late in sent if name == entry and late]
    assert len(outside) == 2 + 2 + 2  # gradients, to the last device and home; and the loops, that send
