"""What a training run carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from stellarbyte_jax.config import ByteConfig, TrainConfig
from stellarbyte_jax.model.decoder import ByteTransformer, init_params
from stellarbyte_jax.model.memory import Memory


@struct.dataclass
class TrainState:
    """Everything that a step changes. Randomness is a function of the seed and the step, so no key is kept.

    Attributes:
      step: optimizer steps done, int32.
      params: float32 weights.
      opt_state: state of the optax optimizer.
      ema: exponential moving average of the weights, or None.
      memory: segment memory of the batch's rows, or None where the model has none.
    """

    step: jax.Array
    params: dict[str, Any]
    opt_state: Any
    ema: dict[str, Any] | None
    memory: Memory | None = None


def create_state(config: TrainConfig, model: ByteTransformer, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    params = init_params(model, jax.random.key(config.seed))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=None if config.ema_decay is None else jax.tree.map(jnp.copy, params),
        memory=empty_memory(config.model, config.global_batch_size),
    )


def empty_memory(config: ByteConfig, rows: int) -> Memory | None:
    """The memory before the first batch, where the model has one."""
    return Memory.create(config, rows) if config.has_memory else None


def state_shapes(config: TrainConfig, model: ByteTransformer, optimizer: optax.GradientTransformation) -> TrainState:
    """The state as ``jax.ShapeDtypeStruct`` leaves. Computes nothing."""
    return jax.eval_shape(lambda: create_state(config, model, optimizer))
