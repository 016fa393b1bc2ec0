"""What routers did in a step, as metrics of each layer with experts.

L layers with experts, E experts.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from stellarbyte_jax.model.state.router import Tally

LOADS = "router/loads"  # [L, E]: no metric, but lines of a file of its own
BY_LAYER = (
    *("router/load_entropy", "router/max_load", "router/max_wanted", "router/overflow_rate", "router/drop_rate"),
    *("router/dead_experts", "router/idle_experts", "router/temperature"),
)
_GREATEST = ("router/max_load", "router/max_wanted")  # told of the worst layer, the others as means over the layers
_LOSS = "router_"  # begins the names of losses that balance experts
DEAD = 0.01  # of its fair share: an expert whose load is below it does nothing


def router_metrics(tally: Tally, running_LE: jax.Array) -> dict[str, jax.Array]:
    """The metrics of :data:`BY_LAYER`, float32 [L], and :data:`LOADS`, shares [L, E] of the choices that experts took.

    A layer without any choice has a load of zeros, whose entropy is 0.

    Args:
      tally: of the step.
      running_LE: running means of loads after the step.
    """
    E = tally.counts.shape[1]
    loads_LE = _shares(tally.counts)
    wanted_L = jnp.maximum(jnp.sum(tally.wanted, axis=1), 1.0)
    return {
        "router/load_entropy": _evenness(loads_LE),
        "router/max_load": E * jnp.max(loads_LE, axis=1),
        "router/max_wanted": E * jnp.max(_shares(tally.wanted), axis=1),
        "router/overflow_rate": (tally.moved + tally.lost) / wanted_L,
        "router/drop_rate": tally.lost / wanted_L,
        "router/dead_experts": jnp.sum(running_LE < DEAD / E, axis=1, dtype=jnp.float32),
        "router/idle_experts": jnp.sum(tally.counts == 0, axis=1, dtype=jnp.float32),
        "router/temperature": tally.temperature / jnp.maximum(tally.tokens, 1.0),
        LOADS: loads_LE,
    }


def _shares(counts_LE: jax.Array) -> jax.Array:
    return counts_LE / jnp.maximum(jnp.sum(counts_LE, axis=1, keepdims=True), 1.0)


def _evenness(shares_LE: jax.Array) -> jax.Array:
    """The entropy of shares over the largest possible one; that of a single expert is 1."""
    L, E = shares_LE.shape
    if E == 1:
        return jnp.ones(L)
    return jnp.sum(jax.scipy.special.entr(shares_LE), axis=1) / jnp.log(E)


def with_router_names(losses: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What layers tell, with the losses of routers beside their metrics: ``router_z`` is ``router/loss/z``."""
    return {
        f"router/loss/{name.removeprefix(_LOSS)}" if name.startswith(_LOSS) else name: value
        for name, value in losses.items()
    }


def layer_numbers(metrics: Mapping[str, np.ndarray], layers: Sequence[int]) -> dict[str, float]:
    """Numbers of the metrics of :data:`BY_LAYER` among ``metrics``: of all layers, and of each under ``name/layer``.

    That of all layers is the mean, or the greatest where the metric is itself a maximum.

    Args:
      metrics: of a step, by their names.
      layers: numbers of the layers with experts.
    """
    found = {}
    for name in BY_LAYER:
        if name in metrics:
            values = np.asarray(metrics[name])
            found[name] = float(values.max() if name in _GREATEST else values.mean())
            found |= {f"{name}/{layer}": float(x) for layer, x in zip(layers, values, strict=True)}
    return found
