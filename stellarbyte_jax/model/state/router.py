"""What routers carry: from token to token, through a step, and from step to step.

B batch, L layers with experts, E experts, D model.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.trees import Params

TRACKED = "tracked"  # the name under which a router has what it keeps from step to step
TWIN, TWIN_STEPS = "twin", "twin_steps"  # which expert is the other half of a split one, and for how many steps yet
Tree = TypeVar("Tree")
_IDLE = 0.1  # of its fair share of the tokens: an expert that gets less is cold


def first_values(experts: int) -> dict[str, float | tuple[float, ...]]:
    """What a router keeps from step to step before the first one, by name: of every expert, or of each."""
    by_expert = {"load": 1 / experts, "utilization": 0.5, "priority": 1.0, "bias": 0.0, "coldness": 0.0}
    return {**by_expert, TWIN: tuple(map(float, range(experts))), TWIN_STEPS: 0.0, "steps": 0.0}


def is_tracked(path: str) -> bool:
    """Whether the leaf at a path such as ``layers/0/moe/router/tracked/load`` is no weight but kept by a router."""
    return path.split("/")[-2:-1] == [TRACKED]


@struct.dataclass
class Tally:
    """What the routers of a step counted, float32, summed over its parts.

    Attributes:
      counts: [L, E], choices that experts took.
      wanted: [L, E], choices as the routers made them.
      tokens: [L], that were routed.
      lost: [L], choices that no expert took.
      room: [L, E], choices that experts had room for.
      temperature: [L], by which logits were divided, times the tokens.
      moved: [L], choices that another expert took than the one that was wanted.
    """

    counts: Array
    wanted: Array
    tokens: Array
    lost: Array
    room: Array
    temperature: Array
    moved: Array

    @classmethod
    def zero(cls, config: ByteConfig) -> "Tally":
        """Before the first part."""
        L, E = len(config.moe_layers), config.moe.num_experts
        by_expert, by_layer = jnp.zeros((L, E)), jnp.zeros(L)
        return cls(by_expert, by_expert, by_layer, by_layer, by_expert, by_layer, by_layer)


@struct.dataclass
class RouterState:
    """What a call reads from the one before and leaves for the next.

    Attributes:
      history_LBD: running mean of the earlier tokens of each row's document, as the gate of each layer reads it,
        float32; None where no gate does.
      tally: counts of the step so far; None outside of training, which alone counts.
    """

    history_LBD: Array | None = None
    tally: Tally | None = None

    @classmethod
    def initial(cls, config: ByteConfig, rows: int) -> "RouterState | None":
        """Before the first token; None for a network whose gates read no history."""
        if not config.moe.history_decay:
            return None
        return cls(jnp.zeros((len(config.moe_layers), rows, config.hidden_size)))

    def select(self, rows: Array | Sequence[int]) -> "RouterState":
        """What these rows have, in this order."""
        assert self.history_LBD is not None and self.tally is None
        return self.replace(history_LBD=self.history_LBD[:, jnp.asarray(rows)])  # type: ignore[attr-defined]

    def by_axes(self, of: Callable[[tuple[str | None, ...], Array], Array]) -> "RouterState":
        """The state with what ``of`` makes of the logical axes of the history, and of the history; counts stay."""
        if self.history_LBD is None:
            return self
        return self.replace(history_LBD=of((None, "batch", None), self.history_LBD))  # type: ignore[attr-defined]


def tracked_loads(config: ByteConfig, weights: Params) -> Array:
    """The running means of loads [L, E] of all layers with experts, in their order; they add up to one in each.

    Args:
      config: of the network.
      weights: a tree that holds what routers keep, as for :func:`advance`.
    """
    stacks = [stack for group in config.layer_groups for stack in group.stacks if group.of_stack(stack)[0].moe]
    return jnp.concatenate([weights["layers"][str(stack)]["moe"]["router"][TRACKED]["load"] for stack in stacks])


def advance(config: ByteConfig, weights: Params, tally: Tally) -> Params:
    """The tree of weights with what routers keep from step to step as it is after a step.

    Args:
      config: of the network.
      weights: a tree that holds what routers keep: of all weights, or of those that gradients do not reach.
      tally: of the step.
    """
    return with_tracked(config, weights, tally, lambda tracked, tally: _advanced(config, tracked, tally))


def tracked_of(config: ByteConfig, weights: Params) -> Params:
    """What the routers of all layers with experts keep, [L, ...], from a tree that holds it."""
    parts = [weights["layers"][stack]["moe"]["router"][TRACKED] for stack in moe_stacks(config)]
    return jax.tree.map(lambda *stacks: jnp.concatenate(stacks), *parts)


def with_tracked(
    config: ByteConfig, weights: Params, of_layers: Tree, change: Callable[[Params, Tree], Params]
) -> Params:
    """The tree of weights in which ``change`` made other numbers of what each stack of routers keeps.

    Args:
      config: of the network.
      weights: a tree that holds what routers keep.
      of_layers: arrays [L, ...] of all layers with experts.
      change: from what a stack of routers keeps, and the rows of ``of_layers`` that are its layers', to what it keeps.
    """
    layers = dict(weights["layers"])
    for name, rows in moe_stacks(config).items():
        stack = layers[name]
        router = stack["moe"]["router"]
        after = change(router[TRACKED], jax.tree.map(lambda x, rows=rows: x[rows], of_layers))
        layers[name] = {**stack, "moe": {**stack["moe"], "router": {**router, TRACKED: after}}}
    return {**weights, "layers": layers}


def with_twins_of(config: ByteConfig, weights: Params) -> Params:
    """Weights of a model whose experts are split or not, as those of ``config`` in which the other is the case.

    Raises:
      ValueError: twins still exclude each other, which ``config`` has no place for.
    """
    E = config.moe.num_experts

    def change(tracked: Params, layers: Array) -> Params:
        if config.moe.rebalance_interval is None:
            if TWIN_STEPS in tracked and np.any(np.asarray(tracked[TWIN_STEPS]) > 0):
                raise ValueError(
                    "halves of split experts still exclude each other in these weights: set "
                    "model.moe.rebalance_interval"
                )
            return {name: x for name, x in tracked.items() if name not in (TWIN, TWIN_STEPS)}
        own = jnp.broadcast_to(jnp.arange(E, dtype=jnp.float32), (layers.shape[0], E))
        return {TWIN: own, TWIN_STEPS: jnp.zeros_like(own), **tracked}

    return with_tracked(config, weights, jnp.arange(len(config.moe_layers)), change)


def moe_stacks(config: ByteConfig) -> dict[str, slice]:
    """By name of each stack of layers with experts, where these layers stand among all with experts."""
    found: dict[str, slice] = {}
    first = 0
    for group in config.layer_groups:
        for stack in group.stacks:
            layers = group.of_stack(stack)
            if layers[0].moe:
                found[str(stack)] = slice(first, first + len(layers))
                first += len(layers)
    return found


def _advanced(config: ByteConfig, tracked: Params, tally: Tally) -> Params:
    """Of a stack of routers: running means, priorities, biases and the number of steps.

    The priority is the original's: half for choices that were taken, less use and an even load. Where a step had no
    choices, as one of padding alone, all but the number of steps stays.
    """
    c = config.moe
    E, decay = c.num_experts, c.state_decay
    fair = 1 / E
    total = jnp.maximum(jnp.sum(tally.counts, axis=1, keepdims=True), 1.0)
    shares = tally.counts / total
    used = jnp.minimum(tally.counts / jnp.maximum(tally.room, 1.0), 1.0)
    taken = tally.counts / jnp.maximum(tally.wanted, 1.0)
    spread = jnp.std(shares, axis=1, keepdims=True) / fair
    wish = 0.5 * jnp.minimum(taken, 1.0) + 0.3 * (1 - used) + 0.2 * (1 - spread)
    # Of whole numbers: shares are rounded, and an expert with its fair share would move.
    below = jnp.sum(tally.wanted, axis=1, keepdims=True) - E * tally.wanted

    chosen = jnp.sum(tally.wanted, axis=1, keepdims=True) > 0

    def mean(name: str, new: Array) -> Array:
        return jnp.where(chosen, decay * tracked[name] + (1 - decay) * new, tracked[name])

    after = {
        "load": mean("load", shares),
        "utilization": mean("utilization", used),
        "priority": mean("priority", jnp.maximum(wish, 0.1)),
        "bias": tracked["bias"] + c.bias_update_rate * jnp.sign(below),
        "coldness": jnp.where(
            chosen, _coldness(tracked["coldness"], shares < _IDLE * fair, c.cooling_steps), tracked["coldness"]
        ),
        "steps": tracked["steps"] + 1,
    }
    if TWIN in tracked:
        left = jnp.maximum(tracked[TWIN_STEPS] - 1, 0.0)
        own = jnp.broadcast_to(jnp.arange(E, dtype=jnp.float32), left.shape)
        after |= {TWIN: jnp.where(left > 0, tracked[TWIN], own), TWIN_STEPS: left}
    return {name: after[name] for name in tracked}


def hidden_twins(
    twin_E: Float[Array, " E"], steps_E: Float[Array, " E"], positions_N: Int[Array, " N"]
) -> Bool[Array, "N E"]:
    """Which experts tokens do not see: of two twins that at odd positions with the lower number, else the other.

    So each token has the scores that it had before the split.

    Args:
      twin_E: number of the expert's twin, or its own.
      steps_E: steps for which twins exclude each other yet.
      positions_N: of the tokens, in their documents.
    """
    own_E = jnp.arange(twin_E.shape[0], dtype=jnp.float32)
    twin_E = jnp.where(steps_E > 0.5, jnp.round(twin_E), own_E)
    odd_N1 = (positions_N % 2 == 1)[:, None]
    return jnp.where(odd_N1, (own_E < twin_E)[None], (own_E > twin_E)[None])


def _coldness(before: Array, idle: Array, cooling_steps: int) -> Array:
    """1 for an expert without tokens, which falls to 0 in so many steps from when it is used again."""
    if not cooling_steps:
        return before
    return jnp.where(idle, 1.0, jnp.maximum(before - 1 / cooling_steps, 0.0))
