"""The feed-forward layer whose tokens go to some experts of many.

B batch, T positions, N = B T tokens, D model, F inside an expert, E experts, K choices a token, S rows.
"""

from functools import partial
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.context import LayerContext
from stellarbyte_jax.model.experts import Experts, ExpertWeights, by_experts, run_experts
from stellarbyte_jax.model.io import Aux, LayerState
from stellarbyte_jax.model.lora import Factors
from stellarbyte_jax.model.mlp import gate_and_up, project_down
from stellarbyte_jax.model.router import Decision, Router
from stellarbyte_jax.model.state.router import RouterState, Tally
from stellarbyte_jax.model.trees import Params
from stellarbyte_jax.ops.activations import ACTIVATIONS
from stellarbyte_jax.ops.balance import Routed, counts_by_expert, losses
from stellarbyte_jax.ops.expert_layout import Layout, from_experts, lay_out_slots, to_experts
from stellarbyte_jax.ops.grouped_matmul import Groups
from stellarbyte_jax.ops.routing import Choices, place, place_overflow
from stellarbyte_jax.sharding.experts import Exchange, Made, flat, in_rows, on_devices
from stellarbyte_jax.sharding.rules import of_device

_OFFERS = 2  # candidates of each step for what had no room


class Dispatched(NamedTuple):
    """Where the choices of tokens go in the end.

    Attributes:
      experts_NK: int32, the expert that takes each choice; E where none does.
      weights_NK: float32, of its output.
      layout: rows of the experts.
      room: float32 scalar, choices that an expert has room for.
    """

    experts_NK: Array
    weights_NK: Array
    layout: Layout
    room: Array


class SharedExperts(nn.Module):
    """Experts that every token passes: one gated MLP as wide as all of them."""

    config: ByteConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"], train: bool) -> Float[Array, "B T D"]:
        """Maps [B, T, D] to [B, T, D]; ``train``: as :class:`MLP` does."""
        c, float8 = self.config, train and self.config.matmul_dtype == "float8"
        size = c.moe.n_shared_experts * c.expert_size
        gate_BTF, up_BTF = gate_and_up(self, c, x_BTD, size, float8)
        return project_down(self, c, ACTIVATIONS[c.hidden_act](gate_BTF) * up_BTF, float8)


class MoE(nn.Module):
    """Mixture of experts: ``sum_k weight_k expert_k(x)``, and the shared experts' output.

    Weights multiply what experts give. A choice that no expert has room for adds nothing: the token passes the layer by
    in the residual stream.
    """

    config: ByteConfig

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], ctx: LayerContext, state: LayerState
    ) -> tuple[Float[Array, "B T D"], LayerState, Aux]:
        """Maps [B, T, D] to [B, T, D], the state after the tokens, and the router's losses."""
        c, router = self.config, state.router
        decision = Router(c, name="router")(x_BTD, ctx, None if router is None else router.history_LBD)
        key = self.make_rng("dropout") if ctx.train and "random" in c.moe.overflow else None
        weights = Experts(c, name="experts")() if ctx.pool is None else _pooled(c, ctx.pool)
        out_BTD, sent = _sent_to_experts(c, x_BTD, decision, ctx, key, weights)
        if c.moe.n_shared_experts:
            out_BTD += SharedExperts(c, name="shared")(x_BTD, ctx.train)
        out_BTD = nn.Dropout(c.hidden_dropout, deterministic=not ctx.train)(out_BTD)
        tally = None if router is None else router.tally
        wanted_E = counts_by_expert(decision.choices.experts_NK, c.moe.num_experts)
        aux = Aux.of(losses(decision.routed, wanted_E if tally is None else tally.wanted + wanted_E))
        if router is not None:
            state = state._replace(router=RouterState(decision.history_BD, counted(tally, decision, sent, wanted_E)))
        return out_BTD, state, aux


def _pooled(config: ByteConfig, pool: Params) -> ExpertWeights:
    return cast(ExpertWeights, Experts(config, parent=None).apply({"params": pool}))


class Sent(NamedTuple):
    """What became of the choices.

    Attributes:
      experts_NK: int32, the expert that took each choice; E where none did.
      room: float32 scalar, choices that an expert had room for.
    """

    experts_NK: Array
    room: Array


