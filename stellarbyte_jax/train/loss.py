"""The language-model loss. Labels are shifted here and nowhere else.

B batch, T positions.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from stellarbyte_jax.config import LossConfig
from stellarbyte_jax.model.decoder import ByteTransformer, head_kernel
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
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum of the loss over the batch's targets, and sums for reporting as ``linear_cross_entropy`` gives them."""
    hidden_BTD: Any = model.apply(
        {"params": params},
        batch["tokens"],
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
        max_segments=max_segments,
        deterministic=dropout_key is None,
        head=False,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    kernel_DV = head_kernel(model.config, params).astype(hidden_BTD.dtype)
    return linear_cross_entropy(
        hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
        kernel_DV,
        next_token_targets(batch).reshape(-1),
        label_smoothing=loss.label_smoothing,
        z_loss=loss.z_loss,
    )
