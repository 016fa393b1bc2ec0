"""A model as it is used: network, weights, tokenizer, and how its texts begin and end."""

from dataclasses import dataclass
from pathlib import Path

from stellarbyte_jax.checkpoint.weights import load_weights, run_and_step
from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.hf.directory import from_pretrained
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.trees import Params
from stellarbyte_jax.tokenizer.codec import Tokenizer, check_vocabulary, load_tokenizer
from stellarbyte_jax.tokenizer.special import adds_bos, stop_ids

TOKENIZER = "tokenizer"  # the folder of a run that holds its tokenizer


def tokenizer_of(run: str | Path, config: TrainConfig) -> Path:
    """The directory of a run's tokenizer: its own copy, with the ends of its texts, else that of its settings."""
    own = Path(run) / TOKENIZER
    return own if own.is_dir() else Path(config.data.tokenizer)


@dataclass(frozen=True)
class Bundle:
    """What a directory holds of a model.

    Attributes:
      model: the network.
      params: its weights.
      tokenizer: the model's.
      stop_ids: ids that end a text.
      add_bos: whether texts begin with bos.
    """

    model: ByteTransformer
    params: Params
    tokenizer: Tokenizer
    stop_ids: list[int]
    add_bos: bool


def load_bundle(path: str | Path, step: int | None = None) -> Bundle:
    """Loads a Hugging Face directory, a run directory or ``RUN/checkpoints/STEP``.

    Args:
      path: the directory.
      step: checkpoint of a run; None for the newest, or for the one that ``path`` names.

    Raises:
      ValueError: the directory is neither, is incomplete, or its tokenizer is larger than the model.
      CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        if step is not None:
            raise ValueError(f"a step belongs to a run directory; {path} is a Hugging Face directory")
        model, params = from_pretrained(path)
        tokenizer = load_tokenizer(path)
        add_bos = adds_bos(path, tokenizer.bos_id, tokenizer.eos_id)
    else:
        run, step = run_and_step(path, step)
        if not (run / "checkpoints").is_dir():
            raise ValueError(
                f"{path} is neither a Hugging Face directory (config.json) nor a run directory (checkpoints/): "
                "give the output_dir of a run, or a converted model"
            )
        config, params = load_weights(run, step)
        model = ByteTransformer(config.model)
        tokenizer = load_tokenizer(tokenizer_of(run, config))
        add_bos = config.data.add_bos
    check_vocabulary(tokenizer, model.config.vocab_size)
    # An end that the model has no row for never comes.
    ends = [i for i in stop_ids(tokenizer.path, tokenizer.eos_id) if 0 <= i < model.config.vocab_size]
    return Bundle(model, params, tokenizer, ends, add_bos)
