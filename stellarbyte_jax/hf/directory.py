"""Hugging Face directories: :func:`from_pretrained` and :func:`save_pretrained`."""

import contextlib
import itertools
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import jax
import numpy as np

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.config.foreign import clipped, listed
from stellarbyte_jax.config.paths import expanded
from stellarbyte_jax.hf.card import CARD, TrainingFacts, model_card
from stellarbyte_jax.hf.export import export_family
from stellarbyte_jax.hf.files import Tensor, WeightFiles, float_dtype, replacing, write_json, write_tensors
from stellarbyte_jax.hf.hub import ADAPTER, local_directory
from stellarbyte_jax.hf.layout import cast, interleaved_to_half
from stellarbyte_jax.hf.leaves import Leaves, leaf_after_leaf
from stellarbyte_jax.hf.settings import config_json, generation_json, read_config
from stellarbyte_jax.hf.spelling import Headers, as_spelled
from stellarbyte_jax.hf.table import Entry, Family, Piece, modelling_file
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes
from stellarbyte_jax.model.lazy import LazyArray, as_numpy
from stellarbyte_jax.model.state.router import TRACKED, first_values, is_tracked
from stellarbyte_jax.tokenizer.directory import (
    GENERATION_CONFIG,
    TokenizerDirectory,
    copy_tokenizer,
    limit_length,
    spell_for_older,
)
from stellarbyte_jax.tokenizer.special import special_ids

_log = logging.getLogger(__name__)

# In the metadata of the weights' files, not in config.json: programs that train weights further write these files anew
# without it, but keep what they do not know of config.json.
_TRAINED_ON, _PLAIN_TEXT = "trained_on", "plain text"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def from_pretrained(
    directory: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    verify: bool = True,
    **overrides: Any,
) -> tuple[ByteTransformer, dict[str, Any]]:
    """Reads a Hugging Face directory of a known family (``hf.families``) as a model and its weights.

    Host memory holds the weights once, plus one of their leaves.

    Args:
      directory: with ``config.json`` and safetensors files, or ``owner/name`` of the hub, whose files are fetched into
        its cache; which of them it is, says ``hf.hub.is_hub_name``.
      revision: branch, tag or commit of a name of the hub.
      dtype: of the weights in memory: ``float32``, ``bfloat16`` or ``float16``.
      verify: tensors are compared with their checksums, where the files have them (those of save_pretrained do).
      **overrides: ByteConfig settings, above all those that a checkpoint does not know, such as ``compute_dtype``.
        Whole sections, such as ``rope_scaling`` or ``cache``, as objects or mappings.

    Returns:
      The model and its weights, jax arrays on the default device.

    Raises:
      ValueError: a file is missing, broken or damaged, a setting is not implemented, or tensors are missing, unknown or
        misshapen; the message names them.
    """
    with open_pretrained(directory, revision=revision, dtype=dtype, verify=verify, **overrides) as (model, leaves):
        return model, _on_device(leaves)


@contextlib.contextmanager
def open_pretrained(
    directory: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    verify: bool = True,
    **overrides: Any,
) -> Iterator[tuple[ByteTransformer, dict[str, Any]]]:
    """As :func:`from_pretrained`, but gives weights that are read when they are needed, within the context.

    Yields:
      The model and its weights, a :class:`~stellarbyte_jax.model.lazy.LazyArray` each. A read raises ValueError where
      the tensors of a weight are damaged or do not fit the dtype.
    """
    directory = local_directory(directory, revision)
    _check_no_run(directory)
    _check_no_adapter(directory)
    family, config = read_config(directory)
    config = ByteConfig(**(config.to_dict() | overrides))
    model = ByteTransformer(config)
    to = float_dtype(dtype)
    with WeightFiles(directory, verify=verify) as files:
        if config.tie_word_embeddings and _EMBEDDING not in files.names():
            files.rename(_HEAD, _EMBEDDING)  # one table, which may be stored under either name
        family = as_spelled(family, config, files, str(directory))
        entries = table_entries(family, model, str(directory), overrides)
        tied = (_EMBEDDING, _HEAD) if config.tie_word_embeddings else None
        check_tensors(entries, files, str(directory), "config.json", buffers=family.buffers, tied=tied)
        yield model, _lazy_params(entries, model, files, to)


