"""One optimizer step and one validation step, as pure functions."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stellarbyte_jax.config import LossConfig, TrainConfig
from stellarbyte_jax.lora import mean_square_change
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.io import State
from stellarbyte_jax.model.state.router import RouterState, Tally, advance, tracked_loads
from stellarbyte_jax.model.trees import Params, merge
from stellarbyte_jax.training.loss import auxiliary_loss, batch_loss, count_targets, next_token_targets
from stellarbyte_jax.training.state import TrainState
from stellarbyte_jax.training.telemetry import router_metrics, with_router_names

Batch = Mapping[str, jax.Array]


def make_train_step(
    config: TrainConfig, model: ByteTransformer, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The function from state and batch to the next state and metrics, to be jitted with the state donated.

    The loss is the mean over the targets of the whole batch. With accumulation the batch is cut into equal parts
    whose sums are added before the division, so the result is that of the large batch; losses and statistics of the
    layers are means over the parts that hold text. Gradients are taken of the trainable weights alone.

    Where the loss or the gradient is not finite, weights, optimizer and average stay as they are. ``metrics["finite"]``
    says whether these and the new weights are finite. The optimizer's state is looked at when it is saved, since its
    squares are finite where the gradient's norm is. With a loss scale, gradients that are not finite alone leave the
    step out as long as the factor can be halved; ``gradient_norm`` is 0 then, and the learning rate that of the steps
    that were done.
    """
    parts = config.gradient_accumulation_steps
    max_segments = config.data.max_documents_per_sequence + 1  # padding counts as one more
    m = config.model
    prompt_weight = config.data.chat.prompt_weight

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        counted = count_targets(batch, prompt_weight)
        tokens = jnp.where(counted > 0, counted, 1.0)
        step_key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
        scale = state.loss_scale

        def gradients(part: Batch, carried: State, index: jax.Array, share: jax.Array, router: RouterState | None):
            key = jax.random.fold_in(step_key, index) if m.is_random else None

            def mean_loss(params: Params):
                weights = merge(params, state.frozen)
                total, sums, out = batch_loss(
                    model,
                    weights,
                    part,
                    config.loss,
                    prompt_weight=prompt_weight,
                    max_segments=max_segments,
                    dropout_key=key,
                    train=True,
                    state=carried.replace(router=router),  # type: ignore[attr-defined]
                )
                loss = total / tokens + share * auxiliary_loss(config.loss, out.aux)
                if m.lora.regularization:
                    loss += share * m.lora.regularization * mean_square_change(model, weights)
                scaled = loss if scale is None else loss * scale.factor
                return scaled, (loss, sums, jax.tree.map(lambda x: share * x, out.aux), out.state)

            (_, (loss, sums, aux, after)), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
            return (loss, sums, aux, grads), after.replace(router=None), after.router

        router = RouterState(tally=Tally.zero(m)) if m.moe_layers else None
        if parts == 1:
            (loss, sums, aux, grads), carried, router = gradients(
                batch, state.carried, jnp.zeros((), jnp.int32), jnp.ones(()), router
            )
        else:

            def add(carry: Any, part: Any):
                total, router = carry
                rows, rows_state, index, share = part
                new, after, router = gradients(rows, rows_state, index, share, router)
                return (jax.tree.map(jnp.add, total, new), router), after

            cut, numbers = cut_rows(batch, parts), jnp.arange(parts, dtype=jnp.int32)
            given = (cut, state.carried.split(parts), numbers, shares_of(cut, parts))
            shapes, _, _ = jax.eval_shape(gradients, *jax.tree.map(lambda x: x[0], given), router)
            zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            ((loss, sums, aux, grads), router), carried = jax.lax.scan(add, (zero, router), given)
            carried = carried.joined()

        if scale is not None:
            factor = scale.factor
            grads = jax.tree.map(lambda gradient: gradient / factor, grads)
        gradient_norm = optax.tree.norm(grads)
        sound = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        done, tolerated, scaling = state.step, jnp.zeros((), bool), {}
        if scale is not None:
            overflow = jnp.isfinite(loss) & ~jnp.isfinite(gradient_norm)
            tolerated, done = overflow & ~scale.is_least, state.step - scale.skipped
            gradient_norm = jnp.where(tolerated, 0.0, gradient_norm)
            scaling = {"loss_scale": scale.factor, "skipped_steps": scale.skipped + tolerated.astype(jnp.int32)}
            scale = scale.after(overflow, config.loss_scale.growth_interval)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params: Any = optax.apply_updates(state.params, updates)
            ema: Any = state.ema
            if ema is not None and config.ema_decay is not None:
                ema = optax.incremental_update(params, ema, 1 - config.ema_decay)
            frozen = state.frozen
            if router is not None and router.tally is not None:
                frozen = advance(m, frozen, router.tally)
            params, opt_state, ema, frozen = jax.tree.map(
                lambda new, old: new if new is old else jnp.where(sound, new, old),
                (params, opt_state, ema, frozen),
                (state.params, state.opt_state, state.ema, state.frozen),
            )
        metrics = {
            "loss": loss,
            "cross_entropy": sums["cross_entropy"] / tokens,
            "accuracy": sums["correct"] / tokens,
            "target_tokens": sums["tokens"],
            "padding": 1 - text_tokens(batch) / batch["tokens"].size,
            "gradient_norm": gradient_norm,
            # Apart from the update: one program of both moves data at two thirds of the speed.
            "finite": (sound | tolerated) & all_finite(jax.lax.optimization_barrier(params)),
            "learning_rate": jnp.asarray(schedule(done), jnp.float32),
            **scaling,
        }
        if router is not None and router.tally is not None:
            with jax.named_scope("telemetry"):
                metrics |= router_metrics(router.tally, tracked_loads(m, frozen))
        told = with_router_names(aux.values())
        taken = metrics.keys() & told.keys()
        if taken:
            raise ValueError(f"{', '.join(sorted(taken))}: the name of a metric and of something that layers tell")
        return TrainState(state.step + 1, params, opt_state, ema, frozen, carried, scale), {**metrics, **told}

    return train_step


