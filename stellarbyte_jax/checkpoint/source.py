"""Where weights come from: a Hugging Face directory or one of PEFT, a name of the hub, or a run or its checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stellarbyte_jax.checkpoint.checksum import array_checksums
from stellarbyte_jax.checkpoint.store import TOKENIZER, CheckpointError, first_line
from stellarbyte_jax.checkpoint.weights import (
    load_base,
    load_config,
    load_weights,
    run_and_step,
    saw_plain_text,
    stored_steps,
)
from stellarbyte_jax.config import ByteConfig, TrainConfig
from stellarbyte_jax.config.paths import expanded
from stellarbyte_jax.hf.directory import from_pretrained, says_plain_text
from stellarbyte_jax.hf.hub import is_hub_name, local_directory
from stellarbyte_jax.hf.peft import base_directory, is_adapter, load_adapter
from stellarbyte_jax.hf.settings import read_config
from stellarbyte_jax.lora import as_base, kept_elsewhere, merge_adapters, split
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.trees import Params, merge, partition
from stellarbyte_jax.tokenizer.codec import load_tokenizer
from stellarbyte_jax.tokenizer.directory import TokenizerDirectory
from stellarbyte_jax.tokenizer.special import adds_bos


def tokenizer_of(run: str | Path, config: TrainConfig) -> Path:
    """The directory of a run's tokenizer: its own copy, with the ends of its texts, else that of its settings."""
    own = Path(run) / TOKENIZER
    return own if own.is_dir() else Path(config.data.tokenizer)


