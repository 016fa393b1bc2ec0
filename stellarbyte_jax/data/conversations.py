"""How a record of the data becomes a conversation: which fields hold its messages, and what messages must be."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stellarbyte_jax.config.foreign import clipped, listed, shown
from stellarbyte_jax.data.files import BadRecordError

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
_LISTS = ("messages", "conversations", "conversation")
_TEXTS = (
    ("instruction", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("input", "output"),
)


@dataclass(frozen=True)
class Dialogue:
    """A conversation.

    Attributes:
      messages: dicts with ``role`` (system, user, assistant, tool) and ``content``, as chat templates read them. The
        last one is the assistant's.
      tools: descriptions of functions that may be called; None: there are none.
      silent: numbers of messages of the assistant that are not to be learnt, by ``"weight": 0``.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    silent: frozenset[int] = frozenset()


@dataclass(frozen=True)
class ConversationFormat:
    """Where a record keeps its conversation.

    Attributes:
      field: that holds the messages; None: the first that is there of ``messages``, ``conversations``,
        ``conversation``, or ``instruction`` and ``output`` (with ``input``), ``prompt`` and ``completion`` or
        ``response``, ``question`` and ``answer``, ``input`` and ``output``, with ``system`` and ``history`` where these
        are there.
    """

    field: str | None = None

    def dialogue(self, record: Any) -> Dialogue:
        """The conversation of a record, or of a list of messages. What follows the assistant's last one is left out.

        Raises:
          BadRecordError: there is none, roles are out of order, a content is empty or no text, or nobody answers.
        """
        if isinstance(record, list):
            record = {"messages" if self.field is None else self.field: record}
        if not isinstance(record, dict):
            raise BadRecordError(f"a line must hold a JSON object or a list of messages, not {clipped(shown(record))}")
        messages = self._messages(record)
        weights = [message.pop("weight", 1) for message in messages]
        silent = frozenset(
            n
            for n, (message, weight) in enumerate(zip(messages, weights, strict=True))
            if weight == 0 and message["role"] == "assistant"
        )
        last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        if last is None:
            raise BadRecordError("no message is the assistant's, so that there is nothing to learn")
        messages = messages[: last + 1]
        _check_order(messages)
        if all(n in silent for n, message in enumerate(messages) if message["role"] == "assistant"):
            raise BadRecordError('every message of the assistant has "weight": 0, so that there is nothing to learn')
        return Dialogue(messages, _tools(record), silent)

    def _messages(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        if self.field is not None:
            if record.get(self.field) is None:
                raise BadRecordError(
                    f"no field {self.field!r}, which data.chat.field names; the fields here are: {_present(record)}"
                )
            return _listed_messages(record[self.field], self.field)
        for name in _LISTS:
            if record.get(name) is not None:
                return _listed_messages(record[name], name)
        for asked, answered in _TEXTS:
            if record.get(asked) is not None and record.get(answered) is not None:
                return _of_fields(record, asked, answered)
        raise BadRecordError(
            f"no conversation: neither {listed(_LISTS)} nor "
            f"{', '.join(f'{a} and {b}' for a, b in _TEXTS)}; the fields here are: {_present(record)}; "
            "data.chat.field names the one that holds the messages"
        )


def _present(record: Mapping[str, Any]) -> str:
    return listed([name for name, value in record.items() if value is not None]) or "none"


def _listed_messages(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        what = "is empty" if value == [] else f"must be a list of messages, it is {type(value).__name__}"
        raise BadRecordError(f"field {name!r} {what}")
    if all(isinstance(message, dict) and not _first(message, _ROLE_KEYS) for message in value):
        # Without any role, the user begins and both take turns.
        value = [{**message, "role": ("user", "assistant")[n % 2]} for n, message in enumerate(value)]
    return [_message(message, number) for number, message in enumerate(value, 1)]


def _first(message: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    return next((key for key in keys if message.get(key) is not None), None)


def _message(message: Any, number: int) -> dict[str, Any]:
    where = f"message {number}"
    if not isinstance(message, dict):
        raise BadRecordError(f"{where} must be an object with role and content, it is {type(message).__name__}")
    role_key = _first(message, _ROLE_KEYS)
    if role_key is None:
        raise BadRecordError(f"{where} has no role: give each message one of {listed(_ROLES)}")
    given = message[role_key]
    role = _ROLES.get(given.lower()) if isinstance(given, str) else None
    if role is None:
        raise BadRecordError(f"{where} has the role {shown(given)}; known are {listed(_ROLES)}")
    weight = message.get("weight")
    if not (weight is None or (isinstance(weight, int | float) and weight in (0, 1))):
        raise BadRecordError(f"{where} has the weight {clipped(shown(weight))}: give 0, not to learn it, or 1")
    calls = message.get("tool_calls") or None
    content_key = _first(message, _CONTENT_KEYS)
    content = _content(None if content_key is None else message[content_key], where)
    if not content.strip() and not calls:
        raise BadRecordError(f"{where}, of the {role}, is empty")
    known = (*_ROLE_KEYS, *_CONTENT_KEYS, "tool_calls")
    rest = {key: value for key, value in message.items() if key not in known and value is not None}
    made = {"role": role, "content": content, **rest}
    return {**made, "tool_calls": _calls(calls, where)} if calls else made


def _content(value: Any, where: str) -> str:
    if isinstance(value, list):
        texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
        wrong = [part for part, text in zip(value, texts, strict=True) if not isinstance(text, str)]
        if wrong:
            raise BadRecordError(f"{where}: the content holds {clipped(shown(wrong[0]))}; only text can be learnt")
        value = "".join(texts)  # type: ignore[arg-type]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRecordError(f"{where}: the content must be a string, it is {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError(f"{where}: half of a surrogate pair at character {error.start + 1}") from error
    return value


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    right = isinstance(calls, list) and all(isinstance(call, dict) for call in calls)
    functions = [call.get("function", call) for call in calls] if right else [None]
    if not all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in functions):
        raise BadRecordError(f'{where}: tool_calls must be a list of {{"function": {{"name", "arguments"}}}}')
    return calls


def _tools(record: Mapping[str, Any]) -> list[Any] | None:
    tools = record.get("tools") or None
    if isinstance(tools, str):  # columns hold them so, since functions have parameters of their own
        try:
            tools = json.loads(tools) or None
        except (ValueError, RecursionError) as error:
            raise BadRecordError(f"field 'tools' is text that is no JSON: {clipped(str(error))}") from error
    if tools is not None and not isinstance(tools, list):
        raise BadRecordError(f"field 'tools' must be a list of descriptions of functions, it is {type(tools).__name__}")
    return tools


def _of_fields(record: Mapping[str, Any], asked: str, answered: str) -> list[dict[str, Any]]:
    """Messages of fields with texts; where both hold lists of messages, these follow each other."""
    if isinstance(record[asked], list) and isinstance(record[answered], list):
        # Whoever parts a conversation into these means the second to be learnt alone.
        before = [
            {**message, "weight": 0} if isinstance(message, dict) and message.get("weight") is None else message
            for message in record[asked]
        ]
        return _listed_messages([*before, *record[answered]], f"{asked}, {answered}")
    text = functools.partial(_text_of, record)
    question = text(asked)
    if (more := text("input").strip()) and asked == "instruction":
        question += f"\n{more}"
    messages = [{"role": "system", "content": system}] if (system := text("system")).strip() else []
    history = record.get("history") or []
    pairs = [pair for pair in history if isinstance(pair, list) and len(pair) == 2] if isinstance(history, list) else []
    if not isinstance(history, list) or len(pairs) < len(history):
        raise BadRecordError("field 'history' must be a list of pairs [question, answer]")
    for pair in (*pairs, (question, text(answered))):
        messages += [{"role": role, "content": said} for role, said in zip(("user", "assistant"), pair, strict=True)]
    return [_message(message, number) for number, message in enumerate(messages, 1)]


def _text_of(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise BadRecordError(f"field {name!r} must be a string, it is {type(value).__name__}")
    return value or ""


def _check_order(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises BadRecordError where somebody speaks out of turn."""
    before = None
    for number, message in enumerate(messages, 1):
        role = message["role"]
        allowed = {
            None: ("system", "user"),
            "system": ("user",),
            "user": ("assistant",),
            "assistant": ("user", "tool"),
            "tool": ("tool", "assistant"),
        }[before]
        if role not in allowed:
            after = "begins the conversation" if before is None else f"follows one of the {before}"
            raise BadRecordError(
                f"roles are out of order: message {number}, of the {role}, {after}; there may be: {listed(allowed)}"
            )
        before = role
