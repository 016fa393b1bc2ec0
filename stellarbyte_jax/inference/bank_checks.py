"""Which adapters a bank can hold: what is wrong with others, and what to do."""

from collections.abc import Mapping

import numpy as np

from stellarbyte_jax.checkpoint.adapters import Adapters
from stellarbyte_jax.config import LoRAConfig
from stellarbyte_jax.config.foreign import listed
from stellarbyte_jax.hf.peft.modules import target_of
from stellarbyte_jax.hf.tensors import flatten
from stellarbyte_jax.model.lora import RANK, A
from stellarbyte_jax.model.state.router import is_tracked
from stellarbyte_jax.model.trees import Params, Uses

EXPERTS = frozenset({"experts"})
_MERGED = (
    "generate with the merged weights (stellarbyte_jax.load_run of a directory, or stellarbyte_jax.lora.merge_adapters)"
)


def targets_in(tree: Params) -> frozenset[str]:
    """What ``lora.target_modules`` calls the weights that have adapters in a tree."""
    found = {target_of(path.removesuffix(A)) for path in flatten(tree) if path.endswith(A)}
    return frozenset(target for target in found if target is not None)


def check_adapters(name: str, lora: LoRAConfig, targets: frozenset[str], bank: LoRAConfig) -> None:
    """Raises ValueError where adapters of these settings are none that a bank of those can hold."""
    if not lora.r:
        raise ValueError(f"{name!r} has no adapters (lora.r is 0): give a network with adapters")
    if lora.dora and not bank.dora:
        raise ValueError(f"{name!r} has DoRA, which multiplies outputs besides: make the bank with dora=True")
    if lora.activation != "none":
        raise ValueError(
            f"{name!r} has lora.activation={lora.activation}, and all adapters of a bank are linear: generate with the "
            "network that load_run gives"
        )
    if lora.modules_to_save:
        raise ValueError(
            f"{name!r} was trained with {listed(lora.modules_to_save)} whole (lora.modules_to_save), which are no "
            f"adapters: {_MERGED}"
        )
    if lora.r > bank.r:
        raise ValueError(
            f"{name!r} has rank {lora.r}, and max_rank of the bank is {bank.r}: make it with max_rank={lora.r}"
        )
    missing = sorted(targets - bank.targets)
    if missing:
        wanted = ", ".join(repr(target) for target in sorted({*bank.target_modules, *missing}))
        raise ValueError(
            f"{name!r} has adapters of {listed(missing)}, and the bank of {listed(sorted(bank.targets))}: make it with "
            f"target_modules=({wanted})"
        )


def check_routers(name: str, adapters: Adapters, base: Params) -> None:
    """Raises ValueError where training moved numbers of routers beside the adapters."""
    moe, ours = adapters.model.config.moe, flatten(base)
    used = {
        "bias": True,
        "priority": moe.expert_priority,
        "coldness": moe.cooling_steps,
        "load": moe.adaptive_temperature,
    }
    for path, x in flatten(adapters.params).items():
        if is_tracked(path) and used.get(path.rpartition("/")[2]) and not np.array_equal(x, ours.get(path, x)):
            raise ValueError(
                f"{name!r} goes with routers whose numbers training moved ({path}): {_MERGED}; or train it with "
                "moe.bias_update_rate=0 and constant routers"
            )


def check_checksums(name: str, theirs: Mapping[str, int], ours: Mapping[str, int]) -> None:
    """Raises ValueError where adapters were trained on other weights, by ``checksum.array_checksums`` of both."""
    differ = sorted(path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path))
    if differ:
        raise ValueError(
            f"{name!r} was trained on another base: {len(differ)} weights differ, such as {differ[0]}. Make a bank of "
            "the base that the run's init_from names"
        )


def check_shapes(
    name: str, given: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray], uses: Uses, rank: int
) -> None:
    """Raises ValueError where A and B of a rank, by path, are not of the weights that the arrays of a bank are of."""
    wrong = [f"{path} is none of the base's" for path in given if path not in arrays]
    for path, x in ((path, x) for path, x in given.items() if path in arrays):
        axes = zip(uses[path].axes, arrays[path].shape, strict=True)
        wanted = tuple(rank if axis == RANK else size for axis, size in axes)
        if x.shape != wanted:
            wrong.append(f"{path} has shape {x.shape}, the base asks for {wanted}")
    if wrong:
        more = f"; and {len(wrong) - 2} more" if len(wrong) > 2 else ""
        raise ValueError(
            f"{name!r} is an adapter of another base: {'; '.join(wrong[:2])}{more}. Make a bank of the base that it "
            "was trained on"
        )
