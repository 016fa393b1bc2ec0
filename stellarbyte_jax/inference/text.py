"""Generation from text to text: what to put before a prompt, when to stop, and ids to text while they arrive."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stellarbyte_jax.inference.api import Generated, NewTokens, Weights, generate
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.tokenizer.codec import Tokenizer

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 8


@dataclass(frozen=True)
class Continued:
    """Continuations of prompts: the new text of each, and the tokens and timings behind it."""

    texts: list[str]
    generated: Generated


def generate_text(
    model: ByteTransformer,
    params: Weights,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    add_bos: bool = True,
    **settings: Any,
) -> list[str]:
    """The new text that follows each prompt; ends at the tokenizer's eos. ``settings`` are :func:`continue_text`'s.

    Raises:
      ValueError: as :func:`generate`.
    """
    rows = [encode_prompt(tokenizer, prompt, add_bos=add_bos) for prompt in prompts]
    return continue_text(model, params, tokenizer, rows, max_new_tokens=max_new_tokens, **settings).texts


def continue_text(
    model: ByteTransformer,
    params: Weights,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    stop_tokens: Sequence[int] | None = None,
    stop_texts: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
    **settings: Any,
) -> Continued:
    """Continues prompts of token ids with text.

    Args:
      model: the network.
      params: its weights, or a bank.
      tokenizer: the model's.
      prompts: ids of each prompt, see :func:`encode_prompt` and ``tokenizer.chat.Conversation``.
      stop_tokens: ids that end a row; None for the tokenizer's eos.
      stop_texts: texts that end a row, and are not part of it.
      on_text: called with a row's number and new text as it is generated. Complete characters only: the bytes of one
        can be spread over several tokens.
      settings: of :func:`generate`.

    Raises:
      ValueError: as :func:`generate`, or a stop text is empty.
    """
    if stop_tokens is None:
        stop_tokens = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    streams = [TextStream(tokenizer, context=row, stop_texts=stop_texts) for row in prompts]
    texts = [""] * len(prompts)

    def give(row: int, text: str) -> None:
        texts[row] += text
        if text and on_text is not None:
            on_text(row, text)

    def take(new: NewTokens) -> bool:
        for row, ids in enumerate(new):
            give(row, streams[row].push(ids))
        return all(stream.stopped for stream in streams)

    streamed = bool(stop_texts) or on_text is not None
    generated = generate(
        model,
        params,
        prompts,
        stop_tokens=stop_tokens,
        pad_token=tokenizer.pad_id or 0,
        stream=take if streamed else None,
        **settings,
    )
    if not streamed:
        take(generated.sequences)
    for row, stream in enumerate(streams):
        give(row, stream.finish())
    return Continued(texts, generated)


def encode_prompt(tokenizer: Tokenizer, text: str, *, add_bos: bool) -> list[int]:
    """Ids of a prompt, begun with bos where asked for and where the tokenizer has one."""
    begin = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
    return begin + tokenizer.encode(text)


class TextStream:
    """Turns a row's ids into text while they arrive.

    Text is held back while it could still change: the bytes of an incomplete character, and the beginning of what may
    become a stop text.

    Attributes:
      stopped: whether a stop text was reached; later ids give no text.
    """

    def __init__(self, tokenizer: Tokenizer, *, context: Sequence[int] = (), stop_texts: Sequence[str] = ()) -> None:
        """``context`` holds the ids before the first: some tokenizers write a space only between two tokens.

        Raises:
          ValueError: a stop text is empty.
        """
        if isinstance(stop_texts, str) or not all(stop_texts):
            raise ValueError(f"stop_texts must be a list of texts that are not empty, got {stop_texts!r}")
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = tuple(stop_texts)
        self._held = ""
        self._window = [i for i in context if i < tokenizer.vocab_size][-_CONTEXT_TOKENS:]
        self._known = len(self._window)

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete."""
        return self._until_stop("".join(map(self._decode, ids)))

    def finish(self) -> str:
        """The text that was held back, at the end of the row."""
        text = self._until_stop(self._rest())
        if self.stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _decode(self, token: int) -> str:
        if token >= self._tokenizer.vocab_size:  # a row of the embedding that no text is spelled with
            return self._rest() + _REPLACEMENT
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        if text.endswith(_REPLACEMENT):
            return ""
        text = text[len(self._tokenizer.decode(self._window[: self._known])) :]
        self._window, self._known = self._window[self._known :], len(self._window) - self._known
        return text

    def _rest(self) -> str:
        known = self._tokenizer.decode(self._window[: self._known])
        text = self._tokenizer.decode(self._window)[len(known) :]
        self._window, self._known = [], 0
        return text

    def _until_stop(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        ends = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
