"""A model as it is used: network, weights, tokenizer, and how its texts begin and end."""

from dataclasses import dataclass
from pathlib import Path

from stellarbyte_jax.checkpoint.source import find_source
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.trees import Params
from stellarbyte_jax.tokenizer.codec import Tokenizer, check_vocabulary, load_tokenizer
from stellarbyte_jax.tokenizer.special import stop_ids


@dataclass(frozen=True)
class Bundle:
    """What a directory holds of a model.

    Attributes:
      model: the network.
      params: its weights.
      tokenizer: the model's.
      stop_ids: ids that end a text.
      add_bos: whether texts begin with bos.
      plain_text: whether it is known that they were trained on plain text alone, not on conversations.
    """

    model: ByteTransformer
    params: Params
    tokenizer: Tokenizer
    stop_ids: list[int]
    add_bos: bool
    plain_text: bool


def load_bundle(path: str | Path, step: int | None = None, *, revision: str | None = None) -> Bundle:
    """Loads a Hugging Face directory or one of PEFT, a name of the hub, a run directory or ``RUN/checkpoints/STEP``.

    Under ``jax.set_mesh`` the weights are read straight into their parts on the mesh.

    Args:
      path: the directory, or ``owner/name``; which is which, says :func:`hf.hub.is_hub_name`.
      step: checkpoint of a run; None for the newest, or for the one that ``path`` names.
      revision: branch, tag or commit of a name of the hub.

    Raises:
      ValueError: the directory is neither, is incomplete, or its tokenizer is larger than the model.
      CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    source = find_source(path, step, revision)
    _, directory, add_bos = source.settings()
    config, params = source.weights()
    tokenizer = load_tokenizer(directory)
    check_vocabulary(tokenizer, config.vocab_size)
    # An end that the model has no row for never comes.
    ends = [i for i in stop_ids(tokenizer.path, tokenizer.eos_id) if 0 <= i < config.vocab_size]
    return Bundle(ByteTransformer(config), params, tokenizer, ends, add_bos, source.is_plain_text())