def save_pretrained(
    directory: str | Path,
    model: ByteTransformer,
    params: Mapping[str, Any],
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: str | Path | None = None,
    ids: Mapping[str, int | list[int]] = MappingProxyType({}),
    overwrite: bool = False,
    training: TrainingFacts | None = None,
    family: str | None = None,
) -> None:
    """Writes a model as a Hugging Face directory that ``AutoModelForCausalLM`` loads.

    As the most widely read family that computes the same. Where none of transformers' own does, the directory holds a
    modelling file of ours, and readers say ``trust_remote_code=True``.

    A ``README.md`` in it says what the model is, as a card of the Hugging Face Hub. The directory appears complete or
    not at all. Tensors are converted and written one after another, those of a leaf after those of another one; a lazy
    leaf is in memory from its first tensor to its last.

    Args:
      directory: to be made.
      model: any without a memory and without pruned attention weights.
      params: its weights, arrays of numpy or jax, or lazy ones.
      dtype: of the numbers on disk: ``float32``, ``bfloat16`` or ``float16``.
      max_shard_bytes: size at which another file is begun.
      tokenizer: directory whose tokenizer files are copied and whose special tokens are named in the settings.
      ids: special tokens that go before those, such as ``{"eos_token_id": [1, 2]}``.
      overwrite: an earlier export there is replaced, its README.md too.
      training: facts for the README.md, where the run is known; weights say themselves that they saw plain text alone.
      family: the family's ``model_type``; None to have it chosen.

    Raises:
      ValueError: no family can express the model, the weights are another model's or do not fit the dtype, or the
        directory is not empty.
    """
    config = model.config
    read = None if tokenizer is None else TokenizerDirectory(tokenizer)
    shapes = _shapes(param_shapes(model))
    leaves = _flatten(params)
    _check_params(leaves, shapes)
    rule = read.library_settings() if read is not None and read.is_complete else None
    chosen = export_family(config, family, rule, biased=_has_router_biases(leaves))
    to = float_dtype(dtype)
    named = {**({} if tokenizer is None else special_ids(tokenizer, config.vocab_size)), **ids}
    reordered = config.rope_pairing not in chosen.pairings
    entries = leaf_after_leaf(chosen.entries(config, shapes))
    _tell_left_out(chosen, entries, leaves)
    parts = Leaves(leaves, entries)
    tensors = [
        Tensor(entry.theirs, entry.hf_shape, entry.dtype(to), _reader(entry, parts, entry.dtype(to), reordered))
        for entry in entries
    ]
    with replacing(Path(expanded(directory)), overwrite) as partial:
        write_json(partial / "config.json", config_json(chosen, config, dtype, named))
        if chosen.modelling_file is not None:
            shutil.copyfile(modelling_file(chosen.modelling_file), partial / chosen.modelling_file)
        copied = [] if tokenizer is None else copy_tokenizer(tokenizer, partial, ids)
        if config.rope_scaling.name == "none":  # with another one, texts may be longer than the settings say
            limit_length(partial, config.max_position_embeddings)
        spell_for_older(partial)
        if GENERATION_CONFIG not in copied:
            write_json(partial / GENERATION_CONFIG, generation_json(named))
        card = model_card(
            config,
            architecture=chosen.architecture,
            own_code=chosen.modelling_file is not None,
            parameters=_weights(chosen.entries(config, shapes)),
            dtype=dtype,
            has_tokenizer=TokenizerDirectory(partial).is_complete,
            training=training,
        )
        (partial / CARD).write_text(card, encoding="utf-8")
        plain = training is not None and training.plain_text
        write_tensors(partial, tensors, max_shard_bytes, {_TRAINED_ON: _PLAIN_TEXT} if plain else {})


def says_plain_text(directory: Path) -> bool:
    """Whether an export says that its weights saw plain text alone; those of other programs say nothing.

    Raises:
      ValueError: its weights are missing or unreadable.
    """
    with WeightFiles(directory, verify=False) as files:
        return files.metadata(_TRAINED_ON) == _PLAIN_TEXT