def cut_rows(batch: Batch, parts: int) -> dict[str, jax.Array]:
    """The rows of a batch dealt out to equal parts, on a new first axis: part p has the rows p, p + parts, and so on.

    Of neighbouring rows, which one device has, each part has as many.
    """
    return {name: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}


def shares_of(cut: Batch, parts: int) -> jax.Array:
    """What each part counts in means over the parts, float32 [parts]: nothing where it is padding alone."""
    if "segment_ids" not in cut:
        return jnp.full(parts, 1 / parts, jnp.float32)
    has_text = jnp.any(cut["segment_ids"] > 0, axis=(1, 2))
    counts = (has_text | ~jnp.any(has_text)).astype(jnp.float32)
    return counts / jnp.sum(counts)


def text_tokens(batch: Batch) -> jax.Array | int:
    """Positions of a batch that are no padding."""
    return jnp.sum(batch["segment_ids"] > 0) if "segment_ids" in batch else batch["tokens"].size


def all_finite(tree: Any) -> jax.Array:
    """Whether all floats of a tree of arrays are finite, bool scalar."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))


def make_eval_step(
    config: TrainConfig, model: ByteTransformer, byte_lengths_V: jax.Array | None
) -> Callable[[Params, Batch, State], tuple[dict[str, jax.Array], State]]:
    """The function from weights, batch and state to the sums that validation adds up, and the state after it.

    A batch has as many rows as one of training, and is cut into parts as there. ``byte_lengths_V`` is the number of
    UTF-8 bytes that each token stands for, int32 [V]; None where that is not known.
    """
    plain = LossConfig()
    max_segments = config.data.max_documents_per_sequence + 1
    parts = config.gradient_accumulation_steps

    def eval_step(params: Params, batch: Batch, state: State) -> tuple[dict[str, jax.Array], State]:
        if parts == 1:
            return of_part(params, batch, state)
        found, after = jax.lax.map(lambda xs: of_part(params, *xs), (cut_rows(batch, parts), state.split(parts)))
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), found), after.joined()

    def of_part(params: Params, batch: Batch, state: State) -> tuple[dict[str, jax.Array], State]:
        _, sums, out = batch_loss(model, params, batch, plain, max_segments=max_segments, state=state)
        if byte_lengths_V is None:
            return sums, out.state
        targets = next_token_targets(batch)
        sizes = jnp.where(targets >= 0, jnp.take(byte_lengths_V, jnp.maximum(targets, 0)), 0)
        return {**sums, "bytes": jnp.sum(sizes).astype(jnp.float32)}, out.state

    return eval_step
