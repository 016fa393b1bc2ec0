"""A dense model as one with experts that computes the same: the MLP of a layer becomes each of its experts.

L layers of a stack, D model, F inside the MLP, E experts, m slices of an MLP.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from stellarbyte_jax.config import ByteConfig, override
from stellarbyte_jax.config.foreign import shown
from stellarbyte_jax.config.section import require
from stellarbyte_jax.model.decoder import ByteTransformer, init_params
from stellarbyte_jax.model.trees import Params

_PREFIX = "moe."


def upcycled_config(config: ByteConfig, settings: Sequence[str]) -> ByteConfig:
    """The settings of a dense model with ``moe.name=value`` strings applied.

    Raises:
      ConfigError: the model has experts already, or the experts could not compute what its MLPs compute.
    """
    require(
        config.moe.num_experts == 0,
        f"the model has {config.moe.num_experts} experts already (model.moe.num_experts): upcycle takes a dense one",
    )
    for text in settings:
        require(
            text.strip().startswith(_PREFIX),
            f"setting {shown(text)}: upcycle takes settings of experts alone, such as moe.num_experts=8; the others "
            "are those of the model",
        )
    upcycled = override(config, settings)
    require(upcycled.moe.num_experts > 0, "how many experts? Give moe.num_experts=N")
    _check_exact(upcycled)
    return upcycled


def upcycle(
    config: ByteConfig, params: Mapping[str, Any], upcycled: ByteConfig, *, seed: int = 0, noise: float = 0.0
) -> Params:
    """The weights of a dense model as those of one with experts, whose logits are the same up to rounding.

    Sparse upcycling: Komatsuzaki et al. 2022, https://arxiv.org/abs/2212.05055. The router is fresh. Weights of a
    token's experts add up to one, so copies of one MLP give what it gives, whichever are chosen.

    Experts narrower by a factor m are the m slices of the MLP (granular upcycling, with virtual groups: He et al. 2024,
    https://arxiv.org/abs/2410.07524). Slices of one copy are neighbours and have equal columns in the router, so that a
    token goes to all of them or to none; of equal scores the first experts are taken, which are whole copies too. Each
    slice has 1/m of its copy's weight, so ``down`` is m times as large.

    Args:
      config: of the dense model.
      params: its weights.
      upcycled: of :func:`upcycled_config`.
      seed: of the router and of the noise.
      noise: size of what is added to each expert, as a share of the standard deviation of each matrix; with 0 logits
        stay as they are.

    Raises:
      ConfigError: as :func:`upcycled_config`; or the noise is negative.
    """
    require(
        0 <= noise < float("inf"), f"noise {noise} is no share of the weights: give 0 or a small number such as 0.1"
    )
    _check_exact(upcycled)
    layers = {
        str(stack): _stack(config, params["layers"], upcycled, stack)
        for stack in sorted({stack for stack, _ in upcycled.layer_places})
    }
    numbers = np.random.default_rng([seed, 1])
    for name, router in _routers(upcycled, seed).items():
        mlp = layers[name].pop("mlp")
        layers[name]["moe"] = {"router": router, "experts": _experts(upcycled, mlp, noise, numbers)}
    return {**params, "layers": layers}


def _slices(config: ByteConfig) -> int:
    """Slices that an MLP is cut into."""
    size = config.expert_size
    require(
        config.mlp_size % size == 0,
        f"moe.intermediate_size {size} does not divide the intermediate_size {config.mlp_size} of the model: its MLP "
        "cannot be cut into such experts; leave it out, or give a divisor",
    )
    return config.mlp_size // size


def _check_exact(config: ByteConfig) -> None:
    """Raises ConfigError where experts would not compute what the MLPs compute."""
    moe = config.moe
    require(
        not moe.shared_pool,
        "moe.shared_pool=true: layers would share experts, and their MLPs differ; leave it out",
    )
    require(
        moe.norm_topk_prob,
        "moe.norm_topk_prob=false: the weights of a token's experts would not add up to one, so the model would "
        "compute something else; leave it out",
    )
    require(
        moe.routed_scaling_factor == 1.0,
        f"moe.routed_scaling_factor={moe.routed_scaling_factor}: the experts' output would be that of the MLP times "
        "this; leave it out",
    )
    require(
        moe.n_shared_experts == 0,
        f"moe.n_shared_experts={moe.n_shared_experts}: they would add to what the MLP computes; leave it out",
    )
    if (m := _slices(config)) > 1:
        _check_slices(config, m)


def _check_slices(config: ByteConfig, m: int) -> None:
    moe = config.moe
    cut = f"moe.intermediate_size {config.expert_size} cuts each MLP into {m} slices"
    for name in ("num_experts", "num_experts_per_tok"):
        value = getattr(moe, name)
        require(
            value % m == 0,
            f"{cut}: moe.{name} {value} must be a multiple of {m}, since a token needs all slices of a copy",
        )
    require(
        moe.topk_group == moe.n_group or moe.num_experts // moe.n_group % m == 0,
        f"{cut}: the {moe.num_experts // max(1, moe.n_group)} experts of a group (moe.n_group {moe.n_group}) are no "
        "whole copies; give fewer groups",
    )
    parting = {
        "dynamic_k": moe.dynamic_k is not None,
        "noise": moe.noise != "none",
        "router_warmup_steps": moe.router_warmup_steps > 0,
    }
    stray = [name for name, is_set in parting.items() if is_set]
    require(
        not stray, f"{cut}: with moe.{', moe.'.join(stray)} a token would get some slices of a copy alone; leave it out"
    )


def _stack(config: ByteConfig, layers: Mapping[str, Any], upcycled: ByteConfig, stack: int) -> Params:
    """The weights of the dense layers that become those of a stack."""
    places = [
        dense for dense, (number, _) in zip(config.layer_places, upcycled.layer_places, strict=True) if number == stack
    ]
    rows = [jax.tree.map(lambda x, row=row: np.asarray(x[row]), dict(layers[str(source)])) for source, row in places]
    return jax.tree.map(lambda *parts: np.stack(parts), *rows)


def _routers(config: ByteConfig, seed: int) -> dict[str, Params]:
    """A fresh router for each layer with experts, by the name of the stack."""
    model = ByteTransformer(dataclasses.replace(config, compute_dtype="float32"))

    def fresh() -> dict[str, Params]:
        layers = init_params(model, jax.random.key(seed))["layers"]
        return {name: stack["moe"]["router"] for name, stack in layers.items() if "moe" in stack}

    m = _slices(config)
    routers = jax.tree.map(np.asarray, jax.jit(fresh)())
    return {
        name: {**router, "kernel": np.repeat(router["kernel"][..., ::m], m, -1)} for name, router in routers.items()
    }


def _experts(config: ByteConfig, mlp: Params, noise: float, numbers: np.random.Generator) -> Params:
    """MLPs ``gate_up`` [L, D, 2, F], ``down`` [L, F, D] as experts [L, E, D, 2, F/m], [L, E, F/m, D]."""
    m, copies = _slices(config), config.moe.num_experts // _slices(config)
    L, D, _, F = mlp["gate_up"].shape
    up_LmDGF = np.moveaxis(mlp["gate_up"].reshape(L, D, 2, m, F // m), 3, 1)
    down_LmFD = mlp["down"].reshape(L, m, F // m, D) * mlp["down"].dtype.type(m)
    experts = {"gate_up": np.tile(up_LmDGF, (1, copies, 1, 1, 1)), "down": np.tile(down_LmFD, (1, copies, 1, 1))}
    return {name: _with_noise(x, noise, numbers) for name, x in experts.items()} if noise else experts


def _with_noise(x_LE: np.ndarray, noise: float, numbers: np.random.Generator) -> np.ndarray:
    inside = tuple(range(2, x_LE.ndim))
    size_LE = noise * np.std(x_LE, axis=inside, keepdims=True)
    return (x_LE + size_LE * numbers.standard_normal(x_LE.shape, np.float32)).astype(x_LE.dtype)
