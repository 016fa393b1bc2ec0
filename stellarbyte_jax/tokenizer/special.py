"""Ids of special tokens: which ones a directory names, which of them end a text, and whether bos begins one."""

import logging
from collections.abc import Mapping
from pathlib import Path

from stellarbyte_jax.config.foreign import shown
from stellarbyte_jax.tokenizer.directory import CONFIG, LIBRARY, SPECIAL_TOKENS, TokenizerDirectory, vocabulary_size

_log = logging.getLogger(__name__)


def named_ids(directory: TokenizerDirectory, vocabulary: Mapping[str, int]) -> dict[str, int]:
    """Ids of the special tokens that the tokenizer's own files name, such as ``{"eos_token_id": 2}``.

    Args:
      directory: whose files are read.
      vocabulary: token -> id, added tokens included.

    Raises:
      ValueError: a named token is not in the vocabulary, or a file is broken.
    """
    ids = {}
    for name, token in directory.special_tokens().items():
        if name not in SPECIAL_TOKENS:
            continue
        if token not in vocabulary:
            raise ValueError(f"{directory.path}: {name} is {shown(token)}, which {LIBRARY} does not hold")
        ids[f"{name}_id"] = vocabulary[token]
    return ids


def special_ids(path: str | Path, vocab_size: int) -> dict[str, int | list[int]]:
    """Ids of special tokens under their names in a model's ``config.json``.

    What the directory's ``generation_config.json`` says goes first: there may be several ends of a text. Without a
    ``tokenizer.json`` it is all that can be said. Ids that the model has no row for are left out.

    Args:
      path: the tokenizer's directory, with ``tokenizer.json`` or any other of its files.
      vocab_size: of the model.

    Raises:
      ValueError: there is no file of a tokenizer, it is larger than the model's vocabulary, or it lacks a special
        token.
    """
    directory = TokenizerDirectory(path)
    stated = _with_rows(directory.generation_ids(), vocab_size)
    if directory.files and not directory.has_library:
        return stated
    vocabulary: dict[str, int] = directory.read_library()[1].get_vocab(with_added_tokens=True)
    size = vocabulary_size(vocabulary.values())
    if size > vocab_size:
        raise ValueError(
            f"{directory.path / LIBRARY} has {size} tokens, the model's vocab_size is {vocab_size}: "
            "this tokenizer belongs to another model, or the model's vocabulary must be resized"
        )
    return {**named_ids(directory, vocabulary), **stated}


def _with_rows(stated: Mapping[str, int | list[int]], vocab_size: int) -> dict[str, int | list[int]]:
    """Without the ids that a model of this size has no row for, such as -1 for no padding."""
    rows = {name: [i for i in as_list(ids) if 0 <= i < vocab_size] for name, ids in stated.items()}
    return {name: ids if isinstance(stated[name], list) else ids[0] for name, ids in rows.items() if ids}


def stop_ids(path: str | Path, eos_id: int | None) -> list[int]:
    """Ids that end a text: the tokenizer's eos, then those of the directory's model settings.

    Raises:
      ValueError: that file is not a JSON object, or holds something else than ids.
    """
    stated = TokenizerDirectory(path).generation_ids().get("eos_token_id", [])
    return list(dict.fromkeys([] if eos_id is None else [eos_id]) | dict.fromkeys(as_list(stated)))


def as_list(ids: int | list[int]) -> list[int]:
    """One id or several, as a list."""
    return ids if isinstance(ids, list) else [ids]


def kept_ids(before: str | Path, tokenizer: str | Path, vocab_size: int) -> dict[str, int | list[int]]:
    """Ids that the settings of a model state, and that hold with a tokenizer from elsewhere which states none.

    Both tokenizers must spell an id alike, where both have a ``tokenizer.json``, and the model must have a row for it.
    What the tokenizer's own files name goes first; its eos is one of the ends.

    Args:
      before: the model's directory, or the ``tokenizer`` folder of its run.
      tokenizer: the directory of the tokenizer from now on.
      vocab_size: of the model from now on.

    Raises:
      ValueError: a file is missing or broken.
    """
    old, new = TokenizerDirectory(before), TokenizerDirectory(tokenizer)
    stated = old.generation_ids()
    if not stated or new.generation_ids():
        return {}
    earlier = old.read_library()[1] if old.has_library else None
    library = None if new.files and not new.has_library else new.read_library()[1]
    own = {} if library is None else named_ids(new, library.get_vocab(with_added_tokens=True))

    def holds(number: int) -> bool:
        if earlier is None or library is None or not 0 <= number < vocab_size:
            return 0 <= number < vocab_size
        return earlier.id_to_token(number) == library.id_to_token(number)

    kept: dict[str, int | list[int]] = {}
    for name, value in stated.items():
        ids = [i for i in as_list(value) if holds(i)]
        if name == "eos_token_id":
            ids = list(dict.fromkeys([own[name], *ids] if name in own else ids))
        elif name in own:
            continue
        if ids and ids != [own.get(name)]:
            kept[name] = ids if len(ids) > 1 else ids[0]
    return kept


def adds_bos(path: str | Path, bos_id: int | None, eos_id: int | None) -> bool:
    """Whether texts begin with bos: whether the post-processor in ``tokenizer.json`` puts it there.

    ``transformers`` 5 heeds neither ``add_bos_token`` nor ``add_eos_token`` where there is a ``tokenizer.json``; a
    difference is logged. That the post-processor puts eos after a text is logged too, and not followed: a prompt is to
    go on, and ``data.add_eos`` says whether the documents that a model learns from end with eos.

    Raises:
      ValueError: a file is missing or broken.
    """
    directory = TokenizerDirectory(path)
    library = directory.read_library()[1]
    library.no_truncation()
    library.no_padding()
    bos = bos_id is not None and library.encode("").ids[:1] == [bos_id]
    plain, whole = (library.encode("a", add_special_tokens=added).ids for added in (False, True))
    eos = eos_id is not None and whole[-len(plain) - 1 :] == [*plain, eos_id]
    for name, adds in (("bos", bos), ("eos", eos)):
        stated = directory.stated(f"add_{name}_token")
        if stated is not None and stated != adds:
            _log.warning(
                "%s: add_%s_token is %s, but %s %s %s: that decides, as in transformers 5",
                directory.path / CONFIG,
                name,
                str(stated).lower(),
                LIBRARY,
                "adds" if adds else "does not add",
                name,
            )
    if eos:
        _log.warning(
            "%s adds eos after a text, as which a prompt would be over: prompts get none here, and documents in "
            "training as data.add_eos says",
            directory.path / LIBRARY,
        )
    return bos
