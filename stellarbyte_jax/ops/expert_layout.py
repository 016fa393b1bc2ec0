"""Where the pairs of tokens and experts lie when experts compute: to rows in the order of experts, and back.

N tokens, E experts, K choices a token, P = N K pairs, S rows, G blocks of rows, M rows of a block, D model. The number
E stands for no expert.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stellarbyte_jax.ops.grouped_matmul import Groups, Unaligned
from stellarbyte_jax.ops.routing import Placed

_FEW_TOKENS = 128  # that many in every expert are no more work than reading its weights
_FEW_PAIRS = 1024
_MULTIPLE, _LEAST = 8, 64  # of rows that begin anywhere: what the kernels take


class Layout(NamedTuple):
    """Rows of experts.

    Attributes:
      pairs_S: int32, the pair ``token K + choice`` in each row; P in an empty one.
      rows_NK: int32, the row of each pair; S where it has no expert.
      groups: experts of the rows.
    """

    pairs_S: Array
    rows_NK: Array
    groups: Groups | Unaligned


def lay_out_unaligned(experts_NK: Int[Array, "N K"], experts: int) -> Layout:
    """Rows for every pair, by expert, within one in the order of tokens, and no empty ones but the last few.

    Args:
      experts_NK: of the tokens; E for none.
      experts: their number E.
    """
    N, K = experts_NK.shape
    numbers_P = jnp.arange(N * K, dtype=jnp.int32)
    rows = _whole_rows(N * K)
    if N * K > _FEW_PAIRS:
        sizes_E, pairs_P = _by_expert(experts_NK, experts)
        rows_P = jnp.where(numbers_P < jnp.sum(sizes_E), numbers_P, rows)
        return _layout(pairs_P, rows_P, rows, N, Unaligned(sizes_E))
    # A GPU has one program of comparisons instead of the several of a sort and of what follows it.
    experts_P = experts_NK.reshape(-1).astype(jnp.int32)
    keys_P = experts_P * (N * K) + numbers_P
    ranks_P = jnp.sum(keys_P[None, :] < keys_P[:, None], axis=1, dtype=jnp.int32)
    rows_P = jnp.where(experts_P < experts, ranks_P, rows)
    pairs_S = jnp.full(rows, N * K, jnp.int32).at[rows_P].set(numbers_P, mode="drop")
    return Layout(pairs_S, rows_P.reshape(N, K), Unaligned(_sizes(experts_P, experts)))


def lay_out(experts_NK: Int[Array, "N K"], experts: int, block: int | None = None) -> Layout:
    """Rows for every pair, however many go to one expert: by expert, within one in the order of tokens.

    Args:
      experts_NK: of the tokens; E for none.
      experts: their number E.
      block: rows of a block; None: what suits the numbers of pairs and experts. Far fewer pairs than experts get
        blocks of one row, so that the weights of the other experts are not touched; for few tokens every expert has
        one block that would hold all of them, and no weight is copied.
    """
    N, K = experts_NK.shape
    P, E = N * K, experts
    M = block or block_rows(N, K, E)
    sizes_E, pairs_P = _by_expert(experts_NK, E)
    sorted_P = jnp.minimum(experts_NK.reshape(-1)[pairs_P], E - 1)
    numbers_P = jnp.arange(P, dtype=jnp.int32)
    ranks_P = numbers_P - (jnp.cumsum(sizes_E) - sizes_E)[sorted_P]
    if M >= N and M > 1:
        blocks_E, ends_E, experts_G = jnp.ones(E, jnp.int32), jnp.arange(1, E + 1, dtype=jnp.int32), None
        G = E
    else:
        blocks_E = -(-sizes_E // M)
        ends_E = jnp.cumsum(blocks_E)
        G = P if M == 1 else P // M + min(E, P)
        blocks_G = jnp.arange(G, dtype=jnp.int32)
        experts_G = jnp.minimum(jnp.searchsorted(ends_E, blocks_G, side="right"), E - 1).astype(jnp.int32)
    rows_P = (ends_E - blocks_E)[sorted_P] * M + ranks_P
    rows_P = jnp.where(numbers_P < jnp.sum(sizes_E), rows_P, G * M)
    return _layout(pairs_P, rows_P, G * M, N, Groups(blocks_E * M, experts_G))


def block_rows(tokens: int, choices: int, experts: int) -> int:
    """Rows of a block that suits so many pairs."""
    if 3 * tokens * choices <= experts:  # a copy is read, written and read
        return 1
    if tokens <= _FEW_TOKENS:
        return -(-tokens // 8) * 8
    # Small blocks copy weights more often, large ones have more empty rows.
    mean = tokens * choices // experts
    return next((M for M in (512, 256) if 4 * M <= mean), 128)


def lay_out_slots(placed: Placed, capacity: int) -> Layout:
    """Rows for ``capacity`` pairs of each expert, with the pairs in their slots."""
    N, K = placed.experts_NK.shape
    E = placed.used_E.shape[0]
    rows_P = (placed.experts_NK * capacity + placed.slots_NK).reshape(-1)  # E times the capacity: no row
    sizes_E = jnp.full(E, capacity, jnp.int32)
    return _layout(jnp.arange(N * K, dtype=jnp.int32), rows_P, E * capacity, N, Groups(sizes_E, None))


def part_of(layout: Layout, number: Int[Array, ""] | int, rows: int) -> Layout:
    """Some rows of a layout, as a layout of their own: pairs whose rows lie elsewhere have no expert in it.

    Args:
      layout: without equal groups.
      number: of the part; with 0 the first rows, with 1 as many after them.
      rows: of each part, whole blocks; the last part may be longer than the layout.
    """
    groups = layout.groups
    P, S = layout.rows_NK.size, layout.pairs_S.size
    pairs_S = jnp.pad(layout.pairs_S, (0, -S % rows), constant_values=P)
    first = number * rows
    rows_NK = layout.rows_NK - first
    ends_E = jnp.clip(jnp.cumsum(groups.sizes_E) - first, 0, rows)
    starts_E = jnp.clip(jnp.cumsum(groups.sizes_E) - groups.sizes_E - first, 0, rows)
    part: Groups | Unaligned = Unaligned(ends_E - starts_E)
    if isinstance(groups, Groups):
        M = _unit(layout)
        assert groups.experts_G is not None and M is not None
        experts_G = jnp.pad(groups.experts_G, (0, -S % rows // M), mode="edge")
        blocks = rows // M
        part = Groups(ends_E - starts_E, jax.lax.dynamic_slice_in_dim(experts_G, number * blocks, blocks))
    return Layout(
        jax.lax.dynamic_slice_in_dim(pairs_S, first, rows),
        jnp.where((rows_NK >= 0) & (rows_NK < rows) & (layout.rows_NK < S), rows_NK, rows),
        part,
    )


def parts_of(layout: Layout, rows: int) -> Int[Array, ""]:
    """How many parts of so many rows hold all that have a pair; at least one."""
    return jnp.maximum(-(-jnp.sum(layout.groups.sizes_E) // rows), 1)


def rows_of_share(layout: Layout, devices: int) -> int | None:
    """Rows that one of ``devices`` has to compute where the loads are nearly even: an eighth more.

    None where these are not fewer than those of the layout, which has room for the pairs of all.
    """
    groups, M = layout.groups, _unit(layout)
    if devices == 1 or M is None:
        return None
    blocks = -(-layout.rows_NK.size * 9 // (8 * devices * M))
    if isinstance(groups, Groups):
        blocks += groups.sizes_E.size
    rows = max(blocks * M, M if isinstance(groups, Groups) else _LEAST)
    return rows if rows < layout.pairs_S.size else None


def _unit(layout: Layout) -> int | None:
    """Rows by which parts of a layout may be cut; None where groups are equal."""
    groups = layout.groups
    if isinstance(groups, Unaligned):
        return _MULTIPLE
    return None if groups.experts_G is None else layout.pairs_S.size // groups.experts_G.size


def _whole_rows(pairs: int) -> int:
    return max(_LEAST, -(-pairs // _MULTIPLE) * _MULTIPLE)


def _by_expert(experts_NK: Array, experts: int) -> tuple[Array, Array]:
    """Pairs of each expert, and all pairs in the order of experts and tokens, those without an expert last."""
    experts_P = experts_NK.reshape(-1)
    return _sizes(experts_P, experts), jnp.argsort(experts_P, stable=True).astype(jnp.int32)


def _sizes(experts_P: Array, experts: int) -> Array:
    """Pairs of each expert, by comparisons: a GPU adds to so few numbers one after another."""
    of_expert_EP = experts_P[None, :] == jnp.arange(experts, dtype=experts_P.dtype)[:, None]
    return jnp.sum(of_expert_EP, axis=1, dtype=jnp.int32)


def _layout(pairs_P: Array, rows_P: Array, rows: int, tokens: int, groups: Groups | Unaligned) -> Layout:
    """The layout in which these pairs have these rows."""
    pairs_S = jnp.full(rows, rows_P.size, jnp.int32).at[rows_P].set(pairs_P, mode="drop")
    rows_P = jnp.full_like(rows_P, rows).at[pairs_P].set(rows_P, unique_indices=True)
    return Layout(pairs_S, rows_P.reshape(tokens, -1), groups)


@jax.custom_vjp
def to_experts(x_ND: Float[Array, "N D"], layout: Layout) -> Float[Array, "S D"]:
    """The token of each row; zeros in empty ones. Its gradient is summed in float32, always in the same order."""
    return x_ND.at[tokens_of_rows(layout)].get(mode="fill", fill_value=0)


def _to_forward(x_ND: Array, layout: Layout) -> tuple[Array, Layout]:
    return to_experts(x_ND, layout), layout


def _to_backward(layout: Layout, dx_SD: Array) -> tuple[Array, None]:
    return sum_of_choices(dx_SD, layout.rows_NK, None).astype(dx_SD.dtype), None


to_experts.defvjp(_to_forward, _to_backward)


@jax.custom_vjp
def from_experts(y_SD: Float[Array, "S D"], layout: Layout, weights_NK: Float[Array, "N K"]) -> Float[Array, "N D"]:
    """Weighted sums of what experts made of a token, float32, always in the same order.

    A pair without an expert counts nothing, whatever its weight, which must be finite.
    """
    return sum_of_choices(y_SD, layout.rows_NK, weights_NK)


def _from_forward(y_SD: Array, layout: Layout, weights_NK: Array) -> tuple[Array, tuple[Array, Layout, Array]]:
    return from_experts(y_SD, layout, weights_NK), (y_SD, layout, weights_NK)


def _from_backward(kept: tuple[Array, Layout, Array], d_ND: Array) -> tuple[Array, None, Array]:
    y_SD, layout, weights_NK = kept
    K = weights_NK.shape[1]
    dy_SD = (
        d_ND.at[tokens_of_rows(layout)].get(mode="fill", fill_value=0) * weights_of_rows(layout, weights_NK)[:, None]
    )
    dw_NK = jnp.stack([jnp.sum(_rows(y_SD, layout.rows_NK[:, k]) * d_ND, axis=1) for k in range(K)], axis=1)
    return dy_SD.astype(y_SD.dtype), None, dw_NK.astype(weights_NK.dtype)


from_experts.defvjp(_from_forward, _from_backward)


def weights_of_rows(layout: Layout, weights_NK: Float[Array, "N K"]) -> Float[Array, " S"]:
    """The weight of the pair in each row; 0 in empty ones."""
    return weights_NK.reshape(-1).at[layout.pairs_S].get(mode="fill", fill_value=0)


def sum_of_choices(
    y_SD: Float[Array, "S D"], rows_NK: Int[Array, "N K"], weights_NK: Float[Array, "N K"] | None
) -> Float[Array, "N D"]:
    """The sums of each token's rows, or with weights of their multiples, in float32, always in the same order."""
    total_ND = jnp.zeros((rows_NK.shape[0], y_SD.shape[1]), jnp.float32)
    for k in range(rows_NK.shape[1]):  # one after another: an array [N, K, D] would be larger than the rest
        rows_ND = _rows(y_SD, rows_NK[:, k])
        total_ND += rows_ND if weights_NK is None else rows_ND * weights_NK[:, k, None].astype(jnp.float32)
    return total_ND


def tokens_of_rows(layout: Layout) -> Int[Array, " S"]:
    """The token of each row; N in empty ones."""
    N, K = layout.rows_NK.shape
    return jnp.where(layout.pairs_S < N * K, layout.pairs_S // K, N)


def _rows(y_SD: Array, rows_N: Array) -> Array:
    return y_SD.at[rows_N].get(mode="fill", fill_value=0).astype(jnp.float32)