def round_params(params: Mapping[str, Any], dtype: str, family: Family) -> dict[str, Any]:
    """The weights, lazy ones too, as a directory of a family, saved in ``dtype``, holds them, back in float32."""
    to = float_dtype(dtype)
    rounded: dict[str, Any] = {}
    for path, leaf in _flatten(params).items():
        stored = np.dtype(np.float32) if family.keeps_float32(path) else to
        _put(rounded, path, cast(as_numpy(leaf), stored, path).astype(np.float32))
    return rounded


def _check_no_run(directory: Path) -> None:
    """Raises ValueError where a run, or a checkpoint of one, was given."""
    inside = directory.absolute().parent.name == "checkpoints"
    run = directory.absolute().parents[1] if inside else directory
    if (directory / "config.json").is_file() or not (run / "checkpoints").is_dir():
        return
    exported = run / "hf"
    hint = f", or give its export {exported}" if (exported / "config.json").is_file() else ""
    raise ValueError(
        f"{directory} is a {'checkpoint of a run' if inside else 'run directory'}, not a Hugging Face directory: load "
        f"it with stellarbyte_jax.load_run({str(directory)!r}){hint}"
    )


def _check_no_adapter(directory: Path) -> None:
    """Raises ValueError where transformers would apply an adapter of PEFT to the weights, if there are any at all."""
    if (directory / ADAPTER).is_file():
        raise ValueError(
            f"{directory} holds an adapter of PEFT ({ADAPTER}), which is not applied here: merge it once with "
            "AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW_DIR), or remove its "
            "files where the weights hold it already"
        )


def _has_router_biases(leaves: Mapping[str, Any]) -> bool:
    """Whether a router chooses experts by biases that were learned without a loss."""
    return any(path.endswith(f"/{TRACKED}/bias") and as_numpy(leaf).any() for path, leaf in leaves.items())


def _tell_left_out(family: Family, entries: list[Entry], leaves: Mapping[str, Any]) -> None:
    """Logs which weights the export lacks: those of training alone, or the family would not have been chosen."""
    covered = {piece.path for entry in entries for piece in entry.pieces}
    left_out = sorted(path for path in leaves.keys() - covered if not is_tracked(path))
    if left_out:
        _log.warning(
            "a %s directory has no place for weights of training alone: %s", family.model_type, listed(left_out)
        )


def _weights(entries: Iterable[Entry]) -> int:
    """How many numbers they hold, without what routers keep from step to step."""
    trained = (entry for entry in entries if not any(is_tracked(piece.path) for piece in entry.pieces))
    return sum(math.prod(entry.hf_shape) for entry in trained)


def _reader(entry: Entry, leaves: Leaves, dtype: np.dtype, reordered: bool) -> Callable[[], np.ndarray]:
    def part(piece: Piece) -> np.ndarray:
        ours = leaves.take(piece)
        if piece.row.rotary and reordered:
            ours = interleaved_to_half(ours)
        return piece.row.layout.to_hf(cast(ours, dtype, entry.theirs))

    def read() -> np.ndarray:
        parts = [part(piece) for piece in entry.pieces]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    return read


class Tensors(Headers, Protocol):
    """Foreign tensors by name."""

    def read(self, name: str) -> np.ndarray:
        """A tensor as it is stored, whole."""
        ...


def table_entries(family: Family, model: ByteTransformer, where: str, overrides: Mapping[str, Any]) -> list[Entry]:
    """The tensors from which a model is read; every one of our leaves must be in some of them, or begin anew.

    Raises:
      ValueError: ``overrides`` ask for weights that the family does not have.
    """
    shapes = _shapes(param_shapes(model))
    entries = list(family.entries(model.config, shapes))
    covered = {piece.path for entry in entries for piece in entry.pieces}
    foreign = sorted(path for path in set(shapes) - covered if not is_tracked(path))
    if foreign:
        raise ValueError(
            f"{where}: the settings ask for weights that {family.architecture} does not have: "
            f"{', '.join(foreign)}. Leave out the settings that make them ({', '.join(overrides)})"
        )
    return entries


