"""Our side of ``benchmark decode_attention``. B rows, S slots, N query heads, K key/value heads, H head size."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from stellarbyte_jax.cli.decode_speed import Case, Result, bandwidth_of, figures
from stellarbyte_jax.cli.layer_speed import timed
from stellarbyte_jax.cli.ours import repeated
from stellarbyte_jax.model.state.storage import Storage
from stellarbyte_jax.ops.attention import Mask, attention

_WRONG = 0.02  # of the norm, from one way to another: rounding to bfloat16 makes about a fifth of it


def measure_case(case: Case, ways: Sequence[str], calls: int) -> Result:
    """Attention over a cache by each implementation, or why it refuses.

    Args:
      case: what is computed.
      ways: names of implementations, whose results are compared.
      calls: of a repeat.
    """
    q, storage = jax.jit(lambda: _arrays(case))()
    bandwidth = bandwidth_of(jax.devices()[0].device_kind)
    found: Result = {}
    results: list[Array] = []
    for way in ways:
        run = jax.jit(lambda q, storage, way=way: _attended(case, way, q, storage))
        try:
            results.append(jax.block_until_ready(run(q, storage)))
        except NotImplementedError as refusal:
            found[way] = {"refused": str(refusal)}
            continue
        except RuntimeError as error:  # of JAX
            found[way] = {"error": str(error).splitlines()[0][:200]}
            continue
        seconds = timed(repeated(run, q, storage), calls)
        found[way] = figures(case, [each / case.layers for each in seconds], bandwidth)
    if len(results) == 2:
        ours, others = (x.astype(jnp.float32) for x in results)
        apart = float(jnp.linalg.norm(ours - others) / jnp.linalg.norm(others))
        found["apart"] = float(f"{apart:.2g}")
        if not apart < _WRONG:
            found["error"] = f"two implementations are {apart:.2g} of their norm apart, where {_WRONG} is the limit"
    return found


def _arrays(case: Case) -> tuple[Array, Storage]:
    """A query for each row, and a cache in which every layer holds the same: to draw all would take minutes."""
    keys = [
        jax.random.normal(key, (case.rows, case.keys, case.kv_heads, case.size))
        for key in map(jax.random.key, range(2))
    ]
    q = jax.random.normal(jax.random.key(2), (case.rows, 1, case.heads, case.size), jnp.bfloat16)
    layer = Storage.empty((1, 1, 1, case.kv_heads, case.size), case.dtype).encode(*keys)
    return q, jax.tree.map(lambda x: jnp.broadcast_to(x[None], (case.layers, *x.shape)), layer)


def _attended(case: Case, way: str, q: Array, storage: Storage) -> Array:
    """The sum over layers, each of whose queries depends on the one before, so that none is left out."""
    positions_1S = jnp.arange(case.keys, dtype=jnp.int32)[None]
    last_B1 = jnp.full((case.rows, 1), case.keys - 1, jnp.int32)
    mask = Mask(last_B1, jnp.broadcast_to(positions_1S, (case.rows, case.keys))[..., None])
    ends_B = jnp.full(case.rows, case.keys, jnp.int32)

    def layer(total: Array, number: Array) -> tuple[Array, None]:
        k, v = storage.layer(number).decode(q.dtype)
        stored = storage.stored(number, ends_B)
        # Not a number of the query: rounding of one way would go on from layer to layer.
        mine = jax.lax.optimization_barrier((q, total))[0]
        out = attention(mine, k, v, mask, stored=stored, implementation=way).out_BTNH
        return total + out.astype(jnp.float32), None

    return jax.lax.scan(layer, jnp.zeros(q.shape, jnp.float32), jnp.arange(case.layers, dtype=jnp.int32))[0]
