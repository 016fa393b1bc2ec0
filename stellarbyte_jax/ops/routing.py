"""Which tokens go to which experts, on arrays alone: scores, choices, and slots of a fixed capacity.

N tokens, E experts, K choices a token, M further candidates, P = N K pairs of a token and an expert. The number E
stands for no expert.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LEAST_SUM = 1e-18  # of scores that something is divided by; slopes are divided by its square, a float32 yet


class Choices(NamedTuple):
    """Experts of each token.

    Attributes:
      experts_NK: int32, the best first; E where the token goes to none.
      weights_NK: float32, what the outputs of the experts are multiplied with; 0 for none.
      factors_N: float32, by which weights are larger than scores.
    """

    experts_NK: Array
    weights_NK: Array
    factors_N: Array

    def weights_of(self, scores_NE: Float[Array, "N E"], experts_NK: Int[Array, "N K"]) -> Float[Array, "N K"]:
        """The weights of other experts of the tokens, in the same proportion to their scores; 0 for none."""
        E = scores_NE.shape[1]
        scores_NK = jnp.take_along_axis(scores_NE, jnp.minimum(experts_NK, E - 1), axis=1)
        return jnp.where(experts_NK < E, scores_NK * self.factors_N[:, None], 0.0)


class Placed(NamedTuple):
    """Slots of experts with a fixed capacity.

    Attributes:
      experts_NK: int32, the expert that took each choice; E where none did.
      slots_NK: int32, its place there, below the capacity; 0 where none did.
      used_E: int32, slots of each expert that are taken.
    """

    experts_NK: Array
    slots_NK: Array
    used_E: Array


def score_experts(logits_NE: Float[Array, "N E"], gate: str) -> Float[Array, "N E"]:
    """Scores of experts in float32: ``"softmax"`` over them, or ``"sigmoid"`` of each.

    The latter: DeepSeek-AI 2024, https://arxiv.org/abs/2412.19437.

    Raises:
      ValueError: there is no such gate.
    """
    logits_NE = logits_NE.astype(jnp.float32)
    if gate == "softmax":
        return jax.nn.softmax(logits_NE, axis=-1)
    if gate == "sigmoid":
        return jax.nn.sigmoid(logits_NE)
    raise ValueError(f"gate must be softmax or sigmoid, got {gate!r}")


def choose_experts(
    scores_NE: Float[Array, "N E"],
    k: int,
    *,
    bias_E: Float[Array, " E"] | None = None,
    mask_N: Bool[Array, " N"] | None = None,
    hidden_NE: Bool[Array, "N E"] | None = None,
    groups: int = 1,
    kept_groups: int = 1,
    threshold: float | None = None,
    normalize: bool = False,
    scale: float = 1.0,
) -> Choices:
    """The k experts with the highest scores, of equals the first ones.

    Args:
      scores_NE: of :func:`score_experts`.
      k: experts of a token.
      bias_E: added for the choice alone; weights are the scores without it, and no gradient comes here (the balance
        without a loss: Wang et al. 2024, https://arxiv.org/abs/2408.15664).
      mask_N: False for padding, which goes nowhere.
      hidden_NE: experts that a token does not see, and so never chooses; there are k others.
      groups: equal groups of neighbouring experts, of which a token uses ``kept_groups``: those with the largest sums
        of their two best scores (DeepSeek-AI 2024, https://arxiv.org/abs/2412.19437).
      kept_groups: see ``groups``.
      threshold: a token has no more experts than it needs for this share of its scores; one at least (Huang et al.
        2024, https://arxiv.org/abs/2403.07652).
      normalize: weights of a token add up to ``scale``.
      scale: of the weights.

    Raises:
      ValueError: there are fewer experts than k in the groups that are kept, or groups do not divide.
    """
    N, E = scores_NE.shape
    if E % groups or not 1 <= kept_groups <= groups:
        raise ValueError(f"{groups} groups, of which {kept_groups} are kept, do not divide {E} experts")
    if not 1 <= k <= E // groups * kept_groups:
        raise ValueError(f"a token cannot have {k} of {E // groups * kept_groups} experts")
    ranked_NE = scores_NE if bias_E is None else scores_NE + bias_E.astype(jnp.float32)[None, :]
    if hidden_NE is not None:
        ranked_NE = jnp.where(hidden_NE, -jnp.inf, ranked_NE)
    if kept_groups < groups:
        ranked_NGE = ranked_NE.reshape(N, groups, E // groups)
        best_NG = jnp.sum(jax.lax.top_k(ranked_NGE, min(2, E // groups))[0], axis=-1)
        of_group_NE = jnp.repeat(_among_best(best_NG, kept_groups), E // groups, axis=1)
        ranked_NE = jnp.where(of_group_NE, ranked_NE, -jnp.inf)
    experts_NK = jax.lax.top_k(ranked_NE, k)[1].astype(jnp.int32)
    scores_NK = jnp.take_along_axis(scores_NE, experts_NK, axis=1)
    needed_NK = jnp.ones(experts_NK.shape, bool) if mask_N is None else jnp.broadcast_to(mask_N[:, None], (N, k))
    if threshold is not None:
        shares_NK = scores_NK / jnp.maximum(jnp.sum(scores_NE, axis=1, keepdims=True), LEAST_SUM)
        needed_NK &= jnp.cumsum(shares_NK, axis=1) - shares_NK < max(threshold, LEAST_SUM)
    scores_NK = jnp.where(needed_NK, scores_NK, 0.0)
    factors_N = jnp.full(N, scale, jnp.float32)
    if normalize:
        factors_N /= jnp.maximum(jnp.sum(scores_NK, axis=1), LEAST_SUM)
    return Choices(jnp.where(needed_NK, experts_NK, E), scores_NK * factors_N[:, None], factors_N)


def _among_best(values_NG: Float[Array, "N G"], k: int) -> Bool[Array, "N G"]:
    best_NK = jax.lax.top_k(values_NG, k)[1]
    return jnp.any(best_NK[:, :, None] == jnp.arange(values_NG.shape[1])[None, None, :], axis=1)


def place(
    experts_NK: Int[Array, "N K"],
    priorities_NK: Float[Array, "N K"],
    used_E: Int[Array, " E"],
    capacity: int | Int[Array, ""],
) -> Placed:
    """Gives each choice a slot of its expert, those with the highest priority first, while there are any.

    Of equal priorities the earlier pair comes first. No two pairs have the same slot.

    Args:
      experts_NK: wanted experts; E for none.
      priorities_NK: of the pairs.
      used_E: slots that are taken already.
      capacity: slots of each expert.
    """
    E = used_E.shape[0]
    experts_P = experts_NK.reshape(-1)
    numbers_P = jnp.arange(experts_P.size, dtype=jnp.int32)
    keys = (experts_P, -priorities_NK.reshape(-1).astype(jnp.float32), numbers_P)
    sorted_P, _, pairs_P = jax.lax.sort(keys, num_keys=3)
    starts_E = jnp.searchsorted(sorted_P, jnp.arange(E, dtype=sorted_P.dtype)).astype(jnp.int32)
    nowhere = sorted_P >= E
    at_P = jnp.minimum(sorted_P, E - 1)
    slots_P = used_E[at_P] + numbers_P - starts_E[at_P]
    taken_P = ~nowhere & (slots_P < capacity)
    experts_P = jnp.full_like(experts_P, E).at[pairs_P].set(jnp.where(taken_P, sorted_P, E))
    slots_P = jnp.zeros_like(numbers_P).at[pairs_P].set(jnp.where(taken_P, slots_P, 0))
    used_E = used_E.at[at_P].add(taken_P.astype(used_E.dtype))
    return Placed(experts_P.reshape(experts_NK.shape), slots_P.reshape(experts_NK.shape), used_E)


def place_overflow(
    placed: Placed,
    candidates_NM: Int[Array, "N M"],
    priorities_NK: Float[Array, "N K"],
    wanted_NK: Bool[Array, "N K"],
    capacity: int | Int[Array, ""],
) -> Placed:
    """Offers what got no slot to further experts, in the order of each token's list, one after another.

    A token never gets an expert twice. What the last candidate refuses stays without one.

    Args:
      placed: of :func:`place`.
      candidates_NM: experts in the order of preference, such as the next best, then idle ones; E for none.
      priorities_NK: of the pairs.
      wanted_NK: False for pairs that want no expert at all, as those of padding.
      capacity: slots of each expert.
    """
    E, M = placed.used_E.shape[0], candidates_NM.shape[1]
    next_N = jnp.zeros(candidates_NM.shape[0], jnp.int32)
    for _ in range(M):
        left_NK = wanted_NK & (placed.experts_NK == E)
        at_NK = next_N[:, None] + jnp.cumsum(left_NK, axis=1, dtype=jnp.int32) - 1
        offered_NK = jnp.take_along_axis(candidates_NM, jnp.clip(at_NK, 0, M - 1), axis=1)
        had_NK = jnp.any(offered_NK[:, :, None] == placed.experts_NK[:, None, :], axis=2)
        twice_NK = jnp.any(
            (offered_NK[:, :, None] == offered_NK[:, None, :])
            & left_NK[:, None, :]
            & jnp.tri(left_NK.shape[1], k=-1, dtype=bool)[None],
            axis=2,
        )
        asks_NK = left_NK & ~had_NK & ~twice_NK
        more = place(jnp.where(asks_NK, offered_NK, E), priorities_NK, placed.used_E, capacity)
        got_NK = more.experts_NK < E
        placed = Placed(
            jnp.where(got_NK, more.experts_NK, placed.experts_NK),
            jnp.where(got_NK, more.slots_NK, placed.slots_NK),
            more.used_E,
        )
        next_N += jnp.sum(left_NK, axis=1, dtype=jnp.int32)
    return placed