def _sent_to_experts(
    config: ByteConfig, x_BTD: Array, decision: Decision, ctx: LayerContext, key: Array | None, weights: ExpertWeights
) -> tuple[Array, Sent]:
    """What experts make of the tokens, in the dtype of ``x``.

    Experts have a capacity in training alone, where the config asks for one, so that in generation what a token gets
    does not depend on the others. On a mesh it is one of each device's tokens.
    """
    choices, E = decision.choices, config.moe.num_experts
    if config.moe.dispatch == "dropless" or not ctx.train:
        tokens = in_rows(choices, x_BTD.shape[:2])
        made = on_devices(partial(dropless, config, required=ctx.train), x_BTD, tokens, None, *weights)
        return made.y_BTD, Sent(choices.experts_NK, jnp.max(counts_by_expert(choices.experts_NK, E)))
    told = (choices, decision.routed.scores_NE, decision.routed.mask_N)
    tokens = (in_rows(told, x_BTD.shape[:2]), ctx.positions_BT, ctx.segment_ids_BT)
    shared = (decision.utilization_E, decision.temperature, key)
    made = on_devices(partial(_with_capacity, config, ctx), x_BTD, tokens, shared, *weights)
    return made.y_BTD, Sent(made.tokens.reshape(choices.experts_NK.shape), made.total)


def dropless(
    config: ByteConfig,
    x_BTD: Array,
    tokens: Choices,
    _: None,
    weights: tuple[Factors, Factors],
    exchange: Exchange,
    differ: tuple[str, ...],
    *,
    required: bool = True,
) -> Made:
    """Each device computes its experts for the tokens of all devices that share them.

    All of these tokens may choose one device. It does not lay out rows for that, but computes its even share of them,
    and as often again as there are more. What ``required`` says is said by :func:`by_experts`.
    """
    del differ
    E = config.moe.num_experts
    x_ND, choices = exchange.tokens(flat((x_BTD, tokens)))
    own_NK = exchange.own(choices.experts_NK, E)
    y_ND = by_experts(config, (x_ND, weights, choices.weights_NK), own_NK, exchange.devices, required=required)
    return Made(exchange.sums(y_ND).reshape(x_BTD.shape), None, None)


def _with_capacity(
    config: ByteConfig,
    ctx: LayerContext,
    x_BTD: Array,
    tokens: tuple[tuple[Choices, Array, Array], Array, Array | None],
    shared: tuple[Array, Array, Array | None],
    weights: tuple[Factors, Factors],
    exchange: Exchange,
    differ: tuple[str, ...],
) -> Made:
    """Slots of all experts go to the devices that have the experts, and come back."""
    told, positions_BT, segments_BT = tokens
    utilization_E, temperature, key = shared
    B, _, D = x_BTD.shape
    E = config.moe.num_experts
    choices, scores_NE, mask_N = flat(told)
    decision = Decision(
        choices, Routed(scores_NE, scores_NE, choices.experts_NK, mask_N, B), temperature, utilization_E, None
    )
    here = ctx.replace(positions_BT=positions_BT, segment_ids_BT=segments_BT)  # type: ignore[attr-defined]
    sent = dispatch_choices(config, decision, here, None if key is None else of_device(key, differ))
    x_ECD = exchange.to_owners(to_experts(flat(x_BTD), sent.layout).reshape(E, -1, D))
    slots_E = jnp.full(x_ECD.shape[0], x_ECD.shape[1], jnp.int32)
    y_SD = run_experts(config, x_ECD.reshape(-1, D), weights, Groups(slots_E, None))
    y_ECD = exchange.from_owners(y_SD.reshape(x_ECD.shape))
    y_ND = from_experts(y_ECD.reshape(-1, D), sent.layout, sent.weights_NK).astype(x_BTD.dtype)
    return Made(y_ND.reshape(x_BTD.shape), sent.experts_NK.reshape(*x_BTD.shape[:2], -1), sent.room)


