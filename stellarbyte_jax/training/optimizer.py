"""Learning-rate schedules and optimizers, from settings to optax."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import optax

from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.model.decoder import ByteTransformer, param_uses, trained
from stellarbyte_jax.model.trees import IsTrainable, all_trainable, partition
from stellarbyte_jax.training.muon import muon


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate by optimizer step: a linear warm-up whose first step is not zero, then the named schedule.

    The last step, of count ``config.steps - 1``, has ``final_ratio`` of its peak (a run of one step has the peak).
    ``cosine`` and ``linear`` fall to ``final_ratio`` of the peak; ``wsd`` stays at the peak and falls linearly over
    ``decay_steps`` (Hu et al. 2024, https://arxiv.org/abs/2404.06395); ``cosine_restarts`` repeats the cosine
    ``cycles`` times, each peak ``cycle_decay`` times the last one's (Loshchilov and Hutter 2016,
    https://arxiv.org/abs/1608.03983).
    """
    return _mixing_types(_named_schedule(config))


def _named_schedule(config: TrainConfig) -> optax.Schedule:
    s, peak = config.schedule, config.optimizer.learning_rate
    # A schedule that falls has its peak and its last rate, however long the warm-up is.
    warmup_steps = s.warmup_steps if s.name == "constant" else min(s.warmup_steps, max(0, config.steps - 2))
    rest = max(1, config.steps - 1 - warmup_steps)  # steps from the peak to the last step
    if s.name == "constant":
        after = optax.constant_schedule(peak)
    elif s.name == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=s.final_ratio)
    elif s.name == "linear":
        after = optax.linear_schedule(peak, peak * s.final_ratio, rest)
    elif s.name == "wsd":
        decay = max(1, min(rest, s.decay_steps or config.steps // 5))
        fall = optax.linear_schedule(peak, peak * s.final_ratio, decay)
        after = optax.join_schedules([optax.constant_schedule(peak), fall], [rest - decay])
    else:
        bounds = [round((rest + 1) * cycle / s.cycles) for cycle in range(s.cycles + 1)]
        cycles = [
            optax.cosine_decay_schedule(peak * s.cycle_decay**i, max(1, end - start - 1), alpha=s.final_ratio)
            for i, (start, end) in enumerate(itertools.pairwise(bounds))
        ]
        after = optax.join_schedules(cycles, bounds[1:-1])
    if warmup_steps == 0:
        return after
    warmup = optax.linear_schedule(peak / (s.warmup_steps + 1), peak, s.warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(
    config: TrainConfig, model: ByteTransformer, is_trainable: IsTrainable = all_trainable
) -> optax.GradientTransformation:
    """Clipping by global norm, then the update rule with decoupled weight decay on matrices only.

    AdamW: Loshchilov and Hutter 2017, https://arxiv.org/abs/1711.05101. Lion: Chen et al. 2023,
    https://arxiv.org/abs/2302.06675. Muon: matrices inside the layers are orthogonalised, each on its own, and scaled
    to AdamW's usual update size (Liu et al. 2025, https://arxiv.org/abs/2502.16982), everything else takes AdamW with
    Nesterov momentum (Dozat 2016), as optax has it.

    Updates of routers are multiplied by ``router_learning_rate_ratio``, weight decay included.

    What is a matrix, and between which axes, each weight states itself (``model.params.WeightUse``). The optimizer is
    for the trainable weights alone.
    """
    o = config.optimizer
    schedule = make_schedule(config)
    uses, _ = partition(param_uses(model), trained(model, is_trainable))
    decayed = jax.tree.map(lambda use: use.is_matrix or (use.lookup and o.decay_embeddings), uses)
    if o.name == "adamw":
        rule = optax.adamw(schedule, o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=decayed)
    elif o.name == "lion":
        rule = optax.lion(schedule, o.b1, o.b2, weight_decay=o.weight_decay, mask=decayed)
    else:
        matrices = muon(uses, eps=o.eps, b1=o.b1, b2=o.b2)
        # Updates are negative here, hence the sign.
        rule = optax.chain(
            matrices, optax.add_decayed_weights(-o.weight_decay, decayed), optax.scale_by_schedule(schedule)
        )
    if model.config.moe.num_experts:  # always, so that a run may change the ratio
        routers = jax.tree_util.tree_map_with_path(lambda path, _: _is_of_router(path), uses)
        rule = optax.chain(rule, optax.masked(optax.scale(o.router_learning_rate_ratio), routers))
    if o.gradient_clip_norm is not None:
        rule = optax.chain(optax.clip_by_global_norm(o.gradient_clip_norm), rule)
    return optax.GradientTransformation(rule.init, _mixing_types(rule.update))


def _mixing_types(update: Callable[..., Any]) -> Callable[..., Any]:
    """Optax adds floats to integers inside, which strict promotion refuses."""

    @functools.wraps(update)
    def mixed(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return update(*args, **kwargs)

    return mixed


def _is_of_router(path: tuple[Any, ...]) -> bool:
    return any(key.key == "router" for key in path)
