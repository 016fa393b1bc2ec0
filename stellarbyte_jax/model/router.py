"""The router of a layer with experts: which experts each token goes to, and with what weights.

B batch, T positions, N = B T tokens, D model, E experts, K choices a token.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stellarbyte_jax.config import ByteConfig, MoEConfig
from stellarbyte_jax.model.context import LayerContext
from stellarbyte_jax.model.gates import GATES, Seen
from stellarbyte_jax.model.linear import linear
from stellarbyte_jax.model.params import materialise, param
from stellarbyte_jax.model.state.router import TRACKED, TWIN, TWIN_STEPS, first_values, hidden_twins
from stellarbyte_jax.ops.balance import Routed
from stellarbyte_jax.ops.routing import Choices, choose_experts, score_experts
from stellarbyte_jax.sharding.experts import by_token

_LEAST_TEMPERATURE = 0.3  # the original's


class Decision(NamedTuple):
    """What a router decided.

    Attributes:
      choices: experts of the tokens and their weights.
      routed: for the losses.
      temperature: float32 scalar, by which the logits were divided.
      utilization_E: float32, running mean of the experts' use.
      history_BD: running mean of the tokens of each row, for the next call; None where the gate reads none.
    """

    choices: Choices
    routed: Routed
    temperature: Array
    utilization_E: Array
    history_BD: Array | None


class Tracked(nn.Module):
    """What a router keeps from step to step, float32: see :func:`model.state.router.advance`."""

    config: ByteConfig

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        """Running means of loads [E] (shares that add up to one) and of use [E], priorities, biases and coldness [E].

        ``steps`` counts the steps. Where experts are split, ``twin`` [E] is the number of an expert's other half, or
        its own, and ``twin_steps`` [E] says for how many steps these exclude each other yet.
        """
        E = self.config.moe.num_experts
        axes: dict[str, dict[str, int]] = {"steps": {}}  # the others are of each expert
        kept = first_values(E)
        if self.config.moe.rebalance_interval is None:
            del kept[TWIN], kept[TWIN_STEPS]
        return {name: self._number(name, value, axes.get(name, {"routed": E})) for name, value in kept.items()}

    def _number(self, name: str, value: float | tuple[float, ...], axes: dict[str, int]) -> Array:
        init = nn.initializers.constant(jnp.asarray(value, jnp.float32))
        return jax.lax.stop_gradient(materialise(param(self, name, init, axes, float32=True, tracked=True), "float32"))


def _chosen(config: MoEConfig, tokens: tuple[Array, Array, Array | None], bias_E: Array) -> Choices:
    scores_NE, mask_N, hidden_NE = tokens
    return choose_experts(
        scores_NE,
        config.num_experts_per_tok,
        bias_E=bias_E,
        mask_N=mask_N,
        hidden_NE=hidden_NE,
        groups=config.n_group,
        kept_groups=config.topk_group,
        threshold=config.dynamic_k,
        normalize=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
    )


class Router(nn.Module):
    """The router of ``config.moe``. All of it is float32, whatever the compute dtype.

    Noise is drawn in training alone; what is kept from step to step counts in every call.
    """

    config: ByteConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"], ctx: LayerContext, history_BD: Array | None) -> Decision:
        """Decides for tokens [B, T, D]; padding goes nowhere."""
        c = self.config.moe
        tracked = Tracked(self.config, name=TRACKED)()
        logits_BTE, history_BD = GATES[c.gate](self, self.config, Seen(x_BTD, ctx, history_BD))
        clean_NE = logits_BTE.reshape(-1, c.num_experts)
        logits_NE = clean_NE + _preferred(self.config, tracked)[None]
        temperature = self._temperature(tracked["load"])
        logits_NE = logits_NE / temperature
        if ctx.train:
            logits_NE = self._with_noise(logits_NE, x_BTD, tracked["steps"])
        elif c.noise == "noisy_topk":
            self._noise_size(x_BTD)
        hidden_NE = None
        if TWIN in tracked:
            hidden_NE = hidden_twins(tracked[TWIN], tracked[TWIN_STEPS], ctx.positions_BT.reshape(-1))
            clean_NE, logits_NE = (jnp.where(hidden_NE, -jnp.inf, x) for x in (clean_NE, logits_NE))
        scores_NE = score_experts(logits_NE, c.scoring_func)
        mask_N = ctx.tokens.reshape(-1)
        bias_E = jax.lax.stop_gradient(tracked["bias"])
        tokens = (scores_NE, mask_N, hidden_NE)
        choices = by_token(partial(_chosen, c), x_BTD.shape[:2], tokens, bias_E)
        routed = Routed(clean_NE, scores_NE, choices.experts_NK, mask_N, x_BTD.shape[0])
        return Decision(choices, routed, temperature, tracked["utilization"], history_BD)

    def _temperature(self, load_E: Array) -> Array:
        """Constant, or the original's: learned, and larger while loads differ, so that tokens try other experts."""
        c = self.config.moe
        if not c.adaptive_temperature:
            return jnp.asarray(c.temperature, "float32")
        stored = param(self, "temperature", nn.initializers.constant(c.temperature), {}, float32=True)
        learned = jnp.abs(materialise(stored, "float32"))
        return jnp.maximum(learned * (1 + jnp.std(load_E) / (jnp.mean(load_E) + 1e-6)), _LEAST_TEMPERATURE)

    def _with_noise(self, logits_NE: Array, x_BTD: Array, steps: Array) -> Array:
        c = self.config.moe
        if c.noise == "noisy_topk":  # Shazeer et al. 2017, https://arxiv.org/abs/1701.06538
            drawn_NE = jax.random.normal(self.make_rng("dropout"), logits_NE.shape)
            logits_NE += c.noise_scale * drawn_NE * self._noise_size(x_BTD)
        elif c.noise == "gumbel":
            logits_NE += c.noise_scale * jax.random.gumbel(self.make_rng("dropout"), logits_NE.shape)
        if c.router_warmup_steps:
            key, other = jax.random.split(self.make_rng("dropout"))
            lost_N1 = jax.random.uniform(key, (logits_NE.shape[0], 1)) > steps / c.router_warmup_steps
            logits_NE = jnp.where(lost_N1, jax.random.gumbel(other, logits_NE.shape), logits_NE)
        return logits_NE

    def _noise_size(self, x_BTD: Array) -> Float[Array, "N E"]:
        c = self.config
        D, E = c.hidden_size, c.moe.num_experts
        zeros = nn.initializers.zeros
        size_BTE = linear(self, "noise", "BTD,DE->BTE", x_BTD, zeros, float32=True, embed=D, routed=E)
        return jax.nn.softplus(size_BTE).reshape(-1, E)


def _preferred(config: ByteConfig, tracked: dict[str, Array]) -> Float[Array, " E"]:
    """What priorities add to logits."""
    c = config.moe
    added_E = jnp.zeros(c.num_experts)
    if c.expert_priority:
        added_E += jnp.log(tracked["priority"])
    if c.cooling_steps:
        added_E += jnp.log1p(tracked["coldness"])
    return added_E