@dataclass(frozen=True)
class Source:
    """A directory with weights; nothing of it is read before it is asked for.

    Attributes:
      path: the Hugging Face directory, the run's, or that of an adapter of PEFT.
      is_run: whether it is a run's.
      step: checkpoint of the run; None: the newest.
    """

    path: Path
    is_run: bool
    step: int | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter of PEFT, whose base lies elsewhere."""
        return not self.is_run and is_adapter(self.path)

    def model_config(self) -> ByteConfig:
        """Settings of the model; with adapters those of :meth:`weights`.

        Raises:
          ValueError, CheckpointError: the directory is incomplete or cannot be read.
        """
        if self.is_run:
            return merged_config(load_config(self.path, self.step).model)
        return read_config(base_directory(self.path) if self.is_adapter else self.path)[1]

    def settings(self) -> tuple[ByteConfig, Path, bool]:
        """Settings of the model, directory of its tokenizer, and whether its texts begin with bos.

        Raises:
          ValueError, CheckpointError: the directory is incomplete or cannot be read.
        """
        if self.is_run:
            config = load_config(self.path, self.step)
            return merged_config(config.model), tokenizer_of(self.path, config), config.data.add_bos
        directory = self.path
        if self.is_adapter and not TokenizerDirectory(directory).is_complete:
            directory = base_directory(directory)
        return self.model_config(), directory, _begins_with_bos(directory)

    def weights(self) -> tuple[ByteConfig, Params]:
        """Settings and weights of the model; of a run the averaged ones, where it keeps an average.

        Adapters are merged into the weights, but for those that are not linear. Under ``jax.set_mesh`` the weights are
        read straight into their parts on the mesh.

        Raises:
          ValueError, CheckpointError: the directory is incomplete or cannot be read.
        """
        return merged(*self.stored())

    def stored(self) -> tuple[ByteConfig, Params]:
        """The same with adapters beside the weights, each as it is stored where it lies.

        Raises:
          ValueError, CheckpointError: the directory is incomplete or cannot be read.
        """
        if not self.is_run:
            model, params = (load_adapter if self.is_adapter else from_pretrained)(self.path)
            return model.config, params
        config, params = load_weights(self.path, self.step)
        if config.model.lora.r:
            # What was fetched from the hub may not be here, or no longer.
            named = config.init_from if config.init_from is not None and is_hub_name(config.init_from) else None
            base, _ = read_base(load_base(self.path, self.step), str(self.path), named)
            params = merge(params, partition(base, kept_elsewhere(ByteTransformer(config.model)))[0])
        return config.model, params

    def name(self) -> str:
        """Where exactly the weights lie, also when the run has gone on."""
        if not self.is_run:
            return str(self.path.absolute())
        step = stored_steps(self.path)[-1] if self.step is None else self.step
        return str(self.path.absolute() / "checkpoints" / str(step))

    def is_plain_text(self) -> bool:
        """Whether it is known that the weights saw plain text alone: those of a run, or of an export wherever it lies.

        Raises:
          ValueError, CheckpointError: the directory is incomplete or cannot be read.
        """
        if self.is_adapter:
            return False
        if not self.is_run:
            return says_plain_text(self.path)
        step = stored_steps(self.path)[-1] if self.step is None else self.step
        return saw_plain_text(load_config(self.path, step), step)


def _begins_with_bos(directory: Path) -> bool:
    if not TokenizerDirectory(directory).is_complete:
        return True
    tokenizer = load_tokenizer(directory)
    return adds_bos(directory, tokenizer.bos_id, tokenizer.eos_id)


def merged_config(config: ByteConfig) -> ByteConfig:
    """Settings of the model that :func:`merged` makes."""
    return config.without_adapters if config.lora.activation == "none" else config


def merged(config: ByteConfig, params: Params) -> tuple[ByteConfig, Params]:
    """A model with its adapters in its weights, where these are linear."""
    if not config.lora.r:
        return config, params
    model = ByteTransformer(config)
    adapters, base = split(params)
    params = merge(adapters, as_base(model, base))
    if config.lora.activation == "none":
        model, params = merge_adapters(model, params)
        return model.config, params
    return config, jax.tree.map(lambda x: x.astype(np.float32), params)


def identity(name: str, params: Params) -> dict[str, Any]:
    """What a run with adapters records of its base: where it lies, and checksums of its weights as they are stored."""
    return {"path": name, "checksums": array_checksums(params)}


def read_base(record: Mapping[str, Any], run: str, other: str | None = None) -> tuple[Params, dict[str, Any]]:
    """The base of a run's adapters, and what is to be recorded of it from now on.

    Args:
      record: :func:`identity` of it.
      run: whose it is, for messages.
      other: where it may lie now.

    Raises:
      CheckpointError: it is not there, or there are other weights.
    """
    reasons = []
    for name in filter(None, (record["path"], other)):
        try:
            source = find_source(name)
            config, params = source.stored()
        except (ValueError, OSError) as error:
            reasons.append(f"{name} cannot be read: {first_line(error)}")
            continue
        if array_checksums(params) == record["checksums"]:
            return merged(config, params)[1], {**record, "path": source.name()}
        reasons.append(f"{name} holds other weights now")
    raise CheckpointError(
        f"{run} holds adapters of the weights that lay in {record['path']}: {'; '.join(reasons)}. Put those back, or "
        "continue the run with init_from set to where they are now"
    )


def find_source(
    name: str | Path, step: int | None = None, revision: str | None = None, *, weights: bool = True
) -> Source:
    """The weights that a name means.

    Args:
      name: a Hugging Face directory, one of PEFT, ``owner/name`` of the hub, a run, or ``RUN/checkpoints/STEP``.
      step: checkpoint of a run; None for the newest, or for the one that ``name`` names.
      revision: of a name of the hub.
      weights: whether they will be asked for; else those of the hub are not fetched.

    Raises:
      ValueError: it is none of these, or a step or a revision is given where there are none.
    """
    if not is_hub_name(name):
        run, named = run_and_step(Path(expanded(name)), step)
        if (run / "checkpoints").is_dir():
            if revision is not None:
                raise ValueError(f"revision {revision!r} is of a name of the Hugging Face hub, and {name} is a run")
            return Source(run, is_run=True, step=named)
    path = local_directory(name, revision, weights=weights)
    if not (is_adapter(path) or (path / "config.json").is_file()):
        raise ValueError(
            f"{path} is neither a Hugging Face directory (config.json) nor a run directory (checkpoints/): "
            "give the output_dir of a run, or a converted model"
        )
    if step is not None:
        raise ValueError(f"a step belongs to a run directory; {name} is a Hugging Face directory")
    return Source(path, is_run=False)
