"""The state of a run to and from checkpoints."""

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stellarbyte_jax.checkpoint.compatibility import check_resumable
from stellarbyte_jax.checkpoint.source import read_base
from stellarbyte_jax.checkpoint.store import BASE, Checkpointer, CheckpointError, StoredStep
from stellarbyte_jax.checkpoint.weights import stored_steps
from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.config.foreign import listed
from stellarbyte_jax.lora import as_base, kept_elsewhere
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.io import State
from stellarbyte_jax.model.trees import Params, merge, partition, paths
from stellarbyte_jax.training.loss_scale import LossScale
from stellarbyte_jax.training.meter import diverged
from stellarbyte_jax.training.placement import put, shardings
from stellarbyte_jax.training.state import TrainState
from stellarbyte_jax.training.step import all_finite


@dataclass
class Progress:
    """What a run remembers besides its state, and keeps in every checkpoint.

    Attributes:
      best_loss: the least validation loss so far.
      stale: validations since then without a better one.
      unvalidated: a validation that was due after the last step was not finished.
      validated: step of the last validation.
      validation: what that was measured on.
      last_loss: that validation's loss; None where it was not finite, or a version wrote this that did not keep it.
      seconds: of training, over all starts, without steps that a kill lost; None: an older version began the run, and
        did not count.
      tokens: that were trained on, without padding, over all starts; None likewise.
    """

    best_loss: float | None = None
    stale: int = 0
    unvalidated: bool = False
    validated: int | None = None
    validation: dict[str, Any] | None = None
    last_loss: float | None = None
    seconds: float | None = 0.0
    tokens: int | None = 0

    def measured(self, step: int, loss: float, on: dict[str, Any]) -> None:
        """Counts a validation loss; ``stale`` is 0 where it is the best so far."""
        better = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        self.best_loss, self.stale = (loss, 0) if better else (self.best_loss, self.stale + 1)
        self.unvalidated, self.validated, self.validation = False, step, on
        self.last_loss = loss if math.isfinite(loss) else None

    def loss_at(self, step: int) -> float | None:
        """The validation loss of the weights after this step; None where it is not known."""
        return self.last_loss if self.validated == step else None

    def exhausted(self, patience: int | None) -> bool:
        """Whether there were so many validations without a better one that the run is over."""
        return patience is not None and self.stale >= patience


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on.

    Attributes:
      state: of the last step.
      progress: of the run.
      data: place of the loader; None where only foreign weights were found, at step 0.
      settings: to record from now on.
      base: of adapters, what is recorded of the weights that they belong to; None without adapters.
    """

    state: TrainState
    progress: Progress
    data: dict[str, Any] | None
    settings: TrainConfig
    base: dict[str, Any] | None = None


def save(
    checkpointer: Checkpointer,
    config: TrainConfig,
    state: TrainState,
    step: int,
    data: dict[str, Any],
    progress: Progress,
    validation_loss: float | None = None,
    base: dict[str, Any] | None = None,
) -> None:
    """Writes a checkpoint in the background; ``data`` is the loader's place after this step.

    With a ``base`` frozen weights, which lie there, are left out.

    Raises:
      CheckpointError: this save or the one before it failed; earlier checkpoints are untouched.
      DivergedError: the state is not finite; nothing is written.
    """
    arrays: dict[str, Any] = {
        "params": state.params,
        "optimizer": {"step": state.step, "opt_state": state.opt_state},
        **_optional(config, state),
    }
    facts = {
        "config": config.to_dict(),
        "data": {"loader": data, **asdict(progress)},
    }
    if base is not None:
        facts[BASE] = base
    poisoned = _poisoned(arrays)
    if poisoned:
        raise diverged(f"{' and '.join(poisoned)} of the run's state hold numbers that are not finite", step)
    checkpointer.save(step, arrays, facts, frozen=paths(state.frozen), validation_loss=validation_loss)


def may_be_over(config: TrainConfig) -> bool:
    """Whether the run in ``output_dir`` may have no step left, as far as the names of its checkpoints tell."""
    steps = stored_steps(config.output_dir)
    return bool(steps) and (steps[-1] >= config.steps or config.evaluation.patience is not None)


def restore(
    checkpointer: Checkpointer,
    config: TrainConfig,
    shapes: TrainState,
    optimizer: optax.GradientTransformation,
    say: Callable[[str], None],
    tokenizer: str | None = None,
) -> Resumed | None:
    """The newest readable state, or None where there is no checkpoint.

    From a checkpoint without optimizer state only weights come back, and training begins with them at step 0. One that
    holds numbers that are not finite is taken for unreadable. ``tokenizer`` is the directory of the tokenizer that the
    settings name; None: they name a directory.

    Raises:
      CheckpointError: all checkpoints are unreadable, or they belong to other settings.
    """

    def read(stored: StoredStep) -> Resumed:
        initial = not stored.has("optimizer")
        recorded = check_resumable(stored.json("config"), config, stored.path, initial, say, tokenizer)
        if initial:
            return begin_with(stored.arrays({"params": shapes.weights})["params"], recorded, shapes, optimizer)
        return _whole(stored, shapes, recorded, config.init_from)

    return checkpointer.restore(read, say)


def begin_with(
    weights: Params, config: TrainConfig, shapes: TrainState, optimizer: optax.GradientTransformation
) -> Resumed:
    """The state before the first step, with these weights and a fresh optimizer.

    On a mesh, weights that lie in their parts already stay where they are; the others are put there.

    Raises:
      FloatingPointError: a weight is not finite.
    """
    trained = set(paths(shapes.params))
    params, frozen = partition(weights, lambda path: "/".join(path) in trained)
    if (places := shardings(shapes)) is not None:
        params, frozen = jax.tree.map(put, (params, frozen), (places.params, places.frozen))
    _finite({"params": merge(params, frozen)})
    average = None
    if shapes.ema is not None:
        average = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings(shapes.ema))(params)
    state = TrainState(
        step=jnp.zeros((), jnp.int32, device=shardings(shapes.step)),
        params=params,
        opt_state=jax.jit(optimizer.init, out_shardings=shardings(shapes.opt_state))(params),
        ema=average,
        frozen=frozen,
        carried=first_carried(config, shapes),
        loss_scale=_first_scale(config, shapes),
    )
    return Resumed(state, Progress(), None, config)


def first_carried(config: TrainConfig, shapes: TrainState) -> State:
    """What is carried from batch to batch before the first one, made where ``shapes`` have it."""
    initial = functools.partial(State.initial, config.model, config.global_batch_size)
    return jax.jit(initial, out_shardings=shardings(shapes.carried))()


def _first_scale(config: TrainConfig, shapes: TrainState) -> LossScale | None:
    return jax.jit(lambda: LossScale.initial(config), out_shardings=shardings(shapes.loss_scale))()


def _whole(stored: StoredStep, shapes: TrainState, settings: TrainConfig, init_from: str | None = None) -> Resumed:
    differ = sorted(set(stored.frozen_paths) ^ set(paths(shapes.frozen)))
    if differ:
        raise CheckpointError(
            f"{stored.path} cannot be continued: {listed(differ)} is frozen there or here alone. Use the same "
            "settings, or another output_dir"
        )
    optimizer = {"step": shapes.step, "opt_state": shapes.opt_state}
    wanted = {"params": shapes.params, "optimizer": optimizer, **_optional(settings, shapes)}
    if not stored.has("loss_scale"):  # of a run that began with another compute dtype
        wanted.pop("loss_scale", None)
    found = _finite(stored.arrays(wanted))
    frozen, base = found.get("frozen", {}), None
    if settings.model.lora.r:
        weights, base = read_base(stored.json(BASE), str(stored.path), init_from)
        frozen = merge(frozen, _frozen_base(weights, settings, shapes))
    carried = {name: _with_empty_leaves(found[name], part) for name, part in shapes.carried.parts().items()}
    state = TrainState(
        step=found["optimizer"]["step"],
        params=found["params"],
        opt_state=found["optimizer"]["opt_state"],
        ema=found.get("ema"),
        frozen=frozen,
        carried=State(**carried),
        loss_scale=found.get("loss_scale") or _first_scale(settings, shapes),
    )
    data = stored.json("data")
    validated = stored.step if stored.has("metrics") else None  # as far as older ones tell
    progress = Progress(
        best_loss=data["best_loss"],
        stale=data["stale"],
        unvalidated=data.get("unvalidated", False),
        validated=data.get("validated", validated),
        validation=data.get("validation"),
        last_loss=data.get("last_loss"),
        seconds=data.get("seconds"),
        tokens=data.get("tokens"),
    )
    return Resumed(state, progress, data["loader"], settings, base)


def _frozen_base(weights: Params, config: TrainConfig, shapes: TrainState) -> Params:
    """The frozen weights of a base as a state has them, where the state has them."""
    model = ByteTransformer(config.model)
    frozen, _ = partition(weights, kept_elsewhere(model))
    frozen = as_base(model, frozen)
    wanted, _ = partition(shapes.frozen, kept_elsewhere(model))
    if (places := shardings(wanted)) is not None:
        return jax.tree.map(put, frozen, places)
    return jax.tree.map(jnp.copy, frozen)  # arrays in the memory of numpy are no place for a step to write into


def _finite(items: dict[str, Any]) -> dict[str, Any]:
    """The items; FloatingPointError where one holds a number that is not finite."""
    poisoned = _poisoned(items)
    if poisoned:
        raise FloatingPointError(f"{', '.join(poisoned)} of it hold numbers that are not finite")
    return items


def _poisoned(items: dict[str, Any]) -> list[str]:
    return [name for name, tree in items.items() if not jax.jit(all_finite)(tree)]


def _optional(config: TrainConfig, state: TrainState) -> dict[str, Any]:
    """The items that not every run has."""
    _, kept = partition(state.frozen, kept_elsewhere(ByteTransformer(config.model)))
    items = {"frozen": kept, "ema": state.ema, "loss_scale": state.loss_scale}
    items |= {name: _without_empty_leaves(part) for name, part in state.carried.parts().items()}
    return {name: tree for name, tree in items.items() if tree}


def _without_empty_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by number: zero-size arrays cannot be stored (layers without memory)."""
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(tree)) if math.prod(leaf.shape)}


def _with_empty_leaves(found: dict[str, Any], shapes: Any) -> Any:
    leaves, tree = jax.tree.flatten(shapes)
    filled = [
        found[str(i)] if str(i) in found else jnp.zeros(s.shape, s.dtype, device=shardings(s))
        for i, s in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, filled)
