"""The language-model loss. Labels are shifted here and nowhere else.

B batch, T positions.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from stellarbyte_jax.config import ByteConfig, LossConfig
from stellarbyte_jax.model.decoder import ByteTransformer, head_kernel
from stellarbyte_jax.model.memory import Memory
from stellarbyte_jax.model.positions import initial_rates
from stellarbyte_jax.ops.cross_entropy import linear_cross_entropy

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
    params: dict[str, Any],
    batch: Mapping[str, jax.Array],
    loss: LossConfig,
    *,
    max_segments: int | None = None,
    dropout_key: jax.Array | None = None,
    memory: Memory | None = None,
) -> tuple[jax.Array, dict[str, jax.Array], Memory | None]:
    """The loss of a batch, with the memory of its rows where the model has one.

    Returns:
      The sum of the loss over the batch's targets, sums for reporting as ``linear_cross_entropy`` gives them, and the
      memory after the batch.
    """
    applied: Any = model.apply(
        {"params": params},
        batch["tokens"],
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
        max_segments=max_segments,
        deterministic=dropout_key is None,
        head=False,
        memory=memory,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    hidden_BTD, memory = (applied, None) if memory is None else applied
    kernel_DV = head_kernel(model.config, params).astype(hidden_BTD.dtype)
    total, sums = linear_cross_entropy(
        hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
        kernel_DV,
        next_token_targets(batch).reshape(-1),
        label_smoothing=loss.label_smoothing,
        z_loss=loss.z_loss,
        vocab_size=model.config.vocab_size,
    )
    return total, sums, memory


def xpos_penalty(config: ByteConfig, params: dict[str, Any]) -> jax.Array:
    """Mean squared distance of the learned XPos rates to those that they began with."""
    begin_P = initial_rates(config)
    rates = [layer["attn"]["xpos_rate"] for layer in params["layers"].values()]
    return jnp.mean(jnp.stack([jnp.mean(jnp.square(rate_RP - begin_P[None])) for rate_RP in rates]))
