"""Special tokens as the settings of a tokenizer name them, by the rules of ``transformers`` 5."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stellarbyte_jax.config.foreign import shown

STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = "extra_special_tokens"
EXTRA_BEFORE = "additional_special_tokens"  # its name in transformers 4
_BY_NAME = "model_specific_special_tokens"
_ADDED = "added_tokens_decoder"
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


@dataclass(frozen=True)
class SpecialTokens:
    """Tokens as ``tokenizers.AddedToken`` describes them: ``content``, ``special`` and other flags.

    Attributes:
      named: by name, such as ``bos_token`` or ``image_token``: what a chat template may ask for.
      extra: those without a name.
    """

    named: Mapping[str, Mapping[str, Any]]
    extra: tuple[Mapping[str, Any], ...]


def uses_older_files(config: Mapping[str, Any]) -> bool:
    """Whether files of earlier versions count beside ``tokenizer_config.json``: where it lists no added tokens."""
    return config.get(_ADDED) is None


def find_special_tokens(
    config: Mapping[str, Any], tokens_map: Mapping[str, Any], config_file: str, map_file: str
) -> SpecialTokens:
    """The special tokens that two files name.

    ``special_tokens_map.json`` goes before ``tokenizer_config.json``, and does not count where that one lists added
    tokens. Names beside the seven standard ones are those of ``extra_special_tokens`` as an object (as a list it holds
    tokens without a name; ``additional_special_tokens`` is its older name), and every other ``..._token``.

    Args:
      config: content of ``tokenizer_config.json``.
      tokens_map: content of ``special_tokens_map.json``.
      config_file: its name in messages.
      map_file: likewise.

    Raises:
      ValueError: something that is no token is named; the message says where.
    """
    older = tokens_map if uses_older_files(config) else {}
    extra, before = config.get(EXTRA), config.get(EXTRA_BEFORE)
    if not extra:
        extra, before = before, None
    spelled = {name: value for name, value in config.items() if _names_other(name) and isinstance(value, str)}
    by_name = {**spelled, **(extra if isinstance(extra, dict) else {})} or config.get(_BY_NAME) or {}
    if not isinstance(by_name, dict):
        raise ValueError(f"{config_file}: {_BY_NAME} must be an object of names and tokens, got {shown(by_name)}")
    found: dict[str, tuple[Any, str]] = {}

    def state(values: Mapping[str, Any], file: str) -> None:
        found.update({name: (value, f"{file}: {name}") for name, value in values.items()})

    # Later ones replace earlier ones.
    state({n: v for n, v in config.items() if n in STANDARD or (_names_other(n) and _is_typed(v))}, config_file)
    state(
        {n: v for n, v in older.items() if n in STANDARD or (_names_other(n) and isinstance(v, str | dict))}, map_file
    )
    state(by_name, config_file)
    lists = [(extra, config_file), (older.get(EXTRA), map_file)]
    for tokens, file in lists:
        if isinstance(tokens, dict) and file == map_file:
            state(tokens, file)
    lists = [(tokens, file) for tokens, file in lists if tokens is not None and not isinstance(tokens, dict)]
    if not lists:
        lists = [(before, config_file), (older.get(EXTRA_BEFORE), map_file)]
    order = {name: number for number, name in enumerate(STANDARD)}  # that of the ids of new ones
    named = {
        name: _token(*found[name], special=True)
        for name in sorted(found, key=lambda name: order.get(name, len(order)))
        if found[name][0] is not None or name not in STANDARD
    }
    return SpecialTokens(named, tuple(token for tokens, file in lists for token in _list(tokens, file)))


def _names_other(name: str) -> bool:
    return name.endswith("_token") and name not in STANDARD


def _is_typed(value: Any) -> bool:
    return isinstance(value, dict) and value.get("__type") == "AddedToken"


def _list(tokens: Any, file: str) -> list[dict[str, Any]]:
    if not isinstance(tokens, list | None):
        raise ValueError(f"{file}: {EXTRA} must be a list of tokens, or an object of names, got {shown(tokens)}")
    return [_token(token, f"{file}: {EXTRA}", special=isinstance(token, str)) for token in tokens or []]


def _token(value: Any, where: str, *, special: bool) -> dict[str, Any]:
    spelling = value.get("content") if isinstance(value, dict) else value
    if not isinstance(spelling, str):
        raise ValueError(f"{where} must be a token's spelling, got {shown(value)}")
    try:
        spelling.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} is {shown(value)}: half of a surrogate pair is no text") from None
    flags = {name: value[name] for name in _FLAGS if name in value} if isinstance(value, dict) else {}
    return {**flags, "content": spelling, "special": special or bool(flags.get("special"))}
