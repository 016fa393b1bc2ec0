"""Adapters of PEFT read as adapters of ours, beside the weights of their base."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from stellarbyte_jax.config import ByteConfig, LoRAConfig
from stellarbyte_jax.config.foreign import absent, clipped, listed
from stellarbyte_jax.config.paths import expanded
from stellarbyte_jax.hf.directory import from_pretrained
from stellarbyte_jax.hf.files import WeightFiles
from stellarbyte_jax.hf.hub import ADAPTER, ADAPTER_WEIGHTS, is_hub_name, local_directory
from stellarbyte_jax.hf.peft.modules import (
    EMBEDDING,
    HEAD,
    PREFIX,
    Module,
    Names,
    PeftFactors,
    Unit,
    names_of,
    put_factors,
    target_of,
)
from stellarbyte_jax.hf.peft.settings import MERGE, Settings, read_settings
from stellarbyte_jax.hf.settings import read_config
from stellarbyte_jax.hf.table import Entry, Family
from stellarbyte_jax.hf.tensors import flatten, put_leaf
from stellarbyte_jax.lora import split, with_adapters
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes, param_uses
from stellarbyte_jax.model.lora import MAGNITUDE, SCALE, is_learnt
from stellarbyte_jax.model.trees import Params, merge

_log = logging.getLogger(__name__)
_Kind = Literal["embed", "head", "norms", "biases"]  # of lora.modules_to_save
_PICKLED = "adapter_model.bin"
_FROM_PICKLE = (
    "import sys, torch, safetensors.torch as s; d = sys.argv[1]; "
    "s.save_file({k: v.contiguous().clone() for k, v in "
    "torch.load(d + '/adapter_model.bin', weights_only=True, map_location='cpu').items()}, "
    "d + '/adapter_model.safetensors')"
)
_PART = re.compile(r"(.+)\.lora_(?:embedding_)?(A|B)(?:\.weight)?|(.+)\.lora_(magnitude)_vector(?:\.weight)?")


def base_directory(directory: Path) -> Path:
    """The directory of the model that an adapter is of, fetched first where it is a name of the hub.

    Raises:
      ValueError: the adapter's settings cannot be read, or name no directory that is here.
    """
    return _base(read_settings(directory))


def _base(settings: Settings, *, weights: bool = True) -> Path:
    if is_hub_name(settings.base):
        return local_directory(settings.base, settings.revision, weights=weights)
    path = Path(expanded(settings.base))
    if not path.is_dir():
        raise ValueError(
            f"{settings.where}: base_model_name_or_path: {absent(path)}: let it name the directory of the model that "
            "the adapter was trained on, or owner/name of the hub"
        )
    return path


def load_adapter(directory: str | Path, *, revision: str | None = None) -> tuple[ByteTransformer, Params]:
    """Reads a directory of PEFT, and its base, as a network with adapters and its weights.

    The same function as PEFT's: ranks are padded with zeros to the largest one, and where modules have factors of their
    own, these are in B. A module without an adapter has one of zeros. ``stellarbyte_jax.lora.merge_adapters`` merges
    them into the weights.

    Args:
      directory: with ``adapter_config.json`` and ``adapter_model.safetensors``, or ``owner/name`` of the hub.
      revision: branch, tag or commit of a name of the hub.

    Returns:
      The model and its weights, float32: jax arrays, split over the mesh that is set.

    Raises:
      ValueError: a file is missing, broken or a pickle, a setting is not implemented, or tensors are unknown or do not
        fit the base; the message names them.
    """
    found = local_directory(directory, revision)
    settings = read_settings(found)
    base = _base(settings)
    model, read = _opened(found, settings, base)
    _, params = from_pretrained(base)
    params = _with_saved(params, read.saved)
    adapters, rest = split(with_adapters(model, params, jax.random.key(0)))
    filled = _filled(adapters, model, read)
    return model, merge(jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), filled, adapters), rest)


def read_adapter(
    directory: str | Path, *, base: str | Path | None = None, revision: str | None = None
) -> tuple[ByteTransformer, Params]:
    """The same network, and its adapters alone: the weights of the base are not read.

    Magnitudes of DoRA are NaN where the file has none, and what it holds whole (``lora.modules_to_save``) is left out.

    Args:
      directory: as for :func:`load_adapter`.
      base: Hugging Face directory of the base, or ``owner/name``; None: what the adapter names.
      revision: branch, tag or commit of a name of the hub.

    Returns:
      The model and arrays of numpy, float32.

    Raises:
      ValueError: as :func:`load_adapter`.
    """
    found = local_directory(directory, revision)
    settings = read_settings(found)
    where = _base(settings, weights=False) if base is None else local_directory(base, weights=False)
    model, read = _opened(found, settings, where)
    return model, _filled(split(param_shapes(model))[0], model, read)


def _opened(directory: Path, settings: Settings, base: Path) -> tuple[ByteTransformer, "_Read"]:
    """The network with the adapters of a directory, and what its tensors are."""
    _check_files(directory)
    family, config = read_config(base)
    with WeightFiles(directory, single=ADAPTER_WEIGHTS) as files:
        read = _read(files, settings, family, config, base)
    return ByteTransformer(replace(config, lora=_lora(read, settings, config))), read


def _check_files(directory: Path) -> None:
    if (directory / ADAPTER_WEIGHTS).is_file():
        return
    if (directory / _PICKLED).is_file():
        raise ValueError(
            f"{directory} holds weights only as {_PICKLED}, a pickle, which is not read because it can run code. Write "
            f'safetensors beside it once: python -c "{_FROM_PICKLE}" {directory}'
        )
    raise ValueError(f"{directory} holds {ADAPTER} and no {ADAPTER_WEIGHTS}: copy the missing file")


@dataclass(frozen=True)
class _Read:
    """What the tensors of an adapter are.

    Attributes:
      adapters: of modules.
      saved: tensors of the base that are others now.
    """

    adapters: list["_Adapter"]
    saved: list[tuple[Entry, np.ndarray]]


@dataclass(frozen=True)
class _Adapter:
    """The adapter of a module, by its matrices; ``scale`` is what it is multiplied by."""

    module: Module
    factors: list[tuple[Unit, PeftFactors]]
    scale: float


def _read(files: WeightFiles, settings: Settings, family: Family, config: ByteConfig, base: Path) -> _Read:
    parts: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for name in files.names():
        bare = name.removeprefix(PREFIX)
        if match := _PART.fullmatch(bare):
            parts.setdefault(match[1] or match[3], {})[match[2] or match[4]] = name
        else:
            whole[bare.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = name
    if config.tie_word_embeddings:
        _check_tied(parts, whole, settings)
    # Release 4 of transformers had modules for each expert, by other names in part.
    spelled = [names_of(family, config), names_of(family, config, listed=True)]
    modules = _by_stem(parts, spelled, settings)
    entries = {**spelled[1].entries, **spelled[0].entries}
    unknown = [f"{stem}.lora_*" for stem in parts if stem not in modules] + [n for n in whole if n not in entries]
    if unknown:
        raise ValueError(
            f"{files.directory / ADAPTER_WEIGHTS} holds {listed(unknown)}, which {family.architecture} of {base} does "
            f"not have: {_other_base(settings)}"
        )
    _check_shapes(files, parts, whole, modules, entries, settings, base)
    if not parts:
        raise ValueError(f"{files.directory / ADAPTER_WEIGHTS} holds no adapter (no lora_A): copy the file again")
    if settings.dora and EMBEDDING in parts:
        raise ValueError(f"{settings.where}: use_dora of an embedding is not implemented: {MERGE}")
    adapters = [_adapter(files, modules[stem], held, settings) for stem, held in parts.items()]
    saved = [(entries[name], _float32(files, stored)) for name, stored in whole.items()]
    return _Read(adapters, saved)


def _by_stem(parts: Iterable[str], spelled: list[Names], settings: Settings) -> dict[str, Module]:
    """Modules by where their tensors are; one of several parameters of a module is inside the next one."""
    found = {module.name: module for names in spelled for module in names.modules.values() if module.parameter is None}
    inside: dict[str, list[Module]] = {}
    for module in (module for names in spelled for module in names.modules.values() if module.parameter is not None):
        if module not in inside.setdefault(module.name, []):
            inside[module.name].append(module)
    for name, modules in inside.items():
        depth = sum(f"{name}{'.base_layer' * n}" in parts for n in range(len(modules)))
        if depth < len(modules):
            modules = [m for m in modules if any(_ends(m.full_name, end) for end in settings.parameters)] or modules
        for n, module in enumerate(reversed(modules)):
            found[name + ".base_layer" * n] = module
    return found


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _other_base(settings: Settings) -> str:
    return f"let base_model_name_or_path in {settings.where} name the model that it was trained on"


def _check_shapes(
    files: WeightFiles,
    parts: Mapping[str, Mapping[str, str]],
    whole: Mapping[str, str],
    modules: Mapping[str, Module],
    entries: Mapping[str, Entry],
    settings: Settings,
    base: Path,
) -> None:
    wanted: dict[str, tuple[int, ...]] = {stored: entries[name].hf_shape for name, stored in whole.items()}
    for stem, held in parts.items():
        module, needed = modules[stem], {"A", "B", *(["magnitude"] if settings.dora else [])}
        if set(held) != needed:
            raise ValueError(
                f"{files.directory / ADAPTER_WEIGHTS}: {clipped(stem)} has {listed(sorted(held))} of its adapter, and "
                f"{settings.where} asks for {listed(sorted(needed))}: copy both files again"
            )
        stored = files.shape(held["A"])
        rank = stored[0] // len(module.groups) if stored else 0
        wanted[held["A"]] = (rank * len(module.groups), module.inputs)
        wanted[held["B"]] = (module.outputs, rank * len(module.groups))
        if "magnitude" in held:
            wanted[held["magnitude"]] = (module.outputs,)
    wrong = [
        f"{clipped(name)} has shape {files.shape(name)}, the base asks for {shape}"
        for name, shape in wanted.items()
        if files.shape(name) != shape or 0 in shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(
            f"{files.directory / ADAPTER_WEIGHTS} does not fit {base}: {'; '.join(wrong[:4])}{more}: "
            f"{_other_base(settings)}"
        )


def _float32(files: WeightFiles, name: str) -> np.ndarray:
    return files.read(name).astype(np.float32)


def _adapter(files: WeightFiles, module: Module, held: Mapping[str, str], settings: Settings) -> _Adapter:
    magnitude = _float32(files, held["magnitude"]) if "magnitude" in held else None
    factors = PeftFactors(_float32(files, held["A"]), _float32(files, held["B"]), magnitude)
    rank = len(factors.a) // len(module.groups)
    said = settings.rank_of(module.full_name)
    if rank != said:
        raise ValueError(
            f"{files.directory / ADAPTER_WEIGHTS}: the adapter of {module.full_name} has rank {rank}, {settings.where} "
            f"says {said} (r, rank_pattern): copy both files again"
        )
    return _Adapter(module, module.split(factors), settings.scale_of(module.full_name, rank))


def _check_tied(parts: dict[str, dict[str, str]], whole: dict[str, str], settings: Settings) -> None:
    """Leaves out what the head has of its own, where that is what the embedding has.

    Raises:
      ValueError: one of them has an adapter that the other has not, or with another factor.
    """
    stems = (EMBEDDING, HEAD)
    if not settings.ties and any(stem in parts or f"{stem}.weight" in whole for stem in stems):
        raise ValueError(
            f"{settings.where}: ensure_weight_tying is false, so PEFT changes embedding and head apart, which are one "
            "matrix in the base: train the adapter with ensure_weight_tying=True, or merge it with PEFT into a model "
            "whose head has a matrix of its own"
        )
    scales = [settings.scale_of(stem, settings.rank_of(stem)) for stem in stems]
    if EMBEDDING in parts and scales[0] != scales[1]:
        raise ValueError(
            f"{settings.where}: rank_pattern and alpha_pattern multiply the adapter of {EMBEDDING} by {scales[0]:g} "
            f"and that of {HEAD} by {scales[1]:g}, which are one matrix in the base: give both one rank and alpha, and "
            "train the adapter again"
        )
    parts.pop(HEAD, None)
    whole.pop(f"{HEAD}.weight", None)


def _lora(read: _Read, settings: Settings, config: ByteConfig) -> LoRAConfig:
    """Settings of adapters that hold all of these."""
    held = [(unit, factors, each.scale) for each in read.adapters for unit, factors in each.factors]
    targets = {target for unit, *_ in held if (target := target_of(unit.path)) is not None}
    layers = {each.module.layer for each in read.adapters} - {None}
    rank = max(len(factors.a) for _, factors, _ in held)
    common = Counter(each.scale for each in read.adapters).most_common(1)[0][0]
    alpha = common * (rank**0.5 if settings.rslora else rank)
    if len({(len(factors.a), round(factor, 9)) for _, factors, factor in held}) > 1:
        _log.warning(
            "%s: modules have ranks or factors of their own: ranks are padded with zeros to %d, factors are in B",
            settings.where,
            rank,
        )
    no_dropout = bool(targets & {"experts", "embed"}) or (settings.dora and "head" in targets)
    some = layers and layers != set(range(config.num_hidden_layers)) and not config.moe.shared_pool
    return LoRAConfig(
        r=rank,
        lora_alpha=settings.alpha if np.isclose(alpha, settings.alpha, rtol=1e-9) else alpha,
        rslora=settings.rslora,
        dora=settings.dora,
        dropout=0.0 if no_dropout else settings.dropout,
        init="gaussian" if settings.gaussian else "kaiming",
        target_modules=tuple(sorted(targets)),
        layers=tuple(sorted(layer for layer in layers if layer is not None)) if some else None,
        modules_to_save=_kinds(read.saved, targets),
    )


def _kinds(saved: list[tuple[Entry, np.ndarray]], targets: set[str]) -> tuple[_Kind, ...]:
    """What ``lora.modules_to_save`` calls weights that are others than the base's."""
    paths = [tuple(piece.path.split("/")) for entry, _ in saved for piece in entry.pieces]

    def is_saved(kind: _Kind) -> bool:
        config = LoRAConfig(r=1, modules_to_save=(kind,))
        return kind not in targets and any(is_learnt(config, path) for path in paths)

    return tuple(kind for kind in get_args(_Kind) if is_saved(kind))


