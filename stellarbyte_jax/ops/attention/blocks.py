"""Attention over some of the keys, to be merged with that over others, and its gradients from the merged result.

Dao et al. 2022, https://arxiv.org/abs/2205.14135. B batch, T queries, S keys, N query heads, K key/value heads, H head
size.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NOTHING = -1e30  # log-sum-exp of a query that sees no key


class Partial(NamedTuple):
    """What queries made of the keys so far.

    Attributes:
      out_BTNH: float32 weighted means of the values; zeros for a query that saw no key.
      lse_BTN: float32 log-sum-exp of the scores; ``NOTHING`` there.
    """

    out_BTNH: Array
    lse_BTN: Array

    def merged(self, other: "Partial") -> "Partial":
        """Over the keys of both."""
        lse_BTN = jnp.logaddexp(self.lse_BTN, other.lse_BTN)
        own_BTN1, others_BTN1 = (jnp.exp(part.lse_BTN - lse_BTN)[..., None] for part in (self, other))
        seen_BTN1 = (lse_BTN > NOTHING / 2)[..., None]
        out_BTNH = jnp.where(seen_BTN1, self.out_BTNH * own_BTN1 + other.out_BTNH * others_BTN1, 0.0)
        return Partial(out_BTNH, jnp.where(seen_BTN1[..., 0], lse_BTN, NOTHING))


class Queries(NamedTuple):
    """Queries, and what a mask says of them.

    Attributes:
      q_BTNH: queries.
      positions_BT: index of each in its row.
      segments_BT: document of each; None where a row is one document.
    """

    q_BTNH: Array
    positions_BT: Array
    segments_BT: Array | None = None


class Keys(NamedTuple):
    """Keys and values, and what a mask says of them.

    Attributes:
      k_BSKH: keys.
      v_BSKH: values.
      positions_BSK: index of each in its row, K or 1 of them; negative for padding.
      segments_BS: document of each; None where a row is one document. Equal ids are neighbours.
      always_visible_BSK: keys that a window does not hide; None for none.
    """

    k_BSKH: Array
    v_BSKH: Array
    positions_BSK: Array
    segments_BS: Array | None = None
    always_visible_BSK: Array | None = None


Gradients = tuple[Float[Array, "B T N H"], tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]]


@dataclass(frozen=True)
class Blocks(ABC):
    """A kernel for blocks of queries and keys.

    Gradients are float32, of queries and of keys and values, by way of the block's keys alone. They are computed from
    ``merged``, the attention over all keys, and ``slope_BTNH``, the gradient of its result.

    Attributes:
      whole: positions up to which a block on the diagonal is one call of :meth:`attend_whole`.
    """

    whole: ClassVar[int]

    @abstractmethod
    def attend(self, queries: Queries, keys: Keys) -> Partial:
        """Attention over keys that are all earlier in the row than the queries."""

    @abstractmethod
    def gradients(self, queries: Queries, keys: Keys, merged: Partial, slope_BTNH: Array) -> Gradients:
        """Those of :meth:`attend`."""

    @abstractmethod
    def attend_whole(self, queries: Queries, keys: Keys) -> Partial:
        """As :meth:`attend_own`, with scores of every query with every key."""

    @abstractmethod
    def gradients_whole(self, queries: Queries, keys: Keys, merged: Partial, slope_BTNH: Array) -> Gradients:
        """Those of :meth:`attend_whole`."""

    def attend_own(self, queries: Queries, keys: Keys) -> Partial:
        """Attention of tokens, in the order of their row, over themselves.

        Each half over itself, the second over the first besides: half of the scores are hidden, and few are computed.
        """
        shape = queries.q_BTNH.shape
        if not self._is_cut(shape[1]):
            return self.attend_whole(queries, keys)
        each = self.attend_own(_as_rows(queries), _as_rows(keys))
        out_BTNH, lse_BTN = each.out_BTNH.reshape(shape), each.lse_BTN.reshape(shape[:3])
        first, second = halves(Partial(out_BTNH, lse_BTN))
        return joined(first, second.merged(self.attend(halves(queries)[1], halves(keys)[0])))

    def gradients_own(self, queries: Queries, keys: Keys, merged: Partial, slope_BTNH: Array) -> Gradients:
        """Those of :meth:`attend_own`."""
        if not self._is_cut(slope_BTNH.shape[1]):
            return self.gradients_whole(queries, keys, merged, slope_BTNH)
        each = self.gradients_own(*map(_as_rows, (queries, keys, merged, slope_BTNH)))
        across = self.gradients(halves(queries)[1], halves(keys)[0], halves(merged)[1], halves(slope_BTNH)[1])
        (dq_BTNH, dkv), (dq_more, dkv_more) = each, across
        half = slope_BTNH.shape[1] // 2
        dq_BTNH = dq_BTNH.reshape(slope_BTNH.shape).at[:, half:].add(dq_more)
        dk_BSKH, dv_BSKH = (
            d.reshape(of.shape).at[:, :half].add(more)
            for d, more, of in zip(dkv, dkv_more, (keys.k_BSKH, keys.v_BSKH), strict=True)
        )
        return dq_BTNH, (dk_BSKH, dv_BSKH)

    def _is_cut(self, length: int) -> bool:
        return length > self.whole and length % 2 == 0


def halves(tree: Any) -> tuple[Any, Any]:
    """The first and the second half of the positions, the second axis, of every array."""
    cut = [jax.tree.map(lambda x, end=end: jnp.split(x, 2, axis=1)[end], tree) for end in (0, 1)]
    return cut[0], cut[1]


def joined(first: Any, second: Any) -> Any:
    """What :func:`halves` cut."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, second)


def _as_rows(tree: Any) -> Any:
    """Each half of a row as a row of its own: [B, T, ...] as [2 B, T / 2, ...]."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * 2, x.shape[1] // 2, *x.shape[2:]), tree)