def dispatch_choices(config: ByteConfig, decision: Decision, ctx: LayerContext, key: Array | None) -> Dispatched:
    """Gives choices slots of experts with a capacity."""
    c = config.moe
    choices, scores_NE = decision.choices, decision.routed.scores_NE
    E = c.num_experts
    slots = c.slots(scores_NE.shape[0])
    room = room_of(config, decision, slots)
    placed = place(choices.experts_NK, choices.weights_NK, jnp.zeros(E, jnp.int32), room)
    candidates = overflow_candidates(config, decision, ctx, key)
    if candidates is not None:
        wanted_NK = choices.experts_NK < E
        placed = place_overflow(placed, candidates, choices.weights_NK, wanted_NK, room)
    weights_NK = choices.weights_of(scores_NE, placed.experts_NK)
    return Dispatched(placed.experts_NK, weights_NK, lay_out_slots(placed, slots), room.astype(jnp.float32))


def room_of(config: ByteConfig, decision: Decision, slots: int) -> Int[Array, ""]:
    """The capacity: all slots, or fewer by the original's rule, that experts with little use get more.

    That is the fair share, times the mean of ``1 / (use + 0.1)``.
    """
    c = config.moe
    if not c.dynamic_capacity:
        return jnp.asarray(slots, jnp.int32)
    tokens = jnp.sum(decision.routed.mask_N, dtype=jnp.float32)
    used_E = jnp.clip(decision.utilization_E, 0.1, 0.9)
    room = tokens * c.num_experts_per_tok / c.num_experts * jnp.mean(1 / (used_E + 0.1))
    return jnp.clip(jnp.ceil(room), min(c.min_capacity, slots), slots).astype(jnp.int32)


def overflow_candidates(
    config: ByteConfig, decision: Decision, ctx: LayerContext, key: Array | None
) -> Int[Array, "N M"] | None:
    """Further experts of each token, in the order of ``config.moe.overflow``; None where it is empty."""
    c = config.moe
    experts_NK, scores_NE = decision.choices.experts_NK, decision.routed.scores_NE
    (N, K), E = experts_NK.shape, c.num_experts
    found = []
    for step in c.overflow:
        if step == "next_best" and K < E:
            taken_NE = jnp.any(experts_NK[:, :, None] == jnp.arange(E, dtype=jnp.int32)[None, None], axis=1)
            found.append(jax.lax.top_k(jnp.where(taken_NE, -1.0, scores_NE), min(_OFFERS, E - K))[1])
        elif step == "cold":
            coldest_M = jax.lax.top_k(-decision.utilization_E, min(_OFFERS, E))[1]
            found.append(jnp.broadcast_to(coldest_M[None], (N, coldest_M.size)))
        elif step == "sticky":
            first_BT = experts_NK[:, 0].reshape(ctx.positions_BT.shape)
            before_BT = jnp.pad(first_BT[:, :-1], ((0, 0), (1, 0)), constant_values=E)
            found.append(jnp.where(ctx.starts, E, before_BT).reshape(N, 1))
        elif step == "random":
            assert key is not None
            found.append(jax.random.randint(key, (N, _OFFERS), 0, E, jnp.int32))
    if not found:
        return None
    found_NM = jnp.concatenate(found, axis=1).astype(jnp.int32)
    # What has no score would have no weight: such as an expert that the token does not see.
    has_score_NM = jnp.take_along_axis(scores_NE, jnp.minimum(found_NM, E - 1), axis=1) > 0
    return jnp.where(has_score_NM, found_NM, E)


def counted(tally: Tally | None, decision: Decision, sent: Sent, wanted_E: Array) -> Tally | None:
    """The tally with a call's choices."""
    if tally is None:
        return None
    E = wanted_E.size
    counts_E = counts_by_expert(sent.experts_NK, E)
    moved_NK = (sent.experts_NK != decision.choices.experts_NK) & (sent.experts_NK < E)
    tokens = jnp.sum(decision.routed.mask_N, dtype=jnp.float32)
    new = Tally(
        counts=counts_E,
        wanted=wanted_E,
        tokens=tokens,
        lost=jnp.sum(wanted_E) - jnp.sum(counts_E),
        room=jnp.full_like(counts_E, sent.room),
        temperature=decision.temperature * tokens,
        moved=jnp.sum(moved_NK, dtype=jnp.float32),
    )
    return jax.tree.map(jnp.add, tally, jax.lax.stop_gradient(new))
