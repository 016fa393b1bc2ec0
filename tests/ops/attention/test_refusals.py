"""What an implementation does not support it refuses by name and reason, and "auto" goes on to the next."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stellarbyte_jax.ops import dispatch
from stellarbyte_jax.ops.attention import IMPLEMENTATIONS, AttentionOutput, Dropout, Mask, attention

ROW = jnp.arange(6, dtype=jnp.int32)[None]
MASK = Mask(ROW, ROW[..., None], aligned=True)
SLOTS = MASK.replace(aligned=False)
PACKED = MASK.replace(q_segments_BT=jnp.ones_like(ROW), k_segments_BS=jnp.ones_like(ROW))
VISIBLE = MASK.replace(window=2, always_visible_BSK=(ROW < 1)[..., None])


def arrays(T=6, H=8, dtype=jnp.float32):
    return tuple(jnp.ones((1, T, 2, H), dtype) for _ in range(3))


@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 1.0}, "a logit soft cap"),
        ({"prune_below": 0.1}, "pruning of low weights"),
        ({"dropout": Dropout(0.1, jax.random.key(0))}, "attention dropout"),
        ({"return_weights": True}, "attention weights as a result"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_fused_kernels_refuse_what_needs_all_scores(options, message, implementation):
    with pytest.raises(NotImplementedError, match=f"^attention: {implementation} refused: {message}$"):
        attention(*arrays(), MASK, implementation=implementation, **options)
    assert attention(*arrays(), MASK, **options).out_BTNH.shape == (1, 6, 2, 8)  # auto


def test_a_dropout_rate_of_zero_is_no_dropout():
    plain = attention(*arrays(), MASK, implementation="xla").out_BTNH
    found = attention(*arrays(), MASK, implementation="xla", dropout=Dropout(0.0, jax.random.key(0))).out_BTNH
    np.testing.assert_array_equal(found, plain)


def test_xla_refuses_positions_by_head_and_a_rounded_log_sum_exp():
    by_head = SLOTS.replace(k_positions_BSK=jnp.repeat(SLOTS.k_positions_BSK, 2, axis=2))
    with pytest.raises(NotImplementedError, match=r"attention over a cache: xla refused: .*differ from head to head"):
        attention(*arrays(), by_head, implementation="xla")
    with pytest.raises(NotImplementedError, match="log-sum-exp of bfloat16 inputs"):
        attention(*arrays(dtype=jnp.bfloat16), MASK, implementation="xla", return_lse=True)


@pytest.mark.parametrize(
    ("mask", "shape", "options", "message"),
    [
        (SLOTS, {}, {}, "keys that are not in the order of the row"),
        (VISIBLE, {}, {}, "keys that a window does not hide"),
        (MASK, {}, {}, "dtype float32"),
        (MASK, {"dtype": jnp.bfloat16, "H": 12}, {}, "head size 12: a multiple of 8 up to 256"),
        (MASK, {"dtype": jnp.bfloat16, "H": 264}, {}, "head size 264"),
        (MASK, {"dtype": jnp.bfloat16, "T": 5}, {}, "5 positions: its backward pass needs an even number"),
        (PACKED, {"dtype": jnp.bfloat16}, {"return_lse": True}, "the log-sum-exp of packed documents"),
        (PACKED, {"dtype": jnp.bfloat16}, {}, "packed documents without max_segments"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_cudnn_names_what_it_lacks(mask, shape, options, message, monkeypatch):
    """Asked in the order in which a user meets them, on a machine that is taken for one with a GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    if shape.get("T"):
        mask = Mask(ROW[:, :5], ROW[:, :5, None], aligned=True)
    with pytest.raises(NotImplementedError, match=f"cudnn refused: {message}"):
        attention(*arrays(**shape), mask, implementation="cudnn", **options)


def test_cudnn_refuses_another_backend():
    with pytest.raises(NotImplementedError, match="the cpu backend"):
        attention(*arrays(dtype=jnp.bfloat16), MASK, implementation="cudnn")


def test_an_unknown_name_lists_what_exists():
    with pytest.raises(ValueError, match="no implementation 'flash'; there are auto, cudnn, xla, reference, pallas"):
        attention(*arrays(), MASK, implementation="flash")
    with pytest.raises(ValueError, match="no implementation 'flash'"):
        attention(*arrays(), MASK, implementation="flash", required=False)


def test_another_kernel_is_another_entry_which_refuses_loudly_or_steps_aside(monkeypatch, caplog):
    def small_only(q_BTNH, k_BSKH, v_BSKH, mask, options):
        if mask.window is not None:
            raise NotImplementedError("a window")
        return AttentionOutput(v_BSKH * 2)

    monkeypatch.setitem(IMPLEMENTATIONS, "small", small_only)
    monkeypatch.setattr(dispatch, "_logged", set())
    caplog.set_level(logging.INFO)
    np.testing.assert_array_equal(attention(*arrays(), MASK, implementation="small").out_BTNH, 2)
    windowed = MASK.replace(window=3)
    with pytest.raises(NotImplementedError, match="attention: small refused: a window"):
        attention(*arrays(), windowed, implementation="small")
    assert caplog.messages == []
    for _ in range(2):
        found = attention(*arrays(), windowed, implementation="small", required=False)
        np.testing.assert_allclose(found.out_BTNH, 1)
    assert [m for m in caplog.messages if "small refused: a window" in m] == caplog.messages
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("attention: using xla (small refused: a window")


def test_on_a_cpu_auto_reads_a_cache_by_the_reference(monkeypatch, caplog):
    """Which is faster there; a whole row, a GPU and a kernel chosen by name are another matter."""
    monkeypatch.setattr(dispatch, "_logged", set())
    caplog.set_level(logging.INFO)
    attention(*arrays(), SLOTS)
    attention(*arrays(), MASK)
    attention(*arrays(), SLOTS, implementation="xla", required=False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    attention(*arrays(), SLOTS)
    used = [(m.split(":")[0], m.split("using ")[1].split()[0]) for m in caplog.messages]
    cached, whole = "attention over a cache", "attention"
    assert used == [(cached, "reference"), (whole, "xla"), (cached, "xla"), (cached, "xla")]
