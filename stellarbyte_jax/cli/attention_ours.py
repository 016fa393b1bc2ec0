"""Our side of ``benchmark attention``. B rows, S tokens, N query heads, K key/value heads, H head size."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from stellarbyte_jax.cli.attention_speed import Case, Result, documents, figures, firsts
from stellarbyte_jax.cli.layer_speed import timed
from stellarbyte_jax.cli.ours import apart, repeated
from stellarbyte_jax.launch import environment
from stellarbyte_jax.ops.attention import Mask, attention

_WRONG = 0.02  # of the norm, from one way to another: rounding to bfloat16 makes about a fifth of it


def measure_case(case: Case, ways: Sequence[str], calls: int) -> Result:
    """Attention by each implementation, or why it refuses.

    Args:
      case: what is computed.
      ways: names of implementations. The first one's results are compared with those of the next that does not refuse.
      calls: of a repeat.
    """
    arrays = [
        jax.random.normal(jax.random.key(seed), (case.rows, case.length, heads, case.size), jnp.bfloat16)
        for seed, heads in enumerate((case.heads, case.kv_heads, case.kv_heads, case.heads))
    ]
    mask = mask_of(case)
    found: Result = {}
    results: list[list[Array]] = []
    for way in ways:
        forward, both = _programs(case, mask, way)
        try:
            jax.block_until_ready((forward(*arrays[:3]), both(*arrays)))  # compiled
            ahead, whole = repeated(forward, *arrays[:3]), repeated(both, *arrays)
        except NotImplementedError as refusal:
            found[way] = {"refused": str(refusal)}
            continue
        except RuntimeError as error:  # of JAX
            found[way] = {"error": str(error).splitlines()[0][:200]}
            continue
        found[way] = figures(case, timed(ahead, calls), timed(whole, calls), jax.devices()[0].device_kind)
        if len(results) < 2:
            results.append(jax.tree.leaves(both(*arrays)))
    if len(results) == 2:
        most = max(apart(ours, others) for ours, others in zip(*results, strict=True))
        found["apart"] = float(f"{most:.2g}")
        if not most < _WRONG:
            found["error"] = f"two implementations are {most:.2g} of their norm apart, where {_WRONG} is the limit"
    return {**found, "on": environment()}


def mask_of(case: Case) -> Mask:
    """What the case's tokens see."""
    ids = documents(case)
    rows_1S = jnp.arange(case.length, dtype=jnp.int32)[None]
    segments = None if case.document is None else jnp.asarray(ids)
    sinks = np.arange(case.length)[None] - firsts(ids) < case.sinks
    return Mask(
        rows_1S,
        rows_1S[..., None],
        segments,
        segments,
        always_visible_BSK=jnp.asarray(sinks)[..., None] if case.sinks else None,
        window=case.window,
        max_segments=None if segments is None else int(ids.max()) + 1,
        aligned=True,
    )


def _programs(case: Case, mask: Mask, way: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(q: Array, k: Array, v: Array) -> Array:
        return attention(q, k, v, mask, softcap=case.softcap, implementation=way).out_BTNH

    def both(q: Array, k: Array, v: Array, d: Array) -> Any:
        out, pull = jax.vjp(forward, q, k, v)
        return out, pull(d)

    return jax.jit(forward), jax.jit(both)
