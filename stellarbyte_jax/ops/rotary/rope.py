"""Rotary position embedding, and the interface of every position scheme.

B batch, T new tokens, S keys, N query heads, K key/value heads, H head size, P = H/2 rotated pairs.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from stellarbyte_jax.ops.rotary.angles import apply_rotary, rotary_angles, scale_pairs
from stellarbyte_jax.ops.rotary.scaling import Scaling, dynamic_frequencies, scaled_frequencies


@struct.dataclass
class Frequencies:
    """Rotary frequencies of a call, the same in every layer.

    Attributes:
      values: float32 [P]; with dynamic scaling of each row or token, [B, 1 or T, P].
      magnitude: static factor of cosines and sines.
    """

    values: Array
    magnitude: float = struct.field(pytree_node=False, default=1.0)


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Scores depend on the distance of query and key, by rotations of channel pairs.

    Su et al. 2021, https://arxiv.org/abs/2104.09864. Subclasses are the other schemes.

    Attributes:
      head_size: H.
      theta: base of the frequencies.
      pairing: ``half`` or ``interleaved``; see :func:`apply_rotary`.
      scaling: frequencies for longer texts.
    """

    head_size: int
    theta: float
    pairing: str
    scaling: Scaling

    @property
    def relative(self) -> bool:
        """Whether scores depend on distances alone, so that a window frees a text from the trained length."""
        return True

    @property
    def max_length(self) -> int | None:
        """Positions that a text may have where a layer sees all of it; None for any number."""
        return self.scaling.max_length

    @property
    def longest_row(self) -> int | None:
        """Tokens that may be rotated in one call; None for any number."""
        return None

    @property
    def rates(self) -> Float[Array, " P"] | None:
        """Rates of decay by distance, which a layer may learn; None where scores do not decay."""
        return None

    def frequencies(
        self,
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"] | None,
        valid_mask_BT: Bool[Array, "B T"],
        *,
        cached: bool,
        rows_1T: Int[Array, "1 T"] | None = None,
    ) -> Frequencies:
        """The frequencies for new tokens.

        Args:
          positions_BT: position of each token in its document.
          segment_ids_BT: documents of a row; None: one.
          valid_mask_BT: which tokens are text.
          cached: whether earlier tokens of a row are in a cache.
          rows_1T: index of each token in its row; None: tokens are in order.
        """
        if self.scaling.name != "dynamic":
            return Frequencies(*scaled_frequencies(self.head_size, self.theta, self.scaling))
        if cached:
            lengths = jnp.max(jnp.where(valid_mask_BT, positions_BT, 0), axis=1, keepdims=True) + 1
        else:
            lengths = document_lengths(positions_BT, segment_ids_BT, valid_mask_BT, rows_1T)
        return Frequencies(dynamic_frequencies(lengths, self.head_size, self.theta, self.scaling))

    @property
    def caches_rotated(self) -> bool:
        """Whether keys are cached after rotation. With dynamic scaling a longer text rotates all keys anew."""
        return self.scaling.name != "dynamic"

    def rotate(
        self,
        frequencies: Frequencies,
        q_BTNH: Float[Array, "B T N H"],
        k_BSKH: Float[Array, "B S K H"],
        positions_BS: Int[Array, "B S"],
        rows_BS: Int[Array, "#B S"],
        rates_P: Float[Array, " P"] | None,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"]]:
        """Queries and keys of one row, ready for attention; the T queries belong to the last T of the S tokens.

        Args:
          frequencies: of these tokens.
          q_BTNH: queries.
          k_BSKH: keys.
          positions_BS: position of each token in its document.
          rows_BS: index of each token in its row. Within a document their distances are those of the positions.
          rates_P: rates of decay, where the scheme has any.

        Raises:
          ValueError: the scheme cannot rotate so many tokens in one call.
        """
        S = k_BSKH.shape[1]
        first = S - q_BTNH.shape[1]
        self._check_row(S)
        angles_BSP = rotary_angles(positions_BS, frequencies.values)
        indices_BS = rows_BS if self.relative else positions_BS
        # Not by its place: a mesh may have the tokens in another order.
        ends_B1 = jnp.min(rows_BS, axis=1, keepdims=True), jnp.max(rows_BS, axis=1, keepdims=True)
        middle_B1 = (ends_B1[0] + ends_B1[1] + 1) // 2
        scale_q, scale_k = self._factors(rates_P, indices_BS[:, first:], indices_BS, middle_B1)
        q_BTNH = self._apply(frequencies, q_BTNH, angles_BSP[:, first:], scale_q)
        return q_BTNH, self._apply(frequencies, k_BSKH, angles_BSP, scale_k)

    def to_cache(
        self, frequencies: Frequencies, k_BSKH: Float[Array, "B S K H"], positions_BS: Int[Array, "B S"]
    ) -> Float[Array, "B S K H"]:
        """Keys as they are cached: without factors, and rotated where the scheme says so."""
        if not self.caches_rotated:
            return k_BSKH
        return self._apply(frequencies, k_BSKH, rotary_angles(positions_BS, frequencies.values))

    def from_cache(
        self,
        frequencies: Frequencies,
        q_BTNH: Float[Array, "B T N H"],
        k_BSKH: Float[Array, "B S K H"],
        positions_BT: Int[Array, "B T"],
        key_positions_BSK: Int[Array, "B S #K"],
        rates_P: Float[Array, " P"] | None,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"]]:
        """Queries of new tokens and cached keys, ready for attention.

        Raises:
          ValueError: the scheme cannot rotate so many tokens in one call.
        """
        T = positions_BT.shape[1]
        self._check_row(T)
        middle_B1 = positions_BT[:, T // 2 : T // 2 + 1]
        scale_q, scale_k = self._factors(rates_P, positions_BT, key_positions_BSK, middle_B1)
        q_BTNH = self._apply(frequencies, q_BTNH, rotary_angles(positions_BT, frequencies.values), scale_q)
        if not self.caches_rotated:
            k_BSKH = self._apply(frequencies, k_BSKH, rotary_angles(key_positions_BSK, frequencies.values), scale_k)
        elif scale_k is not None:
            k_BSKH = scale_pairs(k_BSKH, scale_k, pairing=self.pairing)
        return q_BTNH, k_BSKH

    def _factors(
        self, rates_P: Array | None, q_indices_BT: Array, k_indices: Array, middle_B1: Array
    ) -> tuple[Array | None, Array | None]:
        """Factors of the pairs of queries and keys; ``middle_B1`` is in the middle of the new tokens."""
        del rates_P, q_indices_BT, k_indices, middle_B1
        return None, None

    def _check_row(self, tokens: int) -> None:
        if self.longest_row is not None and tokens > self.longest_row:
            raise ValueError(
                f"{tokens} positions in a row are more than the {self.longest_row} whose XPos factors floats can "
                "hold: feed the row in parts through a KV cache, or raise xpos_scale_base"
            )

    def _apply(self, frequencies: Frequencies, x: Array, angles: Array, scale: Array | None = None) -> Array:
        return apply_rotary(x, angles, pairing=self.pairing, scale=scale, magnitude=frequencies.magnitude)


def document_lengths(
    positions_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"] | None,
    valid_mask_BT: Bool[Array, "B T"],
    rows_1T: Int[Array, "1 T"] | None = None,
) -> Int[Array, "B T"]:
    """Length of each token's document within this row; ``rows_1T``: places in it of tokens that are not in order."""
    if segment_ids_BT is None:
        segment_ids_BT = valid_mask_BT.astype(jnp.int32)
    if rows_1T is not None:
        order_T = jnp.argsort(rows_1T[0])
        in_order_BT = document_lengths(positions_BT[:, order_T], segment_ids_BT[:, order_T], valid_mask_BT[:, order_T])
        return in_order_BT[:, rows_1T[0]]
    T = positions_BT.shape[1]
    index_1T = jnp.arange(T, dtype=jnp.int32)[None, :]
    ends_BT = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    end_BT = jax.lax.cummin(jnp.where(ends_BT, index_1T, T), axis=1, reverse=True)
    return jnp.take_along_axis(positions_BT, end_BT, axis=1) + 1
