"""Keys and values where a cache holds them, for kernels that read them there.

R layers of a stack, B batch, S slots, K key/value heads, H head size.
"""

from typing import Self

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Shaped


@struct.dataclass
class Stored:
    """Keys and values of one layer of a stack, as they are stored.

    Attributes:
      keys: of ``dtype``, or of the unsigned integers that hold its bits.
      values: like the keys.
      key_scales: float32, which 8 bits are multiplied with; else None.
      value_scales: like the key scales.
      layer: int32, which one is meant.
      ends_B: int32, for each row the slot behind the last one that has a key; None where a mask alone tells.
      dtype: static; what the numbers mean.
    """

    keys: Shaped[Array, "R B S K H"]
    values: Shaped[Array, "R B S K H"]
    key_scales: Float[Array, "R B K S"] | None
    value_scales: Float[Array, "R B K S"] | None
    layer: Int[Array, ""]
    ends_B: Int[Array, " B"] | None
    dtype: str = struct.field(pytree_node=False)

    @classmethod
    def alone(cls, k_BSKH: Float[Array, "B S K H"], v_BSKH: Float[Array, "B S K H"]) -> Self:
        """Arrays that are a stack of one layer."""
        return cls(k_BSKH[None], v_BSKH[None], None, None, jnp.zeros((), jnp.int32), None, str(k_BSKH.dtype))


def numbers(x: Array, dtype: str) -> Array:
    """What bits in unsigned integers mean; other arrays stay as they are."""
    return jax.lax.bitcast_convert_type(x, dtype) if jnp.issubdtype(x.dtype, jnp.unsignedinteger) else x
