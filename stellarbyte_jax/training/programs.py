"""The compiled programs of a run, besides those of validation and of splitting experts."""

from collections.abc import Callable

import jax
import optax

from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.training.placement import replicated, shardings
from stellarbyte_jax.training.state import TrainState, create_state
from stellarbyte_jax.training.step import Batch, make_train_step


def compiled_create_state(
    config: TrainConfig, model: ByteTransformer, optimizer: optax.GradientTransformation, shapes: TrainState
) -> Callable[[], TrainState]:
    """The compiled ``state.create_state`` of a run; each array is made where ``shapes`` have it."""
    return jax.jit(lambda: create_state(config, model, optimizer), out_shardings=shardings(shapes))


def compiled_train_step(
    config: TrainConfig,
    model: ByteTransformer,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    shapes: TrainState,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The compiled ``step.make_train_step`` of a run, which writes the next state in the place of the one given."""
    return jax.jit(
        make_train_step(config, model, optimizer, schedule),
        donate_argnums=0,
        out_shardings=(shardings(shapes), replicated()),
    )
