"""The language-model loss. Labels are shifted here and nowhere else.

B batch, T positions.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from stellarbyte_jax.config import LossConfig
from stellarbyte_jax.model.decoder import ByteTransformer, Params, forward, head_kernel
from stellarbyte_jax.model.io import Aux, Inputs, Output, State
from stellarbyte_jax.sharding import axis_size
from stellarbyte_jax.sharding.cross_entropy import linear_cross_entropy
from stellarbyte_jax.sharding.ring import AXIS, dealt_order

IGNORED = -100  # the label of a token that is not to be predicted, as in Hugging Face


def next_token_targets(batch: Mapping[str, jax.Array]) -> jax.Array:
    """For each position the token to predict there, int32 [B, T]; -1 where nothing is to be predicted.

    The target of position t is the label of t + 1, if both belong to one document. Labels are ``batch["labels"]``
    where given (with -100 for tokens outside the loss), else the tokens under ``batch["loss_mask"]``.
    """
    labels_BT = batch.get("labels")
    if labels_BT is None:
        labels_BT = batch["tokens"]
        if "loss_mask" in batch:
            labels_BT = jnp.where(batch["loss_mask"], labels_BT, IGNORED)
    shifted_BT = jnp.pad(labels_BT[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    if "segment_ids" in batch:
        segments_BT = batch["segment_ids"]
        next_BT = jnp.pad(segments_BT[:, 1:], ((0, 0), (0, 1)), constant_values=0)
        shifted_BT = jnp.where((segments_BT == next_BT) & (segments_BT > 0), shifted_BT, IGNORED)
    return jnp.maximum(shifted_BT, -1)


def batch_loss(
    model: ByteTransformer,
    params: Params,
    batch: Mapping[str, jax.Array],
    loss: LossConfig,
    *,
    max_segments: int | None = None,
    dropout_key: jax.Array | None = None,
    train: bool = False,
    state: State | None = None,
) -> tuple[jax.Array, dict[str, jax.Array], Output]:
    """The loss of a batch.

    Args:
      model: the network.
      params: its weights.
      batch: tokens [B, T] and what belongs to them.
      loss: what is minimised.
      max_segments: static upper bound on the documents of a row.
      dropout_key: of a call of training with dropout.
      train: whether it is a call of training.
      state: what the model carries from batch to batch.

    Returns:
      The sum of the loss over the batch's targets, sums for reporting as ``linear_cross_entropy`` gives them, and the
      model's output, with the state after the batch and the losses of its layers.
    """
    targets_BT = next_token_targets(batch)
    rows_1T = None
    if (devices := axis_size((AXIS,))) > 1:
        order = dealt_order(targets_BT.shape[1], devices)
        batch = {name: x[:, order] for name, x in batch.items()}
        targets_BT, rows_1T = targets_BT[:, order], jnp.asarray(order)[None]
    inputs = Inputs(
        batch["tokens"],
        batch.get("positions"),
        batch.get("segment_ids"),
        rows_1T=rows_1T,
        max_segments=max_segments,
    )
    out = forward(model, params, inputs, state, dropout_key=dropout_key, train=train)
    total, sums = linear_cross_entropy(
        out.hidden_BTD,
        head_kernel(model, params),
        targets_BT,
        label_smoothing=loss.label_smoothing,
        z_loss=loss.z_loss,
        vocab_size=model.config.vocab_size,
    )
    return total, sums, out


def auxiliary_loss(loss: LossConfig, aux: Aux) -> jax.Array:
    """The layers' losses, each with the weight that the field of ``loss`` of the same name gives it."""
    weights = {name: getattr(loss, name) for name in aux.losses}
    terms = [weights[name] * mean.value for name, mean in aux.losses.items() if weights[name]]
    return sum(terms, jnp.zeros((), jnp.float32))
