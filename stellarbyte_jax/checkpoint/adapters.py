"""Adapters of a run or of a directory of PEFT, without the weights of their base."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stellarbyte_jax.checkpoint.source import find_source, tokenizer_of
from stellarbyte_jax.checkpoint.weights import load_base, load_config, load_weights
from stellarbyte_jax.hf.peft import read_adapter
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.lora import is_adapter
from stellarbyte_jax.model.trees import Params
from stellarbyte_jax.tokenizer.codec import Tokenizer, load_tokenizer
from stellarbyte_jax.tokenizer.directory import TokenizerDirectory


@dataclass(frozen=True)
class Adapters:
    """Adapters as they were trained.

    Attributes:
      model: the network with adapters.
      params: its weights, or its adapters alone.
      checksums: of the weights of their base, see ``checksum.array_checksums``; None where they are not known.
    """

    model: ByteTransformer
    params: Params
    checksums: Mapping[str, int] | None = None


def read_adapters(
    path: str | Path,
    *,
    step: int | None = None,
    revision: str | None = None,
    base: str | Path | None = None,
) -> Adapters:
    """Reads the adapters of a run, its newest checkpoint or another one, or of a directory of PEFT.

    Args:
      path: the run, ``RUN/checkpoints/STEP``, the directory of PEFT, or ``owner/name`` of the hub.
      step: checkpoint of a run; None for the newest, or for the one that ``path`` names.
      revision: branch, tag or commit of a name of the hub.
      base: of an adapter of PEFT, the directory of its base, or ``owner/name``; None: what the adapter names. Only its
        settings are read.

    Raises:
      ValueError: there are no adapters, or files of PEFT are broken.
      CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    source = find_source(path, step, revision, weights=False)
    if source.is_adapter:
        return Adapters(*read_adapter(path, base=base, revision=revision))
    if not source.is_run:
        raise ValueError(f"{path} holds a whole model and no adapter (no adapter_config.json): generate with it itself")
    config, params = load_weights(source.path, source.step)
    if not config.model.lora.r:
        raise ValueError(f"{path} is a run without adapters, of all weights: generate with it itself")
    checksums = load_base(source.path, source.step)["checksums"]
    if any(is_adapter(tuple(path.split("/"))) for path in checksums):
        checksums = None  # the base has adapters itself, so that its weights as they are used have others
    return Adapters(ByteTransformer(config.model), params, checksums)


def tokenizer_of_adapters(path: str | Path) -> Tokenizer | None:
    """The tokenizer with the chat template and the ends that adapters were trained with; None: it is the base's.

    Args:
      path: as for :func:`read_adapters`.

    Raises:
      ValueError: it is none of these, or files of the tokenizer are broken.
      CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    source = find_source(path, weights=False)
    if source.is_run:
        return load_tokenizer(tokenizer_of(source.path, load_config(source.path, source.step)))
    return load_tokenizer(source.path) if TokenizerDirectory(source.path).is_complete else None
