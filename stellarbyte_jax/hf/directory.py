"""Hugging Face directories: :func:`from_pretrained` and :func:`save_pretrained`."""

import contextlib
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.config.foreign import listed
from stellarbyte_jax.config.paths import expanded
from stellarbyte_jax.hf.card import CARD, TrainingFacts, model_card
from stellarbyte_jax.hf.export import export_family
from stellarbyte_jax.hf.files import Tensor, WeightFiles, float_dtype, replacing, write_json, write_tensors
from stellarbyte_jax.hf.hub import ADAPTER, local_directory
from stellarbyte_jax.hf.layout import cast, interleaved_to_half
from stellarbyte_jax.hf.leaves import Leaves, leaf_after_leaf
from stellarbyte_jax.hf.settings import config_json, generation_json, read_config
from stellarbyte_jax.hf.spelling import as_spelled
from stellarbyte_jax.hf.table import Entry, Family, Piece, modelling_file
from stellarbyte_jax.hf.tensors import (
    check_params,
    check_tensors,
    flatten,
    lazy_params,
    on_devices,
    put_leaf,
    shapes_of,
    table_entries,
)
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes
from stellarbyte_jax.model.lazy import as_numpy
from stellarbyte_jax.model.state.router import TRACKED, is_tracked
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

    Under ``jax.set_mesh`` they go straight into their parts, as ``place_weights`` puts them: a device gets its own part
    alone, and host memory holds one layer of one leaf. Otherwise it holds the weights once, plus one of their leaves.

    Args:
      directory: with ``config.json`` and safetensors files, or ``owner/name`` of the hub, whose files are fetched into
        its cache; which of them it is, says ``hf.hub.is_hub_name``.
      revision: branch, tag or commit of a name of the hub.
      dtype: of the weights in memory: ``float32``, ``bfloat16`` or ``float16``. Whatever it is, what routers keep from
        step to step is float32, and in directories of the project's own family whole routers and rates of XPos are.
      verify: tensors are compared with their checksums, where the files have them (those of save_pretrained do).
      **overrides: ByteConfig settings, above all those that a checkpoint does not know, such as ``compute_dtype``.
        Whole sections, such as ``rope_scaling`` or ``cache``, as objects or mappings.

    Returns:
      The model and its weights, jax arrays split over the mesh that is set, or on the default device.

    Raises:
      ValueError: a file is missing, broken or damaged, a setting is not implemented, or tensors are missing, unknown or
        misshapen; the message names them.
    """
    with open_pretrained(directory, revision=revision, dtype=dtype, verify=verify, **overrides) as (model, leaves):
        return model, on_devices(model, leaves)


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
        yield model, lazy_params(entries, model, files, to)


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
    write: bool = True,
) -> None:
    """Writes a model as a Hugging Face directory that ``AutoModelForCausalLM`` loads.

    As the most widely read family that computes the same. Where none of transformers' own does, the directory holds a
    modelling file of ours, and readers say ``trust_remote_code=True``.

    A ``README.md`` in it says what the model is, as a card of the Hugging Face Hub. The directory appears complete or
    not at all. Tensors are converted and written one after another, those of a leaf after those of another one; a lazy
    leaf is in memory from its first tensor to its last. Of weights that are split over a mesh, a tensor at a time is
    gathered.

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
      write: whether this process writes. Where the weights lie on the devices of several, all call this with the same
        arguments, and one of them writes; the others only give it their parts, and hold none.

    Raises:
      ValueError: no family can express the model, the weights are another model's or do not fit the dtype, or the
        directory is not empty.
    """
    config = model.config
    read = None if tokenizer is None else TokenizerDirectory(tokenizer)
    shapes = shapes_of(param_shapes(model))
    leaves = flatten(params)
    check_params(leaves, shapes)
    rule = read.library_settings() if read is not None and read.is_complete else None
    chosen = export_family(config, family, rule, biased=_has_router_biases(leaves))
    to = float_dtype(dtype)
    named = {**({} if tokenizer is None else special_ids(tokenizer, config.vocab_size)), **ids}
    reordered = config.rope_pairing not in chosen.pairings
    entries = leaf_after_leaf(chosen.entries(config, shapes))
    _tell_left_out(chosen, entries, leaves)
    parts = Leaves(leaves, entries)
    if not write:
        for piece in (piece for entry in entries for piece in entry.pieces):
            parts.give(piece)
        return
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
    for path, leaf in flatten(params).items():
        stored = np.dtype(np.float32) if family.keeps_float32(path) else to
        put_leaf(rounded, path, cast(as_numpy(leaf), stored, path).astype(np.float32))
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
            f"{directory} holds an adapter of PEFT ({ADAPTER}), which is not applied here: load it onto its base with "
            f"stellarbyte_jax.load_run({str(directory)!r}), or remove its files where the weights hold it already"
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
