"""The language-model loss. Labels are shifted here and nowhere else.

B batch, T positions.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from stellarbyte_jax.config import LossConfig
from stellarbyte_jax.model.decoder import ByteTransformer, Params, forward, head_factors
from stellarbyte_jax.model.io import Aux, Inputs, Output, State
from stellarbyte_jax.sharding import axis_size
from stellarbyte_jax.sharding.cross_entropy import linear_cross_entropy, token_losses
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


REPLIES = 4  # of which validation tells the loss, each by itself; the last stands for those after it too


def reply_of_target(batch: Mapping[str, jax.Array]) -> jax.Array:
    """For each position which reply the token belongs to that is to be predicted there, int32 [B, T]; 0: to none."""
    return jnp.pad(batch["replies"][:, 1:], ((0, 0), (0, 1)))


def target_weights(batch: Mapping[str, jax.Array], prompt_weight: float) -> jax.Array | None:
    """How much each target counts, float32 [B, T]; None where all count 1.

    Targets that no reply holds, which a batch has only where they count, count ``prompt_weight``.
    """
    if "replies" not in batch or not prompt_weight:
        return None
    return jnp.where(reply_of_target(batch) > 0, 1.0, jnp.float32(prompt_weight))


def count_targets(batch: Mapping[str, jax.Array], prompt_weight: float = 0.0) -> jax.Array:
    """How much all targets count together, float32."""
    counted_BT = next_token_targets(batch) >= 0
    weights_BT = target_weights(batch, prompt_weight)
    if weights_BT is None:
        return jnp.sum(counted_BT).astype(jnp.float32)
    return jnp.sum(jnp.where(counted_BT, weights_BT, 0.0))


def batch_loss(
    model: ByteTransformer,
    params: Params,
    batch: Mapping[str, jax.Array],
    loss: LossConfig,
    *,
    prompt_weight: float = 0.0,
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
      prompt_weight: of targets that no reply of a conversation holds, see :func:`target_weights`.
      max_segments: static upper bound on the documents of a row.
      dropout_key: of a call of training with dropout.
      train: whether it is a call of training.
      state: what the model carries from batch to batch.

    Returns:
      The sum of the loss over the batch's targets, sums for reporting as ``linear_cross_entropy`` gives them (of
      conversations, outside of training, those of each reply too, see :func:`by_reply`), and the model's output, with
      the state after the batch and the losses of its layers.
    """
    targets_BT = next_token_targets(batch)
    weights_BT = target_weights(batch, prompt_weight)
    replies_BT = reply_of_target(batch) if "replies" in batch and not train else None
    rows_1T = None
    if (devices := axis_size((AXIS,))) > 1:
        order = dealt_order(targets_BT.shape[1], devices)
        batch = {name: x[:, order] for name, x in batch.items()}
        targets_BT, rows_1T = targets_BT[:, order], jnp.asarray(order)[None]
        weights_BT, replies_BT = jax.tree.map(lambda x: x[:, order], (weights_BT, replies_BT))
    inputs = Inputs(
        batch["tokens"],
        batch.get("positions"),
        batch.get("segment_ids"),
        rows_1T=rows_1T,
        max_segments=max_segments,
    )
    out = forward(model, params, inputs, state, dropout_key=dropout_key, train=train)
    kernel_DV, low_rank = head_factors(model, params, out.hidden_BTD, dropout_key=dropout_key)
    low = None if low_rank is None else (low_rank.h, low_rank.b)
    if replies_BT is not None:
        losses_2BT = token_losses(out.hidden_BTD, kernel_DV, targets_BT, low=low, vocab_size=model.config.vocab_size)
        sums = by_reply(losses_2BT, targets_BT, replies_BT)
        return sums["cross_entropy"], sums, out
    total, sums = linear_cross_entropy(
        out.hidden_BTD,
        kernel_DV,
        targets_BT,
        weights_BT,
        low=low,
        label_smoothing=loss.label_smoothing,
        z_loss=loss.z_loss,
        vocab_size=model.config.vocab_size,
        tied=model.config.tie_word_embeddings,
        implementation=loss.implementation,
    )
    return total, sums, out


def by_reply(losses_2BT: jax.Array, targets_BT: jax.Array, replies_BT: jax.Array) -> dict[str, jax.Array]:
    """Sums of cross-entropy, hits and targets, and ``reply_losses`` and ``reply_tokens`` [REPLIES] of them by reply."""
    counted_BT = (targets_BT >= 0).astype(jnp.float32)
    number_BT = jnp.minimum(replies_BT, REPLIES)
    mine_KBT = (number_BT[None] == 1 + jnp.arange(REPLIES, dtype=jnp.int32)[:, None, None]).astype(jnp.float32)
    return {
        "cross_entropy": jnp.sum(losses_2BT[0]),
        "correct": jnp.sum(losses_2BT[1]),
        "tokens": jnp.sum(counted_BT),
        "reply_losses": jnp.sum(mine_KBT * losses_2BT[:1], axis=(1, 2)),
        "reply_tokens": jnp.sum(mine_KBT * counted_BT[None], axis=(1, 2)),
    }


def auxiliary_loss(loss: LossConfig, aux: Aux) -> jax.Array:
    """The layers' losses, each with the weight that the field of ``loss`` of the same name gives it."""
    weights = {name: getattr(loss, name) for name in aux.losses}
    terms = [weights[name] * mean.value for name, mean in aux.losses.items() if weights[name]]
    return sum(terms, jnp.zeros((), jnp.float32))
