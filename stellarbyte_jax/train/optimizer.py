"""Learning-rate schedules and optimizers, from settings to optax."""

import itertools
from typing import Any

import jax
import optax

from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.model.decoder import ByteTransformer, logical_axes


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate by optimizer step: a linear warm-up whose first step is not zero, then the named schedule.

    ``cosine`` and ``linear`` fall to ``final_ratio`` of the peak; ``wsd`` stays at the peak and falls linearly over
    ``decay_steps`` (Hu et al. 2024, https://arxiv.org/abs/2404.06395); ``cosine_restarts`` repeats the cosine
    ``cycles`` times, each peak ``cycle_decay`` times the last one's (Loshchilov and Hutter 2016,
    https://arxiv.org/abs/1608.03983).
    """
    s, peak = config.schedule, config.optimizer.learning_rate
    rest = max(1, config.steps - s.warmup_steps)
    if s.name == "constant":
        after = optax.constant_schedule(peak)
    elif s.name == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=s.final_ratio)
    elif s.name == "linear":
        after = optax.linear_schedule(peak, peak * s.final_ratio, rest)
    elif s.name == "wsd":
        decay = max(1, s.decay_steps or config.steps // 5)
        fall = optax.linear_schedule(peak, peak * s.final_ratio, decay)
        after = optax.join_schedules([optax.constant_schedule(peak), fall], [max(0, rest - decay)])
    else:
        bounds = [round(rest * cycle / s.cycles) for cycle in range(s.cycles + 1)]
        cycles = [
            optax.cosine_decay_schedule(peak * s.cycle_decay**i, max(1, end - start), alpha=s.final_ratio)
            for i, (start, end) in enumerate(itertools.pairwise(bounds))
        ]
        after = optax.join_schedules(cycles, bounds[1:-1])
    if s.warmup_steps == 0:
        return after
    warmup = optax.linear_schedule(peak / (s.warmup_steps + 1), peak, s.warmup_steps)
    return optax.join_schedules([warmup, after], [s.warmup_steps])


def make_optimizer(config: TrainConfig, model: ByteTransformer) -> optax.GradientTransformation:
    """Clipping by global norm, then the update rule with decoupled weight decay on matrices only.

    AdamW: Loshchilov and Hutter 2017, https://arxiv.org/abs/1711.05101. Lion: Chen et al. 2023,
    https://arxiv.org/abs/2302.06675. Muon: matrices inside the layers are orthogonalised and scaled to AdamW's usual
    update size (Liu et al. 2025, https://arxiv.org/abs/2502.16982), everything else takes AdamW.
    """
    o = config.optimizer
    schedule = make_schedule(config)
    axes = logical_axes(model)
    decayed = jax.tree.map(lambda a: _decays(a, o.decay_embeddings), axes, is_leaf=_is_axes)
    if o.name == "adamw":
        rule = optax.adamw(schedule, o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=decayed)
    elif o.name == "lion":
        rule = optax.lion(schedule, o.b1, o.b2, weight_decay=o.weight_decay, mask=decayed)
    else:
        muon = optax.contrib.muon(
            1.0,
            eps=o.eps,
            adam_b1=o.b1,
            adam_b2=o.b2,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=jax.tree.map(_muon_axes, axes, is_leaf=_is_axes),
        )
        # Its own decay of the AdamW part takes no mask. Updates are negative here, hence the sign.
        rule = optax.chain(muon, optax.add_decayed_weights(-o.weight_decay, decayed), optax.scale_by_schedule(schedule))
    if o.gradient_clip_norm is None:
        return rule
    return optax.chain(optax.clip_by_global_norm(o.gradient_clip_norm), rule)


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(name, str) for name in x)


def _is_matrix(axes: tuple[str, ...]) -> bool:
    return "embed" in axes and len(set(axes) - {"layers"}) > 1


def _decays(axes: tuple[str, ...], decay_embeddings: bool) -> bool:
    return _is_matrix(axes) and (decay_embeddings or "vocab" not in axes)


def _muon_axes(axes: tuple[str, ...]) -> optax.contrib.MuonDimensionNumbers | None:
    if not _is_matrix(axes) or "vocab" in axes:
        return None
    width = axes.index("embed")
    others = tuple(i for i, name in enumerate(axes) if name not in ("embed", "layers", "gate"))
    reads_stream = width < min(others)
    return optax.contrib.MuonDimensionNumbers(
        reduction_axis=(width,) if reads_stream else others, output_axis=others if reads_stream else (width,)
    )
