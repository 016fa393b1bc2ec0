"""The tokenizer as the data pipeline and generation use it: any Hugging Face directory, read without transformers."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back; made by :func:`load_tokenizer`, and pickled as its path."""

    path: str
    vocab_size: int  # highest id plus one: rows that an embedding needs
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    chat_template: str | None
    fingerprint: str  # sha256 of tokenizer.json
    _plain: Any = field(repr=False, compare=False)  # takes a spelled special token for ordinary text

    @cached_property
    def _parsing(self) -> Any:
        library = type(self._plain).from_str(self._plain.to_str())
        library.encode_special_tokens = False
        return library

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_unchanged, (self.path, self.fingerprint)

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Ids of one text; no special token is added.

        A special token that is spelled out in ``text`` stays ordinary text, so that a document cannot end itself or
        speak as another role. ``parse_special=True`` gives its control id: only for text that the program wrote itself.

        Raises:
            ValueError: It is no string, or holds a lone surrogate, which UTF-8 cannot express.
        """
        library = self._parsing if parse_special else self._plain
        try:
            return library.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise _unencodable([text]) from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts at once, on all cores; special tokens in them stay ordinary text.

        Raises:
            ValueError: A text is no string, or holds a lone surrogate, which UTF-8 cannot express.
        """
        try:
            rows = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            raise _unencodable(texts) from None
        return [row.ids for row in rows]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: An id is not in the vocabulary.
        """
        numbers = [int(i) for i in ids]
        wrong = [i for i in numbers if not 0 <= i < self.vocab_size]
        if wrong:
            raise ValueError(f"id {wrong[0]} is not in the vocabulary of {self.vocab_size} tokens of {self.path}")
        return self._plain.decode(numbers, skip_special_tokens=skip_special_tokens)

    def require(self, name: Literal["bos", "eos", "pad"]) -> int:
        """Id of a special token that the caller cannot do without.

        Raises:
            ValueError: The tokenizer has none.
        """
        token_id = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}[name]
        if token_id is None:
            raise ValueError(
                f"the tokenizer in {self.path} has no {name}_token, which is needed here: "
                f'add "{name}_token" to its tokenizer_config.json'
            )
        return token_id


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads ``tokenizer.json`` and ``tokenizer_config.json`` of a Hugging Face directory.

    ``special_tokens_map.json`` and ``chat_template.jinja``, which some versions of transformers write, are read too;
    the configuration's own bos, eos and pad tokens win over the map, the separate template over the configuration's.

    Raises:
        ValueError: The directory or a file is missing or broken, or a named special token is not in the vocabulary.
    """
    from tokenizers import Tokenizer as Library

    directory = Path(path)
    if not directory.is_dir():
        raise ValueError(f"tokenizer directory {directory} does not exist: give a directory that holds tokenizer.json")
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"{directory} holds no tokenizer.json: only tokenizers in that format can be read "
            "(scripts/train_tokenizer.py writes one, and so does transformers' save_pretrained)"
        )
    content = file.read_bytes()
    try:
        library = Library.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file} is not a tokenizer that the tokenizers library can read: {error}") from None
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    ids = library.get_vocab(with_added_tokens=True)
    config = _json(directory / "tokenizer_config.json", required=True)
    named = {**_json(directory / "special_tokens_map.json", required=False), **config}
    return Tokenizer(
        path=str(directory),
        vocab_size=max(ids.values(), default=-1) + 1,
        bos_id=_special(named, "bos_token", ids, directory),
        eos_id=_special(named, "eos_token", ids, directory),
        pad_id=_special(named, "pad_token", ids, directory),
        chat_template=_chat_template(config, directory),
        fingerprint=hashlib.sha256(content).hexdigest(),
        _plain=library,
    )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ValueError when the tokenizer has ids that a model of ``vocab_size`` rows cannot embed."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer in {tokenizer.path} has {tokenizer.vocab_size} tokens, model.vocab_size is {vocab_size}: "
            f"set model.vocab_size to at least {tokenizer.vocab_size} before training starts, give trained weights "
            "more rows with scripts/convert.py resize, or choose another tokenizer"
        )


def _load_unchanged(path: str, fingerprint: str) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(f"{path}/tokenizer.json has changed since this process started: start the run again")
    return tokenizer


def _json(file: Path, required: bool) -> dict[str, Any]:
    if not file.is_file():
        if required:
            raise ValueError(f"{file.parent} holds no {file.name}: it names the bos, eos and pad tokens")
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return values


def _special(named: dict[str, Any], name: str, ids: dict[str, int], directory: Path) -> int | None:
    value = named.get(name)
    token = value.get("content") if isinstance(value, dict) else value
    if token is None:
        return None
    if token not in ids:
        raise ValueError(f"{directory}: {name} is {token!r}, which tokenizer.json does not hold")
    return ids[token]


def _chat_template(config: dict[str, Any], directory: Path) -> str | None:
    separate = directory / "chat_template.jinja"
    if separate.is_file():
        return separate.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        return next((t["template"] for t in template if t["name"] == "default"), None)
    return template


def _unencodable(texts: Sequence[str]) -> ValueError:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            return ValueError(f"text {number} must be a string, got {type(text).__name__}")
        for position, character in enumerate(text):
            if 0xD800 <= ord(character) < 0xE000:
                return ValueError(
                    f"text {number} holds the lone surrogate U+{ord(character):04X} at character {position}, which is "
                    "no Unicode character: mend the file that it comes from"
                )
    raise AssertionError("the library refused texts that it should take")
