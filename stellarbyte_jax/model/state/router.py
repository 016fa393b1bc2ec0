"""What routers carry: from token to token, through a step, and from step to step.

B batch, L layers with experts, E experts, D model.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.trees import Params

TRACKED = "tracked"  # the name under which a router has what it keeps from step to step
_IDLE = 0.1  # of its fair share of the tokens: an expert that gets less is cold


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
    """

    counts: Array
    wanted: Array
    tokens: Array
    lost: Array
    room: Array
    temperature: Array

    @classmethod
    def zero(cls, config: ByteConfig) -> "Tally":
        """Before the first part."""
        L, E = len(config.moe_layers), config.moe.num_experts
        by_expert, by_layer = jnp.zeros((L, E)), jnp.zeros(L)
        return cls(by_expert, by_expert, by_layer, by_layer, by_expert, by_layer)


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


def advance(config: ByteConfig, weights: Params, tally: Tally) -> Params:
    """The tree of weights with what routers keep from step to step as it is after a step.

    Args:
      config: of the network.
      weights: a tree that holds what routers keep: of all weights, or of those that gradients do not reach.
      tally: of the step.
    """
    layers = dict(weights["layers"])
    first = 0
    for group in config.layer_groups:
        for stack in group.stacks:
            size = len(group.of_stack(stack))
            if not group.of_stack(stack)[0].moe:
                continue
            of_stack = jax.tree.map(lambda x, at=first, n=size: x[at : at + n], tally)
            stacked = layers[str(stack)]
            router = stacked["moe"]["router"]
            after = _advanced(config, router[TRACKED], of_stack)
            layers[str(stack)] = {**stacked, "moe": {**stacked["moe"], "router": {**router, TRACKED: after}}}
            first += size
    return {**weights, "layers": layers}


def _advanced(config: ByteConfig, tracked: Params, tally: Tally) -> Params:
    """Of a stack of routers: running means, priorities, biases and the number of steps.

    The priority is the original's: half for choices that were taken, less use and an even load.
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

    def mean(name: str, new: Array) -> Array:
        return decay * tracked[name] + (1 - decay) * new

    after = {
        "load": mean("load", shares),
        "utilization": mean("utilization", used),
        "priority": mean("priority", jnp.maximum(wish, 0.1)),
        "bias": tracked["bias"] + c.bias_update_rate * jnp.sign(below),
        "coldness": _coldness(tracked["coldness"], shares < _IDLE * fair, c.cooling_steps),
        "steps": tracked["steps"] + 1,
    }
    return {name: after[name] for name in tracked}


def _coldness(before: Array, idle: Array, cooling_steps: int) -> Array:
    """1 for an expert without tokens, which falls to 0 in so many steps from when it is used again."""
    if not cooling_steps:
        return before
    return jnp.where(idle, 1.0, jnp.maximum(before - 1 / cooling_steps, 0.0))
