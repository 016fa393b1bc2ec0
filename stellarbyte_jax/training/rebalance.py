"""Between steps: two idle experts of a layer become one, and an overloaded one becomes two in the place that is free.

L layers with experts, E experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from stellarbyte_jax.config import ByteConfig, TrainConfig
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes, param_uses
from stellarbyte_jax.model.params import WeightUse
from stellarbyte_jax.model.state.router import TWIN, TWIN_STEPS, moe_stacks, tracked_of, with_tracked
from stellarbyte_jax.model.trees import Params
from stellarbyte_jax.training.placement import names_of, shardings
from stellarbyte_jax.training.state import TrainState

_TINY = 1e-20
_SHARED = ("load", "utilization")  # summed where two experts become one, halved where one becomes two


class Moves(NamedTuple):
    """What happens to the experts of each layer that has them; arrays [L].

    Attributes:
      due: whether anything does.
      merged: int32, the busier one of the two idlest experts, which becomes both.
      freed: int32, the idlest one, whose place gets a copy.
      split: int32, the busiest one, which is copied.
      share: float32, weight of ``merged`` in what becomes of it; ``freed`` has the rest.
      loads: float32 [L, 3], of ``merged``, ``freed`` and ``split`` before, as multiples of the fair share.
    """

    due: Array
    merged: Array
    freed: Array
    split: Array
    share: Array
    loads: Array


class _Experts(NamedTuple):
    """Where a weight [L, ...] has a part for each expert: along which axis, and the shape of the whole."""

    axis: int
    shape: tuple[int, ...]


def rebalances(config: TrainConfig, step: int) -> bool:
    """Whether experts may be split after this step: a run that does all its steps ends without twins."""
    c = config.model.moe
    if c.rebalance_interval is None:
        return False
    return step % c.rebalance_interval == 0 and step + c.twin_steps <= config.steps


def compiled_rebalance(
    config: TrainConfig, model: ByteTransformer, shapes: TrainState, say: Callable[[str], None]
) -> Callable[[TrainState], tuple[TrainState, Moves]] | None:
    """:func:`make_rebalance` as a program that overwrites its argument; None where no experts are ever split.

    ``say`` is told where the settings ask for splits, and leave no step for any.

    Raises:
      ValueError: as there.
    """
    c = config.model.moe
    if c.rebalance_interval is None:
        return None
    if c.rebalance_interval + c.twin_steps > config.steps:
        say(
            f"warning: model.moe.rebalance_interval={c.rebalance_interval} and twin_steps={c.twin_steps} do not fit "
            f"into steps={config.steps}: no expert is split"
        )
    rebalance = make_rebalance(model)
    jax.eval_shape(rebalance, shapes)
    return jax.jit(rebalance, donate_argnums=0, out_shardings=(shardings(shapes), None))


def make_rebalance(model: ByteTransformer) -> Callable[[TrainState], tuple[TrainState, Moves]]:
    """The function from a state to that before the next step, to be jitted with the state donated.

    In each layer whose two idlest experts have loads below ``merge_below``, and whose busiest one has one above
    ``split_above``, the idle ones become one, by a mean with the loads as weights, and the other place gets a copy of
    the busiest. Weights, columns of the router, their average, and what the optimizer keeps of them go the same way. A
    layer in which twins still exclude each other waits.

    A copy changes no token's output: for ``twin_steps`` steps tokens at even positions see the one half and those at
    odd ones the other, see :func:`model.state.router.hidden_twins`.

    Raises:
      ValueError: while it is traced, where the optimizer keeps of a weight something in another shape.
    """
    config = model.config
    experts = _expert_weights(model)

    def rebalance(state: TrainState) -> tuple[TrainState, Moves]:
        moves = plan(config, tracked_of(config, state.frozen))
        params, frozen, ema, opt_state = (
            _moved(config, experts, tree, moves) for tree in (state.params, state.frozen, state.ema, state.opt_state)
        )
        frozen = with_tracked(config, frozen, moves, lambda tracked, moves: _tracked(config, tracked, moves))
        after = TrainState(state.step, params, opt_state, ema, frozen, state.carried, state.loss_scale)
        return after, moves

    return rebalance


def plan(config: ByteConfig, tracked: Params) -> Moves:
    """What is to happen, by the running means of loads [L, E]."""
    c, loads_LE = config.moe, tracked["load"] * config.moe.num_experts
    order_LE = jnp.argsort(loads_LE, axis=1, stable=True).astype(jnp.int32)
    freed, merged, split = order_LE[:, 0], order_LE[:, 1], jnp.argmax(loads_LE, axis=1).astype(jnp.int32)
    loads_L3 = jnp.take_along_axis(loads_LE, jnp.stack([merged, freed, split], axis=1), axis=1)
    waits = jnp.any(tracked[TWIN_STEPS] > 0, axis=1)
    due = (loads_L3[:, 0] < c.merge_below) & (loads_L3[:, 2] > c.split_above) & ~waits
    both = loads_L3[:, 0] + loads_L3[:, 1]
    share = jnp.where(both > _TINY, loads_L3[:, 0] / jnp.maximum(both, _TINY), 0.5)
    return Moves(due, merged, freed, split, share, loads_L3)


def tell(config: ByteConfig, step: int, moves: Moves) -> list[str]:
    """A line for each layer in which an expert was split."""
    due, merged, freed, split, _, loads = (np.asarray(x) for x in moves)
    return [
        f"step {step}: layer {layer}: expert {split[i]} split into {split[i]} and {freed[i]} ({loads[i, 2]:.2f} times "
        f"its fair load), {freed[i]} merged into {merged[i]} ({loads[i, 1]:.2f} and {loads[i, 0]:.2f})"
        for i, layer in enumerate(config.moe_layers)
        if due[i]
    ]


def _expert_weights(model: ByteTransformer) -> dict[tuple[str, ...], _Experts]:
    """The weights that have a part for each expert, by path."""
    uses = jax.tree_util.tree_leaves_with_path(param_uses(model), is_leaf=lambda x: isinstance(x, WeightUse))
    shapes = jax.tree.leaves(param_shapes(model))
    found = {}
    for (path, use), shape in zip(uses, shapes, strict=True):
        axis = next((i for i, name in enumerate(use.axes) if name in ("experts", "routed")), None)
        if axis is not None and not use.tracked:
            found[names_of(path)] = _Experts(axis, shape.shape)
    return found


def _moved(config: ByteConfig, experts: dict[tuple[str, ...], _Experts], tree: Any, moves: Moves) -> Any:
    """A tree of weights, or of an optimizer that keeps such trees, with experts moved.

    By paths, since optax.tree.map_params does not know the optimizers that treat parts of the weights differently.
    """
    stacks = moe_stacks(config)

    def moved(path: tuple[Any, ...], leaf: Array) -> Array:
        names = names_of(path)
        weight = next((names[i:] for i in range(len(names)) if names[i:] in experts), None)
        if weight is None or leaf.size <= 1:  # optax has one number where a rule keeps nothing of a weight
            return leaf
        axis, shape = experts[weight]
        if leaf.shape != shape or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"moe.rebalance_interval: the optimizer keeps {leaf.dtype} {list(leaf.shape)} of {'/'.join(weight)} "
                f"{list(shape)}, where experts cannot be told apart: set another optimizer.name, or leave it out"
            )
        rows = stacks[weight[weight.index("layers") + 1]]
        return _move(leaf, axis, jax.tree.map(lambda x: x[rows], moves))

    return jax.tree_util.tree_map_with_path(moved, tree)


def _move(x: Array, axis: int, moves: Moves) -> Array:
    """Experts along an axis of an array [L, ...]: a mean at ``merged``, a copy of ``split`` at ``freed``."""

    def of_layer(x_E: Array, moves: Moves) -> Array:
        share = moves.share.astype(x_E.dtype)
        mean = share * x_E[moves.merged] + (1 - share) * x_E[moves.freed]
        after_E = x_E.at[moves.merged].set(mean).at[moves.freed].set(x_E[moves.split])
        return jnp.where(moves.due, after_E, x_E)

    return jnp.moveaxis(jax.vmap(of_layer)(jnp.moveaxis(x, axis, 1), moves), 1, axis)


def _tracked(config: ByteConfig, tracked: Params, moves: Moves) -> Params:
    """What routers keep, likewise: a copy has what its original has, and loads are shared out between the two."""
    L, E = tracked["load"].shape
    layers = jnp.arange(L, dtype=jnp.int32)
    due_L1 = moves.due[:, None]
    after = {}
    for name, x in tracked.items():
        if name in (TWIN, TWIN_STEPS) or x.ndim == 1:
            after[name] = x
        elif name in _SHARED:
            merged = x[layers, moves.merged] + x[layers, moves.freed]
            half = x[layers, moves.split] / 2
            new_LE = x.at[layers, moves.merged].set(merged)
            new_LE = new_LE.at[layers, moves.freed].set(half).at[layers, moves.split].set(half)
            after[name] = jnp.where(due_L1, new_LE, x)
        else:
            after[name] = _move(x, 1, moves)
    own_LE = jnp.broadcast_to(jnp.arange(E, dtype=jnp.float32), (L, E))
    twin_LE = own_LE.at[layers, moves.freed].set(moves.split.astype(jnp.float32))
    twin_LE = twin_LE.at[layers, moves.split].set(moves.freed.astype(jnp.float32))
    steps_LE = jnp.where(twin_LE == own_LE, 0.0, float(config.moe.twin_steps))
    after[TWIN] = jnp.where(due_L1, twin_LE, tracked[TWIN])
    after[TWIN_STEPS] = jnp.where(due_L1, steps_LE, tracked[TWIN_STEPS])
    return after
