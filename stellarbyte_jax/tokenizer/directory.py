"""A tokenizer directory as ``transformers`` saves it: the names of its files, and how each is read, written and copied.

No other module knows these names.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from stellarbyte_jax.config.foreign import absent, clipped, json_object, shown
from stellarbyte_jax.config.paths import expanded, real
from stellarbyte_jax.tokenizer.named import (
    EXTRA,
    EXTRA_BEFORE,
    SpecialTokens,
    find_special_tokens,
    uses_older_files,
)

LIBRARY = "tokenizer.json"  # read by the tokenizers library
CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"  # a folder of further ones, by their names
ADDED_TOKENS = "added_tokens.json"
GENERATION_CONFIG = "generation_config.json"  # of a model; it names the ids that end a text
MODEL_CONFIG = "config.json"  # of a model; it may name them too
FILES = (
    LIBRARY,
    CONFIG,
    SPECIAL_TOKENS_MAP,
    ADDED_TOKENS,
    CHAT_TEMPLATE,
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "merges.txt",
    GENERATION_CONFIG,
)

_PLAIN = {"special": False, "normalized": False}  # a token of ADDED_TOKENS, unless other settings name it
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token")
SPECIAL_IDS = tuple(f"{name}_id" for name in SPECIAL_TOKENS)  # their names in a model's settings


class TokenizerDirectory:
    """The files of one directory; each method reads one when it is called, and every error is one line.

    Attributes:
      path: the directory.
    """

    def __init__(self, path: str | Path) -> None:
        """Names the directory, where a leading ``~`` is the home directory; nothing is read yet."""
        self.path = Path(expanded(path))

    @property
    def has_library(self) -> bool:
        """Whether it holds a ``tokenizer.json``."""
        return (self.path / LIBRARY).is_file()

    @property
    def files(self) -> list[str]:
        """Names of the files of a tokenizer that it holds: of :data:`FILES`, and of the folder of further templates."""
        more = sorted(f"{MORE_TEMPLATES}/{file.name}" for file in self.path.glob(f"{MORE_TEMPLATES}/*.jinja"))
        return [*(name for name in FILES if (self.path / name).is_file()), *more]

    @property
    def is_complete(self) -> bool:
        """Whether it holds what ``codec.load_tokenizer`` cannot do without."""
        return self.has_library and (self.path / CONFIG).is_file()

    def read_library(self) -> tuple[bytes, Any]:
        """Content of ``tokenizer.json``, and the ``tokenizers.Tokenizer`` that it describes.

        Raises:
          ValueError: the directory or the file is missing, the library cannot read it, or it gives a key two values.
        """
        from tokenizers import Tokenizer

        content = self._library_bytes()
        try:
            library = Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"{self.path / LIBRARY} is not a tokenizer that the tokenizers library can read: {clipped(str(error))}"
            ) from None
        json_object(content, str(self.path / LIBRARY))  # of two values of a key the library takes the last one
        added = self._missing_tokens(library)
        return content + json.dumps(added).encode() if added else content, library

    def _missing_tokens(self, library: Any) -> list[tuple[int, str, bool]]:
        """Adds the tokens that only other files name, and lists them.

        Special tokens without an id of their own get the next free ones, as in ``transformers``; but bos, eos and pad,
        which every text needs, must have one (``special.named_ids``).
        """
        tokens = self._special_tokens()
        named = {token["content"] for token in tokens.named.values()}
        wanted: list[tuple[str | None, int | None, Mapping[str, Any]]] = [
            (None, number, {**token, "special": token["special"] or token["content"] in named})
            for number, token in sorted(self.added_tokens().items())
        ]
        described = {repr(token) for token in library.get_added_tokens_decoder().values()}
        known = {token.content for token in library.get_added_tokens_decoder().values()}
        known |= {token["content"] for _, _, token in wanted}
        for name, token in (*tokens.named.items(), *((None, token) for token in tokens.extra)):
            if token["content"] and token["content"] not in known:
                known.add(token["content"])
                wanted.append((name, None, token))
        added = []
        taken = set(library.get_vocab(with_added_tokens=True).values()) if wanted else set()
        for name, number, token in wanted:
            special = bool(token["special"])
            is_new = library.token_to_id(token["content"]) is None
            if (is_new and name in SPECIAL_TOKENS) or repr(_described(token)) in described:
                continue
            (library.add_special_tokens if special else library.add_tokens)([_described(token)])
            given = library.token_to_id(token["content"])
            if is_new and number is not None and given != number:
                raise ValueError(
                    f"{self.path}: the added token {shown(token['content'])} has id {number}, but the next free one of "
                    f"{LIBRARY} is {given}: the files belong to different tokenizers"
                )
            if is_new and given in taken:  # the library counts tokens, whichever ids are left out
                raise ValueError(
                    f"{self.path}: the special token {shown(token['content'])} has no id, and the one that is next, "
                    f"{given}, is another token's: give it an id of its own in {LIBRARY}"
                )
            taken.add(given)
            if is_new or not special:  # else texts have the same ids as before
                added.append((given, token["content"], special))
        return added

    def library_settings(self) -> dict[str, Any]:
        """``tokenizer.json`` as plain values.

        Raises:
          ValueError: the directory or the file is missing, or is not a JSON object.
        """
        return json_object(self._library_bytes(), str(self.path / LIBRARY))

    def config(self) -> dict[str, Any]:
        """``tokenizer_config.json``.

        Raises:
          ValueError: it is missing, or not a JSON object.
        """
        if not (self.path / CONFIG).is_file():
            raise ValueError(f"{self.path} holds no {CONFIG}: it names the bos, eos and pad tokens")
        return self._read_object(CONFIG)

    def special_tokens(self) -> dict[str, str]:
        """Spelling of each special token that the files name, such as ``{"bos_token": "<s>"}``.

        Which names there are and which file counts: see ``named.find_special_tokens``. A null names nothing.

        Raises:
          ValueError: a file is not a JSON object, or names something else than a token.
        """
        return {name: token["content"] for name, token in self._special_tokens().named.items()}

    def _special_tokens(self) -> SpecialTokens:
        return find_special_tokens(
            self._read_object(CONFIG),
            self._read_object(SPECIAL_TOKENS_MAP),
            str(self.path / CONFIG),
            str(self.path / SPECIAL_TOKENS_MAP),
        )

    def stated(self, name: str) -> bool | None:
        """What ``tokenizer_config.json`` says to a question such as ``add_bos_token``; None where it says nothing.

        Raises:
          ValueError: the file is missing, or not a JSON object.
        """
        value = self.config().get(name)
        return value if isinstance(value, bool) else None

    def chat_template(self) -> str | None:
        """The Jinja source that makes a prompt of messages: ``chat_template.jinja``, else the configuration's default.

        Raises:
          ValueError: ``tokenizer_config.json`` is missing or not a JSON object, or the template is not UTF-8 text.
        """
        template = self.config().get("chat_template")
        separate = self.path / CHAT_TEMPLATE
        if separate.is_file():
            try:
                return separate.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{separate} is not UTF-8 text ({error}): copy the file again") from None
        if isinstance(template, list) and all(isinstance(t, dict) for t in template):  # several named ones
            template = next((t.get("template") for t in template if t.get("name") == "default"), None)
        if not isinstance(template, str | None):
            raise ValueError(
                f"{self.path / CONFIG}: chat_template must be a text, or a list of templates with names, "
                f"got {shown(template)}"
            )
        return template

    def generation_ids(self) -> dict[str, int | list[int]]:
        """Those of :data:`SPECIAL_IDS` that the model's settings give; a text may have several ends.

        ``generation_config.json`` goes before ``config.json``, but ends of a text are those of both.

        Raises:
          ValueError: a file is not a JSON object, or holds something else than ids.
        """
        stated: dict[str, int | list[int]] = {}
        ends: list[int] = []
        for file in (GENERATION_CONFIG, MODEL_CONFIG):
            values = self._read_object(file)
            for name in SPECIAL_IDS:
                value = values.get(name)
                if value is None:
                    continue
                ids = value if isinstance(value, list) else [value]
                if not all(type(i) is int for i in ids):
                    raise ValueError(f"{self.path / file}: {name} must be an id or a list of ids, got {shown(value)}")
                if name == "eos_token_id":
                    ends += ids
                stated.setdefault(name, value)
        ends = list(dict.fromkeys(ends))
        if len(ends) > 1:
            stated["eos_token_id"] = ends
        return stated

    def generation_settings(self) -> dict[str, Any]:
        """Content of ``generation_config.json``; empty where there is no such file.

        Raises:
          ValueError: it is not a JSON object.
        """
        return self._read_object(GENERATION_CONFIG)

    def added_tokens(self) -> dict[int, dict[str, Any]]:
        """Tokens that files beside ``tokenizer.json`` add to it: by id, their ``content`` and whether they are special.

        Raises:
          ValueError: a file is not a JSON object, or describes tokens otherwise.
        """
        found: dict[int, dict[str, Any]] = {}
        config = self._read_object(CONFIG)
        older = self._read_object(ADDED_TOKENS) if uses_older_files(config) else {}
        for file, entries in ((ADDED_TOKENS, older), (CONFIG, config.get("added_tokens_decoder") or {})):
            try:
                for key, value in entries.items():
                    number, token = (
                        (value, {"content": key, **_PLAIN}) if file == ADDED_TOKENS else (int(key), dict(value))
                    )
                    if type(number) is not int:
                        raise ValueError(f"the id is {shown(number)}")
                    if not isinstance(token["content"], str) or not token["content"]:
                        raise ValueError("content must be a spelling")
                    token["content"].encode()  # half of a surrogate pair is no text
                    found[number] = {"special": False, **token}
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{self.path / file}: added tokens must be an id and a spelling each: {clipped(str(error))}"
                ) from None
        return found

    def _library_bytes(self) -> bytes:
        if not self.path.is_dir():
            raise ValueError(f"tokenizer directory {absent(self.path)}: give a directory that holds {LIBRARY}")
        if not self.has_library:
            inside = self.path / "tokenizer"  # of a run, or of the root of a clone
            if (inside / LIBRARY).is_file():
                raise ValueError(f"{self.path} holds no {LIBRARY}, but {inside} does: give that directory")
            raise ValueError(
                f"{self.path} holds no {LIBRARY}: only tokenizers in that format can be read "
                "(trained ones of this project are, and so are those that transformers' save_pretrained writes)"
            )
        return (self.path / LIBRARY).read_bytes()

    def _read_object(self, name: str) -> dict[str, Any]:
        """The JSON object in a file; empty where there is no such file."""
        file = self.path / name
        return json_object(file.read_bytes(), str(file)) if file.is_file() else {}


def limit_length(directory: str | Path, positions: int) -> None:
    """Lowers ``model_max_length`` of a directory's ``tokenizer_config.json`` to a model's positions, where it is more.

    ``transformers`` cuts texts to that length where it is asked to.
    """
    read = TokenizerDirectory(directory)
    stated = read._read_object(CONFIG).get("model_max_length")
    if isinstance(stated, int | float) and stated > positions:
        write_json(read.path / CONFIG, read._read_object(CONFIG) | {"model_max_length": positions})


def spell_for_older(directory: str | Path) -> None:
    """Names the class and the tokens of ``tokenizer_config.json`` as ``transformers`` 4 does; 5 reads both spellings.

    Release 4 has no class ``TokenizersBackend``, and takes ``extra_special_tokens`` for an object alone. Programs that
    convert exports, such as llama.cpp's, are bound to it.
    """
    read = TokenizerDirectory(directory)
    stated = read._read_object(CONFIG)
    spelled = dict(stated)
    if stated.get("tokenizer_class") == "TokenizersBackend":
        spelled["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokens = stated.get(EXTRA)
    # Under the older name, tokens of a SPECIAL_TOKENS_MAP would count beside them.
    if tokens == [] or (isinstance(tokens, list) and not (read.path / SPECIAL_TOKENS_MAP).is_file()):
        del spelled[EXTRA]
        spelled |= {EXTRA_BEFORE: tokens} if tokens else {}
    if spelled != stated:
        write_json(read.path / CONFIG, spelled)


def vocabulary_size(ids: Iterable[int]) -> int:
    """The largest id plus one: the rows that an embedding needs, whichever ids of a vocabulary are free."""
    return max(ids, default=-1) + 1


def _described(token: Mapping[str, Any]) -> Any:
    """The ``tokenizers.AddedToken`` of a spelling and its flags."""
    from tokenizers import AddedToken

    special = bool(token["special"])
    flags = {name: bool(token[name]) for name in ("lstrip", "rstrip", "single_word", "normalized") if name in token}
    return AddedToken(token["content"], special=special, **{"normalized": not special, **flags})


def write_tokenizer(
    target: Path, library: str, config: Mapping[str, Any], special_tokens_map: Mapping[str, Any]
) -> None:
    """Writes the three files that ``transformers.AutoTokenizer`` reads, each replaced in one step."""
    target.mkdir(parents=True, exist_ok=True)
    _replace(target / LIBRARY, library)
    write_json(target / CONFIG, config)
    write_json(target / SPECIAL_TOKENS_MAP, special_tokens_map)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes readable UTF-8 JSON, replacing the file in one step."""
    _replace(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def copy_tokenizer(
    source: str | Path, target: str | Path, ids: Mapping[str, int | list[int]] = MappingProxyType({})
) -> list[str]:
    """Gives ``target``, made where needed, the files of a tokenizer that ``source`` has.

    Others of such names in ``target`` are removed, since they would speak of another tokenizer. A source without any
    of them, and whose ``config.json`` names no ends of a text, changes nothing.

    Args:
      source: a directory.
      target: likewise.
      ids: further ones for the copy of ``generation_config.json``.

    Returns:
      The names of the files, ``generation_config.json`` among them where ``ids`` or the source's ``config.json`` gave
      some of its content.
    """
    directory, target = TokenizerDirectory(source), Path(target)
    source = directory.path
    present = directory.files
    # Ends of a text may be named in the model's settings alone, which stay behind.
    ids = {**(directory.generation_ids() if (source / MODEL_CONFIG).is_file() else {}), **ids}
    if (present or ids) and real(source) != real(target):
        target.mkdir(parents=True, exist_ok=True)
        for name in set(TokenizerDirectory(target).files) - set(present):
            (target / name).unlink()
        for name in present:
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
        given = directory._read_object(GENERATION_CONFIG) if ids else {}
        if given | ids != given:
            write_json(target / GENERATION_CONFIG, given | ids)
            present += [] if GENERATION_CONFIG in present else [GENERATION_CONFIG]
    return present