def check_tensors(
    entries: list[Entry],
    tensors: Tensors,
    where: str,
    settings: str,
    *,
    buffers: tuple[str, ...] = (),
    tied: tuple[str, str] | None = None,
) -> None:
    """Every tensor of the table exists in its shape, and there is no other one.

    Args:
      entries: the table.
      tensors: what there is.
      where: names them in messages.
      settings: names what the table follows from.
      buffers: patterns of others that there may be.
      tied: names of embedding and head where they are one: the head may be there too, if it is equal.

    Raises:
      ValueError: it is otherwise.
    """
    wanted = {entry.theirs: entry.hf_shape for entry in entries}
    present = set(tensors.names())
    unknown = sorted(name for name in present - set(wanted) if not any(re.fullmatch(b, name) for b in buffers))
    if tied is not None and tied[1] in unknown and tied[0] in present:
        embedding, head = tied
        if not np.array_equal(tensors.read(head), tensors.read(embedding)):
            raise ValueError(
                f"{where}: tie_word_embeddings is true, but {head} differs from {embedding}. "
                f"Set tie_word_embeddings to false in {settings} to keep both"
            )
        unknown.remove(head)
    missing = [f"missing {name}" for name in wanted if name not in present]
    # In turn, so that a prefix of all names shows.
    pairs = itertools.zip_longest(missing, [f"unknown {name}" for name in unknown])
    problems = [problem for pair in pairs for problem in pair if problem is not None]
    problems += [
        f"{name} has shape {tensors.shape(name)}, the settings ask for {shape}"
        for name, shape in wanted.items()
        if name in present and tensors.shape(name) != shape
    ]
    _raise(problems, f"{where}: the tensors do not fit {settings}")


def read_params(entries: list[Entry], model: ByteTransformer, tensors: Tensors, dtype: np.dtype) -> dict[str, Any]:
    """The parameter tree, jax arrays of ``dtype`` on the default device, from tensors that were checked."""
    return _on_device(_lazy_params(entries, model, tensors, dtype))


def _on_device(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: jax.device_put(leaf.read()), leaves)


def _lazy_params(entries: list[Entry], model: ByteTransformer, tensors: Tensors, dtype: np.dtype) -> dict[str, Any]:
    """The parameter tree of arrays that are read when they are asked for.

    What routers keep from step to step begins anew where no tensor has it.
    """
    shapes = _shapes(param_shapes(model))
    places: dict[str, list[tuple[Entry, int]]] = {}
    for entry in entries:
        for number, piece in enumerate(entry.pieces):
            places.setdefault(piece.path, []).append((entry, number))
    params: dict[str, Any] = {}
    for path, parts in places.items():
        _put(params, path, LazyArray(shapes[path], dtype, partial(_read_leaf, parts, shapes[path], tensors, dtype)))
    for path in shapes.keys() - places.keys():
        first = first_values(model.config.moe.num_experts)[path.rpartition("/")[2]]
        _put(params, path, LazyArray(shapes[path], dtype, partial(np.full, shapes[path], first, dtype)))
    return params


def _read_leaf(parts: list[tuple[Entry, int]], shape: tuple[int, ...], tensors: Tensors, dtype: np.dtype) -> np.ndarray:
    leaf = _aligned_zeros(shape, dtype)
    for entry, number in parts:
        piece = entry.pieces[number]
        theirs = cast(tensors.read(entry.theirs)[entry.rows_of(number)], dtype, entry.theirs)
        leaf[piece.index] = piece.row.layout.from_hf(theirs, piece.shape)
    return leaf


def _check_params(leaves: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    problems = [f"missing {path}" for path in shapes if path not in leaves]
    problems += [f"unknown {path}" for path in leaves if path not in shapes]
    problems += [
        f"{path} has shape {leaves[path].shape}, the settings ask for {shape}"
        for path, shape in shapes.items()
        if path in leaves and leaves[path].shape != shape
    ]
    _raise(problems, "the weights do not fit the model's settings")


def _raise(problems: list[str], summary: str) -> None:
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{summary}: {'; '.join(clipped(problem) for problem in problems[:8])}{more}")


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """On CPU jax takes over an array that starts at a multiple of 64 bytes, and copies any other one.

    Zeros, because the padding of the vocabulary stays as it is.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    room = np.zeros(nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + nbytes].view(dtype).reshape(shape)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return leaves


def _shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in _flatten(tree).items()}


def _put(tree: dict[str, Any], path: str, leaf: Any) -> None:
    *parents, last = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = leaf
