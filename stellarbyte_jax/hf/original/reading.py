"""A checkpoint of the original as a model and its weights."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stellarbyte_jax.config.foreign import clipped, listed, shown
from stellarbyte_jax.config.paths import expanded
from stellarbyte_jax.hf.files import float_dtype
from stellarbyte_jax.hf.original.checkpoint import OriginalFile, open_checkpoint
from stellarbyte_jax.hf.original.config_file import read_settings
from stellarbyte_jax.hf.original.layouts import LAYOUTS, OTHER_EMBEDDINGS, Original
from stellarbyte_jax.hf.original.settings import byte_config, settings_of_file, settings_of_tensors
from stellarbyte_jax.hf.tensors import check_tensors, read_params, table_entries
from stellarbyte_jax.model.decoder import ByteTransformer

_log = logging.getLogger(__name__)

# Tensors of what the original has beside its networks.
_LORA = re.compile(r"(.*\.)?(lora_[AB]|_orig_module)(\..*)?")
_STAND_ALONE = re.compile(r"(moe\.)?(router|experts)\..*|input_norm\.weight")
_EXPERTS = re.compile(r"(.*\.)?layers\.\d+\.(mlp\.(gate|experts|shared_experts)|moe|feed_forward\.experts)\..*")


@dataclass(frozen=True)
class Imported:
    """A model of the original.

    Attributes:
      model: the network.
      params: its weights.
      layout: of the checkpoint.
    """

    model: ByteTransformer
    params: dict[str, Any]
    layout: Original


def from_original(
    checkpoint: str | Path,
    *,
    config: str | Path | None = None,
    layout: str = "auto",
    dtype: str = "float32",
    **overrides: Any,
) -> Imported:
    """Reads a checkpoint of the original StellarByte, of July 2025 (``seed``) or December 2025 (``december``).

    The model computes what the original does: the seed's mixed rotary pairing, growing XPos factors, clamped norms,
    and the inner norm and residual of its MLP are settings of ByteConfig. Host memory holds the weights once.

    Checkpoints of the week after the seed (22 July to 6 August) have its tensors, but centred the XPos factors on the
    length of each text. What they compute follows from no file, and they are read as the seed's.

    Args:
      checkpoint: what ``torch.save`` wrote, a state dict or a checkpoint of the original's trainers with one in it, or
        the same tensors as a safetensors file. Names of wrappers (``_orig_mod.``, ``module.``) are left out.
      config: the original's settings, JSON of its config class or the YAML of its trainer. None: the shapes of the
        tensors give sizes, and other settings are the original's defaults.
      layout: ``seed``, ``december``, or ``auto`` to know it by the tensors.
      dtype: of the weights in memory: ``float32``, ``bfloat16`` or ``float16``.
      **overrides: ByteConfig settings, such as ``compute_dtype``.

    Returns:
      The model, its weights as jax arrays on the default device, and the layout. What has no effect here, and what was
      not known, is logged in one line each.

    Raises:
      ImportError: the file is torch's, and torch is not installed.
      ValueError: the file is broken or would run code, tensors are missing, unknown or misshapen, or a setting has no
        counterpart here; the message names them.
    """
    path = Path(expanded(checkpoint))
    to = float_dtype(dtype)
    with open_checkpoint(path) as tensors:
        chosen = _layout(layout, tensors)
        shared = _share_table(chosen, tensors)
        if config is None:
            where = str(path)
            stated, notes = settings_of_tensors(chosen, tensors.shapes(), tied=_is_tied(chosen, tensors))
        else:
            where = str(expanded(config))
            stated, notes = settings_of_file(chosen, tensors.shapes(), read_settings(Path(where), chosen))
        settings = byte_config(chosen, stated, overrides, where)
        for note in notes:
            _log.warning("%s: %s", where, note)
        model = ByteTransformer(settings)
        entries = table_entries(chosen.family, model, str(path), overrides)
        if shared and not settings.tie_word_embeddings:
            tensors.rename(chosen.embedding, chosen.head)  # then the embedding is missing
        tied = (chosen.embedding, chosen.head) if settings.tie_word_embeddings else None
        unused = _unused(chosen, stated, tensors)
        asks = "the original's defaults: give --config" if config is None else where
        check_tensors(entries, tensors, str(path), asks, buffers=unused, tied=tied)
        return Imported(model, read_params(entries, model, tensors, to), chosen)


def _layout(name: str, tensors: OriginalFile) -> Original:
    """The layout of that name, or the one that has these tensors; raises ValueError for those of something else."""
    if name not in ("auto", *LAYOUTS):
        raise ValueError(f"layout must be one of auto, {', '.join(LAYOUTS)}, got {shown(name)}")
    names, path = tensors.names(), tensors.path
    _refuse(path, names, _LORA, "LoRA weights", "call the original's merge_lora, then save the state dict without them")
    stand_alone = "a mixture of experts that stands alone, and the network does not use it"
    _refuse(path, names, _STAND_ALONE, stand_alone, "save the state dict of the ByteTransformer")
    _refuse(path, names, _EXPERTS, "experts", "this network has no mixture of experts, so it cannot be imported")
    for embedding, era in OTHER_EMBEDDINGS.items():
        if embedding in names:
            raise ValueError(
                f"{path} is a checkpoint of {era}, whose network is not implemented: layouts are {', '.join(LAYOUTS)}"
            )
    found = next((each for each in LAYOUTS.values() if not set(each.marks).isdisjoint(names)), None)
    if name == "auto" and found is None:
        raise ValueError(
            f"{path} holds {listed(names)}, and none of {', '.join(each.embedding for each in LAYOUTS.values())}: it "
            "is no whole model of the original"
        )
    if found is not None and name not in ("auto", found.name):
        raise ValueError(f"{path} has the layout {found.name}, not {name}: ask for auto")
    return found or LAYOUTS[name]


def _refuse(path: Path, names: list[str], pattern: re.Pattern[str], what: str, remedy: str) -> None:
    found = sorted(name for name in names if pattern.fullmatch(name))
    if found:
        raise ValueError(f"{path} holds {what} ({listed(found)}): {remedy}")


def _share_table(layout: Original, tensors: OriginalFile) -> bool:
    """Gives one table that is stored under the name of the head alone that of the embedding; whether it was so."""
    names = tensors.names()
    shared = layout.embedding not in names and layout.head in names
    if shared:
        tensors.rename(layout.head, layout.embedding)
    return shared


def _is_tied(layout: Original, tensors: OriginalFile) -> bool:
    names = tensors.names()
    if layout.head not in names or layout.embedding not in names:
        return True
    if tensors.shape(layout.head) != tensors.shape(layout.embedding):
        return False
    return np.array_equal(tensors.read(layout.head), tensors.read(layout.embedding))


def _unused(layout: Original, stated: Mapping[str, Any], tensors: OriginalFile) -> tuple[str, ...]:
    patterns = layout.unused(stated)
    found = [name for name in tensors.names() if any(re.fullmatch(pattern, name) for pattern in patterns)]
    if found:
        _log.warning("%s: the network does not use %s, with these settings", tensors.path, clipped(listed(found)))
    return patterns
