"""Adapters of ours written as a directory of PEFT."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.config.paths import expanded
from stellarbyte_jax.hf.card import CARD, adapter_card
from stellarbyte_jax.hf.export import differences
from stellarbyte_jax.hf.files import Tensor, float_dtype, replacing, write_file, write_json
from stellarbyte_jax.hf.hub import ADAPTER, ADAPTER_WEIGHTS, is_hub_name, local_directory
from stellarbyte_jax.hf.layout import cast, interleaved_to_half
from stellarbyte_jax.hf.peft.modules import (
    EMBEDDING,
    HEAD,
    PREFIX,
    Module,
    Names,
    PeftFactors,
    factors_of,
    layer_of,
    names_of,
)
from stellarbyte_jax.hf.peft.settings import as_written, scale, settings_json
from stellarbyte_jax.hf.settings import read_config
from stellarbyte_jax.hf.table import Entry
from stellarbyte_jax.hf.tensors import flatten
from stellarbyte_jax.model.decoder import ByteTransformer, param_uses
from stellarbyte_jax.model.lora import is_adapter, is_learnt
from stellarbyte_jax.tokenizer.directory import copy_tokenizer, spell_for_older

_log = logging.getLogger(__name__)
_BIAS = ".bias"


def save_adapter(
    directory: str | Path,
    model: ByteTransformer,
    params: Mapping[str, Any],
    *,
    base: str | Path,
    revision: str | None = None,
    dtype: str = "float32",
    tokenizer: str | Path | None = None,
    ids: Mapping[str, int | list[int]] = MappingProxyType({}),
    overwrite: bool = False,
) -> None:
    """Writes adapters as a directory that ``peft.PeftModel.from_pretrained`` loads onto the base.

    Rank, factor, targets, layers, DoRA, rsLoRA and ``modules_to_save`` are those of ``model.config.lora``. What the
    base has as one tensor (Phi-3's fused projections, experts) gets one adapter of so many times the rank that computes
    the same. The directory appears complete or not at all.

    Args:
      directory: to be made.
      model: the network with adapters.
      params: its weights, or its adapters and ``modules_to_save`` alone.
      base: Hugging Face directory of the base, or ``owner/name`` of the hub; only its ``config.json`` is read.
      revision: branch, tag or commit of a name of the hub.
      dtype: of the numbers on disk: ``float32``, ``bfloat16`` or ``float16``.
      tokenizer: directory whose tokenizer files are copied.
      ids: special tokens that go before those, such as ``{"eos_token_id": [1, 2]}``.
      overwrite: an earlier adapter there is replaced.

    Raises:
      ValueError: there are no adapters, PEFT has no place for them, or the base is another model.
    """
    found = local_directory(base, revision, weights=False)
    family, theirs = read_config(found)
    _check(model.config, theirs, str(base), family.model_type)
    names = names_of(family, model.config.without_adapters)
    reordered = model.config.rope_pairing != theirs.rope_pairing
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(params).items() if _is_written(model, path)}
    uses = flatten(param_uses(model))
    adapted = _adapted(names, model.config, leaves, uses, reordered)
    _check_modules(adapted, model.config, family.model_type)
    saved = [entry for entry in names.entries.values() if _is_saved(entry, leaves)]
    to = float_dtype(dtype)
    tied = model.config.tie_word_embeddings
    tensors = [*_factor_tensors(adapted, to, tied), *_saved_tensors(saved, adapted, leaves, to, reordered, tied)]
    named = str(base) if is_hub_name(base) else str(found.absolute())
    settings = settings_json(model.config.lora, named, _chosen(names, adapted, saved, model.config))
    if revision is not None:
        settings["revision"] = revision
    with replacing(Path(expanded(directory)), overwrite, marker=ADAPTER) as partial:
        write_json(partial / ADAPTER, settings)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial, ids)
            spell_for_older(partial)
        (partial / CARD).write_text(adapter_card(named, own_code=family.modelling_file is not None), encoding="utf-8")
        write_file(partial / ADAPTER_WEIGHTS, tensors, {})


def _is_written(model: ByteTransformer, path: str) -> bool:
    parts = tuple(path.split("/"))
    return is_adapter(parts) or is_learnt(model.config.lora, parts)


def _is_saved(entry: Entry, leaves: Mapping[str, np.ndarray]) -> bool:
    return all(piece.path in leaves for piece in entry.pieces)


def _check(config: ByteConfig, base: ByteConfig, name: str, family: str) -> None:
    lora = config.lora
    if not lora.r:
        raise ValueError("the model has no adapters (model.lora.r is 0): write it as a Hugging Face directory instead")
    if lora.activation != "none":
        raise ValueError(f"PEFT has no adapters with lora.activation={lora.activation}: train them with none")
    if config.moe.num_experts and config.moe.bias_update_rate:
        raise ValueError(
            "PEFT has no place for biases of routers that training moves beside adapters: train these with "
            "moe.bias_update_rate=0, or write the merged model (to-hf)"
        )
    apart = differences(config.without_adapters, base)
    if apart:
        raise ValueError(
            f"{name} ({family}) is not the base of these adapters: {'; '.join(apart[:4])}. Name the model that they "
            "were trained on, as a Hugging Face directory"
        )
    if config.rope_pairing != base.rope_pairing and base.rope_pairing != "half":
        raise ValueError(f"{name} rotates other pairs (rope_pairing): name the model that the adapters were trained on")


@dataclass(frozen=True)
class _Adapted:
    """A module with its adapter; ``parts`` is how many ranks of ours it has."""

    module: Module
    factors: PeftFactors
    parts: int


def _adapted(
    names: Names, config: ByteConfig, leaves: Mapping[str, np.ndarray], uses: Mapping[str, Any], reordered: bool
) -> list[_Adapted]:
    chosen, found = config.lora.layers, []
    for module in names.modules.values():
        if chosen is not None and module.layer is not None and module.layer not in chosen:
            continue
        parts = [factors_of(unit, leaves, uses, reordered) for unit in module.units()]
        if not any(parts):
            continue
        if config.lora.dora and not all(parts):
            raise ValueError(
                f"{module.name} is one weight there, which PEFT gives a length of all outputs: with lora.dora, let "
                "lora.target_modules name all of it (q, k and v)"
            )
        if config.lora.dora and module.parameter is not None:
            raise ValueError(f"PEFT has no DoRA of {module.target}: train it without lora.dora, or write it merged")
        whole = [
            each or PeftFactors(np.zeros((0, unit.inputs), np.float32), np.zeros((unit.outputs, 0), np.float32))
            for unit, each in zip(module.units(), parts, strict=True)
        ]
        factors = module.joined(whole)
        found.append(_Adapted(module, factors, len(factors.a) // (config.lora.r * len(module.groups))))
    return found


def _check_modules(adapted: list[_Adapted], config: ByteConfig, family: str) -> None:
    dense = any(each.module.target in ("gate_up", "down") for each in adapted)
    if family == "qwen3_moe" and dense:
        raise ValueError(
            "PEFT takes gate_proj, up_proj and down_proj of qwen3_moe for those of experts, so it has no adapters of "
            "layers with one MLP: leave gate_up and down out of lora.target_modules, or write the merged model (to-hf)"
        )
    if config.lora.dropout and any(each.module.parameter for each in adapted):
        _log.warning("lora.dropout is not in the file: PEFT has none beside adapters of routers and experts")


def _stems(adapted: list[_Adapted]) -> dict[str, str]:
    """By full names, where the tensors of an adapter are: one of several parameters of a module is inside the next."""
    inside: dict[str, list[str]] = {}
    for each in adapted:
        inside.setdefault(each.module.name, []).append(each.module.full_name)
    return {
        full: name + ".base_layer" * (len(fulls) - 1 - place)
        for name, fulls in inside.items()
        for place, full in enumerate(fulls)
    }


def _factor_tensors(adapted: list[_Adapted], dtype: np.dtype, tied: bool) -> list[Tensor]:
    stems, tensors = _stems(adapted), []
    for each in adapted:
        stem = PREFIX + stems[each.module.full_name]
        ends = ("lora_embedding_A", "lora_embedding_B") if each.module.is_table else ("lora_A.weight", "lora_B.weight")
        named = [*zip(ends, each.factors[:2], strict=True), ("lora_magnitude_vector", each.factors.magnitude)]
        tensors += [_tensor(f"{stem}.{end}", array, dtype) for end, array in named if array is not None]
        if each.module.is_table and tied:  # to the head the columns of the table's factors are rows
            head = zip(("lora_A.weight", "lora_B.weight"), (each.factors.b.T, each.factors.a.T), strict=True)
            tensors += [_tensor(f"{PREFIX}{HEAD}.{end}", array, dtype) for end, array in head]
    return tensors


def _saved_tensors(
    saved: list[Entry],
    adapted: list[_Adapted],
    leaves: Mapping[str, np.ndarray],
    dtype: np.dtype,
    reordered: bool,
    tied: bool,
) -> list[Tensor]:
    wrapped, tensors = {each.module.name for each in adapted}, []
    for entry in saved:
        parts = []
        for piece in entry.pieces:
            ours = leaves[piece.path][piece.index]
            ours = interleaved_to_half(ours) if piece.row.rotary and reordered else ours
            parts.append(piece.row.layout.to_hf(ours))
        name = entry.theirs
        if name.endswith(_BIAS) and name.removesuffix(_BIAS) in wrapped:
            name = f"{name.removesuffix(_BIAS)}.base_layer{_BIAS}"
        tensors.append(_tensor(PREFIX + name, np.concatenate(parts), entry.dtype(dtype)))
        if name == f"{EMBEDDING}.weight" and tied:
            tensors.append(replace(tensors[-1], name=f"{PREFIX}{HEAD}.weight"))
    return tensors


def _tensor(name: str, array: np.ndarray, dtype: np.dtype) -> Tensor:
    array = np.ascontiguousarray(cast(array, dtype, name))
    return Tensor(name, array.shape, dtype, lambda: array)


def _chosen(names: Names, adapted: list[_Adapted], saved: list[Entry], config: ByteConfig) -> dict[str, Any]:
    """Fields of the settings that follow from the modules."""
    lora, layers = config.lora, config.lora.layers
    modules = [each.module for each in adapted if each.module.parameter is None]
    others = {entry.rpartition(".")[0] for entry in names.entries}
    if layers is not None:
        others = {name for name in others if layer_of(name) in layers}
    parameters = [each.module for each in adapted if each.module.parameter is not None]
    fields: dict[str, Any] = {
        "target_modules": _shortest([module.name for module in modules], others, exact=layers is not None),
        # Layers are not chosen for parameters, so each is named where not all are meant.
        "target_parameters": [module.full_name for module in parameters]
        if layers is not None
        else sorted({_in_layer(module.full_name) for module in parameters}),
        "layers_to_transform": None if layers is None else list(layers),
        "bias": "all" if "biases" in lora.modules_to_save else "none",
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    if parameters:
        fields["lora_dropout"] = 0.0  # PEFT refuses another one beside them
    fields["target_parameters"] = fields["target_parameters"] or None
    for each in adapted:
        if each.parts > 1:
            key, rank = _in_layer(each.module.full_name), each.parts * lora.r
            fields["rank_pattern"][key] = rank
            factor = lora.scale / scale(1.0, rank, lora.rslora)
            fields["alpha_pattern"][key] = as_written(round(factor, 9))
    whole = {entry.theirs.rpartition(".")[0] for entry in saved if not entry.theirs.endswith(_BIAS)}
    if whole:
        fields["modules_to_save"] = sorted({name.rpartition(".")[2] for name in whole})
    if config.tie_word_embeddings and "embed" in {*lora.targets, *lora.modules_to_save}:
        fields["ensure_weight_tying"] = True
    return fields


def _in_layer(name: str) -> str:
    """A name without the layer: ``self_attn.qkv_proj``."""
    layer = layer_of(name)
    return name if layer is None else name.partition(f".layers.{layer}.")[2]


def _shortest(names: list[str], others: set[str], *, exact: bool) -> list[str]:
    """The shortest ends of names that no other module has.

    Args:
      names: of the modules that are meant.
      others: all modules there are.
      exact: whether modules outside of layers go by their whole names alone.
    """
    wanted, found = set(names), set()
    for name in names:
        parts = name.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        if exact and layer_of(name) is None:
            ends = [name]
        found.add(next(end for end in ends if _ending(end, others) <= wanted))
    return sorted(found)


def _ending(end: str, names: Iterable[str]) -> set[str]:
    return {name for name in names if name == end or name.endswith(f".{end}")}
