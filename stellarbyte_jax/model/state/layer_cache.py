"""What a layer knows of its cache: it appends keys and values, and gets back what its queries attend to.

B batch, T new tokens, S keys, K key/value heads (1 where all are alike), H head size, G query heads of each of them.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, Self, runtime_checkable

from flax import struct
from jaxtyping import Array, Bool, Float, Int

from stellarbyte_jax.ops.attention import Mask
from stellarbyte_jax.ops.stored import Stored


@struct.dataclass
class NewTokens:
    """The tokens that a call appends, memory before them included.

    Attributes:
      positions_BS: int32 [B, S], position of each in its text.
      valid_BS: bool [B, S], False for padding and for memory slots without content.
      memory_slots: static; number of memory slots at the beginning.
    """

    positions_BS: Array
    valid_BS: Array
    memory_slots: int = struct.field(pytree_node=False, default=0)


class CachedKV(NamedTuple):
    """What the queries of new tokens attend to.

    Attributes:
      keys_BSKH: in the compute dtype, as they are cached: see the position scheme's ``from_cache``.
      values_BSKH: in the compute dtype.
      positions_BSK: position of each key in its text, negative where a slot is empty.
      always_visible_BSK: keys that a window does not hide; None for none.
      valid_BS: False for keys that do not count, where their positions do not tell; None where all count.
      aligned: whether the keys are those of the new tokens alone, in order: query t belongs to key t + S - T.
      stored: the same keys and values where the cache holds them; None where it does not hold them all.
    """

    keys_BSKH: Float[Array, "B S K H"]
    values_BSKH: Float[Array, "B S K H"]
    positions_BSK: Int[Array, "B S #K"]
    always_visible_BSK: Bool[Array, "B S #K"] | None = None
    valid_BS: Bool[Array, "B S"] | None = None
    aligned: bool = False
    stored: Stored | None = None

    def mask(self, positions_BT: Int[Array, "B T"], window: int | None) -> Mask:
        """What queries at these positions see of the keys."""
        return Mask(
            positions_BT,
            self.positions_BSK,
            k_valid_BS=self.valid_BS,
            always_visible_BSK=self.always_visible_BSK,
            window=window,
            aligned=self.aligned,
        )


@runtime_checkable
class LayerCache(Protocol):
    """The caches of a stack of layers, of which one is the current one.

    The storage of the whole stack travels through the scan over the layers and is updated in place; which layer is
    meant stays inside.
    """

    @property
    def needs_weights(self) -> bool:
        """Whether :meth:`accumulate` wants the attention weights."""
        ...

    def begin(self, new: NewTokens) -> Self:
        """The cache at the beginning of a call that appends these tokens in every layer.

        Raises:
          ValueError: they do not fit.
        """
        ...

    def at(self, layer: Int[Array, ""]) -> Self:
        """The cache with another current layer."""
        ...

    def append(self, k_BSKH: Float[Array, "B S K H"], v_BSKH: Float[Array, "B S K H"]) -> tuple[Self, CachedKV]:
        """The cache with the call's tokens in the current layer, and what their queries attend to."""
        ...

    def accumulate(self, weights_BKGTS: Float[Array, "B K G T S"] | None) -> Self:
        """The cache with these weights added to the scores of its keys; a no-op where eviction does not use them."""
        ...

    def end(self) -> Self:
        """The cache after the call."""
        ...

    def select(self, rows_B: Int[Array, " B"]) -> Self:
        """The cache of these rows, in this order: fewer, others, or some several times."""
        ...

    def reset(self, rows_B: Bool[Array, " B"]) -> Self:
        """The cache with these rows empty."""
        ...

    def by_axes(self, of: Callable[[tuple[str | None, ...], Array], Array]) -> Self:
        """The cache between calls of what ``of`` makes of the logical axes of each array, and the array."""
        ...