def _with_saved(params: Params, saved: list[tuple[Entry, np.ndarray]]) -> Params:
    """The base with what the adapter holds whole of it."""
    leaves = flatten(params)
    for entry, array in saved:
        for number, piece in enumerate(entry.pieces):
            ours = piece.row.layout.from_hf(array[entry.rows_of(number)], piece.shape)
            leaves[piece.path] = jnp.asarray(leaves[piece.path]).at[piece.index].set(ours)
    made: Params = {}
    for path, leaf in leaves.items():
        put_leaf(made, path, leaf)
    return made


def _filled(adapters: Params, model: ByteTransformer, read: _Read) -> Params:
    """Adapters with the numbers of the file, and zeros where it has none.

    Args:
      adapters: fresh ones, whose factors and magnitudes stay where the file has none; or shapes, of adapters without.
      model: the network.
      read: from the file.
    """
    uses, ours = flatten(param_uses(model)), model.config.lora.scale

    def before(path: str, leaf: jax.Array | jax.ShapeDtypeStruct) -> np.ndarray:
        if isinstance(leaf, jax.Array) and path.endswith((SCALE, MAGNITUDE)):
            return np.array(leaf)
        empty = {SCALE: ours, MAGNITUDE: np.nan}
        return np.full(leaf.shape, next((x for end, x in empty.items() if path.endswith(end)), 0), np.float32)

    arrays = {path: before(path, leaf) for path, leaf in flatten(adapters).items()}
    for each in read.adapters:
        for unit, found in each.factors:
            b = found.b if np.isclose(each.scale, ours, rtol=1e-9) else found.b * np.float32(each.scale / ours)
            put_factors(unit, found._replace(b=b), arrays, uses)
    made: Params = {}
    for path, array in arrays.items():
        put_leaf(made, path, array)
    return made
