"""Measures of how evenly tokens are spread over experts, as losses.

N tokens, R rows, T tokens of a row, E experts, K choices a token. ``loads`` are shares of the choices that experts got:
they count, so no gradient passes them; it passes the scores. Every loss is a float32 scalar.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stellarbyte_jax.ops.routing import LEAST_SUM

_TINY = 1e-9  # keeps logarithms finite


class Routed(NamedTuple):
    """What the losses are of.

    Attributes:
      logits_NE: float32, as the gate gives them.
      scores_NE: float32, of the tokens.
      experts_NK: int32, wanted experts; E for none.
      mask_N: False for padding, which counts nowhere.
      rows: static; number of rows that the tokens are of.
    """

    logits_NE: Array
    scores_NE: Array
    experts_NK: Array
    mask_N: Array
    rows: int

    @property
    def shares(self) -> Array:
        """Scores of a token, that add up to one; zeros for padding."""
        total_N1 = jnp.sum(self.scores_NE, axis=1, keepdims=True)
        return jnp.where(self.mask_N[:, None], self.scores_NE / jnp.maximum(total_N1, LEAST_SUM), 0.0)


def counts_by_expert(experts_NK: Int[Array, "*rows N K"], experts: int) -> Float[Array, "*rows E"]:
    """How many choices are of each expert, float32."""
    one_hot = jax.nn.one_hot(experts_NK, experts, dtype=jnp.float32)
    return jnp.sum(one_hot, axis=(-3, -2))


def losses(routed: Routed, counts_E: Float[Array, " E"]) -> dict[str, Array]:
    """Every loss by its name.

    ``router_load``: ``E sum(load * mean score)``, 1 where all is even (Fedus et al. 2021,
    https://arxiv.org/abs/2101.03961). ``router_global``: the same with the loads of ``counts_E``, which may count
    tokens of other parts of the batch too (Qiu et al. 2025, https://arxiv.org/abs/2501.11873). ``router_sequence``: the
    same of each row, on average (DeepSeek-AI 2024, https://arxiv.org/abs/2412.19437). ``router_entropy``: the same with
    tokens weighted by the entropy of their scores, so that those that are undecided move. ``router_kl``: divergence of
    the mean scores from even ones. ``router_mse``: ``E sum((load - 1/E)^2)``, whose gradient passes the scores as if
    they were the loads. ``router_variance``: squared coefficient of variation of the mean scores (Shazeer et al. 2017,
    https://arxiv.org/abs/1701.06538). ``router_z``: mean squared log-sum-exp of the logits (Zoph et al. 2022,
    https://arxiv.org/abs/2202.08906).

    Args:
      routed: what the router did.
      counts_E: choices of each expert over the whole batch so far, this part of it included.
    """
    E = routed.scores_NE.shape[1]
    shares_NE = routed.shares
    tokens = jnp.maximum(jnp.sum(routed.mask_N, dtype=jnp.float32), 1.0)
    mean_E = jnp.sum(shares_NE, axis=0) / tokens
    loads_E = _loads(counts_by_expert(routed.experts_NK, E))
    # Mean scores with the value of the loads.
    passed_E = mean_E + jax.lax.stop_gradient(loads_E - mean_E)
    log_z_N = jnp.where(routed.mask_N, jax.nn.logsumexp(routed.logits_NE, axis=1), 0.0)
    return {
        "router_load": E * jnp.sum(loads_E * mean_E),
        "router_global": E * jnp.sum(_loads(counts_E) * mean_E),
        "router_sequence": _by_row(routed, shares_NE),
        "router_entropy": E * jnp.sum(loads_E * _of_undecided(shares_NE)),
        "router_kl": jnp.sum(mean_E * jnp.log(E * mean_E + _TINY)),
        "router_mse": E * jnp.sum((passed_E - 1 / E) ** 2),
        "router_variance": jnp.mean((E * mean_E - 1) ** 2),
        "router_z": jnp.sum(log_z_N**2) / tokens,
    }


def _loads(counts_E: Float[Array, "*rows E"]) -> Float[Array, "*rows E"]:
    return counts_E / jnp.maximum(jnp.sum(counts_E, axis=-1, keepdims=True), 1.0)


def _by_row(routed: Routed, shares_NE: Float[Array, "N E"]) -> Float[Array, ""]:
    R, E = routed.rows, shares_NE.shape[1]
    mask_RT = routed.mask_N.reshape(R, -1)
    loads_RE = _loads(counts_by_expert(routed.experts_NK.reshape(R, mask_RT.shape[1], -1), E))
    tokens_R = jnp.sum(mask_RT, axis=1, dtype=jnp.float32)
    mean_RE = jnp.sum(shares_NE.reshape(R, -1, E), axis=1) / jnp.maximum(tokens_R, 1.0)[:, None]
    return E * jnp.sum(loads_RE * mean_RE) / jnp.maximum(jnp.sum(tokens_R > 0, dtype=jnp.float32), 1.0)


def _of_undecided(shares_NE: Float[Array, "N E"]) -> Float[Array, " E"]:
    entropy_N = jax.lax.stop_gradient(-jnp.sum(shares_NE * jnp.log(shares_NE + _TINY), axis=1))
    return jnp.sum(entropy_N[:, None] * shares_NE, axis=0) / (jnp.sum(entropy_N) + _TINY)
