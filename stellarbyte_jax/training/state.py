"""What a training run carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array

from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.lora import as_base
from stellarbyte_jax.model.decoder import ByteTransformer, init_params, param_shapes, trained
from stellarbyte_jax.model.io import State
from stellarbyte_jax.model.trees import IsTrainable, Params, all_trainable, merge, partition
from stellarbyte_jax.training.loss_scale import LossScale


@struct.dataclass
class TrainState:
    """Everything that a step changes. Randomness is a function of the seed and the step, so no key is kept.

    Attributes:
      step: optimizer steps done, int32.
      params: float32 weights that are trained.
      opt_state: state of the optax optimizer, of these weights alone.
      ema: exponential moving average of these weights, or None.
      frozen: weights that are only read, in the dtype that they were loaded in; and what routers keep.
      carried: what the model carries from batch to batch: segment memory where it has any.
      loss_scale: what loss scaling carries; None where the compute dtype needs none.
    """

    step: Array
    params: Params
    opt_state: Any
    ema: Params | None
    frozen: Params
    carried: State
    loss_scale: LossScale | None = None

    @property
    def weights(self) -> Params:
        """All weights as they are trained."""
        return merge(self.params, self.frozen)

    @property
    def averaged(self) -> Params:
        """All weights as they are validated and exported: the average, where one is kept."""
        return merge(self.params if self.ema is None else self.ema, self.frozen)


def create_state(
    config: TrainConfig,
    model: ByteTransformer,
    optimizer: optax.GradientTransformation,
    is_trainable: IsTrainable = all_trainable,
) -> TrainState:
    """The state before the first step."""
    return _with_weights(init_params(model, jax.random.key(config.seed)), config, model, optimizer, is_trainable)


def state_shapes(
    config: TrainConfig,
    model: ByteTransformer,
    optimizer: optax.GradientTransformation,
    is_trainable: IsTrainable = all_trainable,
) -> TrainState:
    """The state as ``jax.ShapeDtypeStruct`` leaves. Computes nothing."""
    return jax.eval_shape(
        lambda weights: _with_weights(weights, config, model, optimizer, is_trainable), param_shapes(model)
    )


def _with_weights(
    weights: Params,
    config: TrainConfig,
    model: ByteTransformer,
    optimizer: optax.GradientTransformation,
    is_trainable: IsTrainable,
) -> TrainState:
    params, frozen = partition(weights, trained(model, is_trainable))
    frozen = as_base(model, frozen)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=None if config.ema_decay is None else jax.tree.map(jnp.copy, params),
        frozen=frozen,
        carried=State.initial(config.model, config.global_batch_size),
        loss_scale=LossScale.initial(config),
    )
