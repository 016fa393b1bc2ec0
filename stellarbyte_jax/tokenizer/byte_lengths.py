"""How many bytes of text each token of a vocabulary stands for."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stellarbyte_jax.config.foreign import clipped
from stellarbyte_jax.tokenizer.directory import LIBRARY, TokenizerDirectory, vocabulary_size

_SPACE = "\u2581"  # SentencePiece's mark
_LARGEST_VOCABULARY = 2**24  # one id of a broken file could ask for all memory
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def token_byte_lengths(path: str | Path) -> np.ndarray | None:
    """UTF-8 bytes of text that each token id stands for, int32 [vocabulary]; special tokens count 0.

    The vocabulary is that of ``load_tokenizer``, with the tokens that only other files add.

    None where that is not known: neither a byte-level vocabulary nor one of SentencePiece's kind, whose tokens spell
    bytes as ``<0x41>`` and spaces as a mark of their own.

    Args:
      path: the tokenizer's directory.

    Raises:
      ValueError: the directory is unreadable.
    """
    directory = TokenizerDirectory(path)
    settings = directory.library_settings()
    try:
        lengths = _byte_lengths(settings)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # an object where a list belongs, and the like
        raise ValueError(
            f"{Path(path) / LIBRARY} is not a tokenizer whose tokens can be read "
            f"({type(error).__name__}: {clipped(str(error))}): copy the file again"
        ) from None
    if lengths is None:
        return None
    added = directory.read_library()[1].get_added_tokens_decoder()
    lengths = np.concatenate([lengths, np.zeros(max(0, vocabulary_size(added) - len(lengths)), np.int32)])
    for number, token in added.items():
        lengths[number] = 0 if token.special else len(token.content.encode())
    return lengths


def _byte_lengths(settings: Mapping[str, Any]) -> np.ndarray | None:
    vocabulary = _vocabulary(settings)
    count = _byte_counter(settings.get("decoder") or {})
    if vocabulary is None or count is None:
        return None
    ids = vocabulary.values()
    if not all(type(i) is int and 0 <= i < _LARGEST_VOCABULARY for i in ids):
        raise ValueError(f"ids must be integers from 0 to {_LARGEST_VOCABULARY - 1}")
    lengths = np.zeros(vocabulary_size(ids), np.int32)
    for token, number in vocabulary.items():
        lengths[number] = count(token)
    return lengths


def _vocabulary(settings: Mapping[str, Any]) -> dict[str, int] | None:
    """Token -> id of a model of the tokenizers library; None for a kind without."""
    tokens = settings["model"].get("vocab")
    if isinstance(tokens, list):  # Unigram: pairs of token and score
        return {token: number for number, (token, _) in enumerate(tokens)}
    return tokens


def _byte_counter(decoder: Mapping[str, Any]) -> Callable[[str], int] | None:
    """How many bytes of text a token of the vocabulary spells, by how tokens are decoded; None where it is unknown."""
    parts = {part.get("type"): part for part in (decoder, *decoder.get("decoders", []))}
    if "ByteLevel" in parts:
        return len  # each byte is one character
    if "ByteFallback" not in parts and "Metaspace" not in parts:
        return None
    space = parts.get("Metaspace", {}).get("replacement", _SPACE)

    def count(token: str) -> int:
        return 1 if _BYTE.fullmatch(token) else len(token.replace(space, " ").encode())

    return count
