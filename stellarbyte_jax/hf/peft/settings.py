"""``adapter_config.json`` of PEFT, read and written.

A field that is neither implemented nor known to be without effect is an error, as in ``config.json``.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stellarbyte_jax.config import LoRAConfig
from stellarbyte_jax.config.foreign import clipped, listed, shown
from stellarbyte_jax.hf.files import read_json
from stellarbyte_jax.hf.hub import ADAPTER

MERGE = (
    "merge it into its base with PEFT: AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload()"
    ".save_pretrained(NEW_DIR)"
)
# Of bookkeeping, of training alone, of the first weights of an adapter, or told by the tensors themselves. What Linear
# layers do not read is here too, and what says whether a field above it counts.
_WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("task_type", "runtime_config", "ephemeral_gpu_offload"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
    *("bias", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform", "modules_to_save"),
    *("target_modules", "target_parameters"),
}
_READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}
_READ |= {"init_lora_weights", "ensure_weight_tying"}
# Others change the base when an adapter is loaded.
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
_DEFAULT_RANK = _DEFAULT_ALPHA = 8  # what an absent one means to PEFT
_LONGEST_PATTERN = 500


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter of PEFT."""
    return (directory / ADAPTER).is_file()


@dataclass(frozen=True)
class Settings:
    """What an ``adapter_config.json`` says.

    Attributes:
      where: the file.
      base: directory of the base model, or a name of the hub.
      revision: of a name of the hub.
      r: rank.
      alpha: adapters are multiplied by alpha / r, or by alpha / sqrt(r).
      rslora: which of them.
      dora: whether there are magnitudes.
      dropout: in training.
      gaussian: whether A began so.
      ties: whether the head has the adapter of an embedding that it shares the matrix with.
      ranks: other ranks, by patterns of modules.
      alphas: likewise.
      parameters: names of parameters that are adapted themselves.
    """

    where: str
    base: str
    revision: str | None
    r: int
    alpha: float
    rslora: bool
    dora: bool
    dropout: float
    gaussian: bool
    ties: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    parameters: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter."""
        return _by_pattern(self.ranks, module, self.r)

    def scale_of(self, module: str, rank: int) -> float:
        """What a module's adapter is multiplied by."""
        return scale(_by_pattern(self.alphas, module, self.alpha), rank, self.rslora)


def scale(alpha: float, rank: int, rslora: bool) -> float:
    """What adapters of a rank are multiplied by."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_settings(directory: Path) -> Settings:
    """Reads the settings of an adapter.

    Raises:
      ValueError: the file is broken, names no base, or asks for something that is not implemented.
    """
    path = directory / ADAPTER
    values, where = read_json(path), str(path)
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type is {shown(values.get('peft_type'))}; only LORA is read: {MERGE}")
    if values.get("init_lora_weights", True) not in _KEEPS_BASE:
        raise ValueError(
            f"{where}: init_lora_weights is {shown(values['init_lora_weights'])}, by which the base changes when the "
            "adapter is loaded: save it with PEFT's path_initial_model_for_weight_conversion, or merge it there"
        )
    # What a newer version adds is off where it is null or empty.
    unknown = [name for name, value in values.items() if name not in _WITHOUT_EFFECT | _READ and value]
    if unknown:
        raise ValueError(f"{where}: {listed(unknown)}: not implemented, nor known to be without effect: {MERGE}")
    base, revision = values.get("base_model_name_or_path"), values.get("revision")
    if not (isinstance(base, str) and base and isinstance(revision, str | None)):
        raise ValueError(
            f"{where}: base_model_name_or_path is {shown(base)}, revision {shown(revision)}: name the model that the "
            "adapter was trained on there, a directory or owner/name of the hub"
        )
    return Settings(
        where=where,
        base=base,
        revision=revision or None,
        r=_number(values, "r", _DEFAULT_RANK, where, whole=True),
        alpha=_number(values, "lora_alpha", _DEFAULT_ALPHA, where),
        rslora=_flag(values, "use_rslora", where),
        dora=_flag(values, "use_dora", where),
        dropout=_number(values, "lora_dropout", 0.0, where, least=0.0),
        gaussian=values.get("init_lora_weights") == "gaussian",
        ties=_flag(values, "ensure_weight_tying", where),
        ranks=_patterns(values, "rank_pattern", where, whole=True),
        alphas=_patterns(values, "alpha_pattern", where),
        parameters=_names(values, "target_parameters", where),
    )


def _number(
    values: Mapping[str, Any], name: str, default: Any, where: str, *, whole: bool = False, least: float = 1e-9
) -> Any:
    value = values.get(name, default)
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not least <= value < 1e9:
        raise ValueError(
            f"{where}: {name} is {shown(value)}: it must be a {'whole ' if whole else ''}number from "
            f"{1 if whole else 'above 0' if least else 0} on, copy the file again"
        )
    return value


def _flag(values: Mapping[str, Any], name: str, where: str) -> bool:
    value = values.get(name, False)
    if type(value) is not bool:
        raise ValueError(f"{where}: {name} is {shown(value)}: it must be true or false, copy the file again")
    return value


def _patterns(values: Mapping[str, Any], name: str, where: str, *, whole: bool = False) -> dict[str, Any]:
    found = values.get(name) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{where}: {name} is {shown(found)}: it must be an object of numbers, copy the file again")
    for key in found:
        _number(found, key, None, f"{where}: {name}", whole=whole)
        try:
            re.compile(key[:_LONGEST_PATTERN])
        except re.error as error:
            raise ValueError(f"{where}: {name} has {shown(key)}, which is no pattern ({error}): mend it") from None
        if len(key) > _LONGEST_PATTERN:
            raise ValueError(f"{where}: {name} has a pattern of {len(key)} letters, {clipped(key, 50)}: shorten it")
    return found


def _names(values: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    found = values.get(name) or []
    if not (isinstance(found, list) and all(isinstance(each, str) for each in found)):
        raise ValueError(f"{where}: {name} is {shown(found)}: it must be a list of names, copy the file again")
    return tuple(found)


def settings_json(config: LoRAConfig, base: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Content of ``adapter_config.json``.

    Args:
      config: of the adapters.
      base: directory of the base model, or a name of the hub.
      chosen: fields that follow from the modules.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": as_written(config.lora_alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "fan_in_fan_out": False,
        **chosen,
    }


def as_written(value: float) -> float | int:
    """A number as PEFT writes it: whole ones without a point."""
    return int(value) if float(value).is_integer() else value
