"""What lm-eval asks of a model, answered by one of ours; :mod:`adapter` makes an lm-eval model of it.

This file does without lm-eval, of whose requests it reads ``args`` alone.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from stellarbyte_jax.checkpoint.bundle import Bundle
from stellarbyte_jax.evaluation.answers import answers, model_settings
from stellarbyte_jax.evaluation.likelihood import Likelihood, log_likelihoods
from stellarbyte_jax.evaluation.texts import Pair, TextEncoder, checked
from stellarbyte_jax.inference.programs import cast_for_inference
from stellarbyte_jax.tokenizer.template import ChatTemplate

_log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
_END = "THE_MESSAGE_GOES_ON_HERE"  # marks the end of a message in a template's text; no text holds it


class Request(Protocol):
    """What is read of a request of lm-eval."""

    args: tuple[Any, ...]


def silent(kind: str, done: int, total: int) -> None:
    """Progress that nobody is told of."""


class Backend:
    """A model, its weights and its tokenizer as lm-eval uses them.

    Texts become ids as in lm-eval's backend ``hf``: bos where the model's texts begin with it and the text does not
    spell it, spaces at the end of a context belong to the continuation, what is too long loses its beginning.
    """

    def __init__(self, bundle: Bundle, *, batch_size: int, progress: Progress = silent) -> None:
        """Casts the weights once.

        Args:
          bundle: the model.
          batch_size: requests that are computed at once.
          progress: told the kind of requests, how many are done and how many there are, after each call; it may end the
            evaluation by raising.

        Raises:
          ValueError: the tokenizer has neither bos nor eos, or its ``generation_config.json`` is broken.
        """
        super().__init__()  # the other base of an adapter, where there is one
        self._bundle, self._batch_size, self._progress = bundle, batch_size, progress
        self._model = bundle.model
        self._params = cast_for_inference(bundle.model, bundle.params)
        self._encoder = TextEncoder(bundle.tokenizer, add_bos=bundle.add_bos)
        self._settings = model_settings(bundle.tokenizer.path)
        self._told_of_system = False

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at once."""
        return self._model.config.max_position_embeddings

    @property
    def batch_size(self) -> int:
        """Requests that are computed at once."""
        return self._batch_size

    @property
    def tokenizer_name(self) -> str:
        """What tells tokenizers apart where lm-eval keeps requests."""
        return self._bundle.tokenizer.fingerprint

    def loglikelihood(self, requests: Sequence[Request]) -> list[Likelihood]:
        """Log-probability of each continuation, ``args = (context, continuation)``; whether greedy decoding makes it.

        Raises:
          ValueError: a continuation has no token or too many.
        """
        pairs = self._encoder.pairs([request.args for request in requests])
        return self._scored("loglikelihood", pairs)

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """Log-probability of each text, ``args = (text,)``, read in windows of the model's positions.

        Raises:
          ValueError: a text has no token.
        """
        windows: list[Pair] = []
        counts = []
        texts = [text for request in requests for text in request.args]
        for text, ids in zip(texts, self._encoder.encode(texts), strict=True):
            made = [checked(*window, text) for window in self.windows(list(ids))]
            windows += made
            counts.append(len(made))
        scored = iter(self._scored("loglikelihood_rolling", windows))
        return [sum(next(scored)[0] for _ in range(count)) for count in counts]

    def windows(self, tokens: list[int]) -> Iterable[tuple[list[int], list[int]]]:
        """Contexts and continuations that together predict each token once; those of lm-eval."""
        raise NotImplementedError

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """The answer to each prompt, ``args = (prompt, generation_kwargs)``.

        Raises:
          ValueError: ``generation_kwargs`` are not known, or leave no room for a prompt.
        """
        return answers(
            self._model,
            self._params,
            self._encoder,
            [request.args for request in requests],
            stop_ids=self._bundle.stop_ids,
            batch_size=self._batch_size,
            max_length=self.max_length,
            of_model=self._settings,
            progress=self._counter("generate_until", len(requests)),
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Source of the chat template; None where none is asked for.

        Raises:
          ValueError: the model has none, or one is asked for by name.
        """
        if chat_template is False:
            return None
        if isinstance(chat_template, str):
            raise ValueError(f"chat template {chat_template!r}: the model has one without a name, give no name")
        return self._template().source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation; it ends within the last message where no reply is to be begun.

        A template that refuses system messages gets the conversation without them, and a warning is logged.

        Raises:
          ValueError: the model has no chat template, it refuses the messages, or a reply cannot be begun with it.
        """
        template = self._template()
        prompt = template.render if add_generation_prompt else functools.partial(_begun, template)
        try:
            text = prompt(chat_history, add_generation_prompt=add_generation_prompt)
        except ValueError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            if not self._told_of_system:
                _log.warning("%s: system messages are left out", error)
            self._told_of_system = True
            text = prompt(others, add_generation_prompt=add_generation_prompt)
        return str.__str__(text)

    def _template(self) -> ChatTemplate:
        tokenizer = self._bundle.tokenizer
        if tokenizer.chat_template is None:
            raise ValueError(f"the tokenizer in {tokenizer.path} has no chat_template: evaluate without chat")
        return ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens, tokenizer.path)

    def _scored(self, kind: str, pairs: list[Pair]) -> list[Likelihood]:
        return log_likelihoods(
            self._model,
            self._params,
            pairs,
            batch_size=self._batch_size,
            max_length=self.max_length,
            progress=self._counter(kind, len(pairs)),
        )

    def _counter(self, kind: str, total: int) -> Callable[[int], None]:
        done = 0
        self._progress(kind, 0, total)

        def count(more: int) -> None:
            nonlocal done
            done += more
            self._progress(kind, done, total)

        return count


def _begun(template: ChatTemplate, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    """A conversation up to the end of its last message, as with ``continue_final_message`` of transformers.

    The message's own text would not do to find its end: a template may spell it once more behind it.
    """
    *others, last = messages
    marked = {**last, "content": f"{last['content']}{_END} "}
    text = str.__str__(template.render([*others, marked], add_generation_prompt=add_generation_prompt))
    end = text.rfind(_END)
    if end < 0 or last["content"].strip() not in text:
        raise ValueError(
            "the chat template changes the beginning of a reply that the task gives (gen_prefix), so it cannot be "
            "continued: evaluate without chat, or take gen_prefix out of the task"
        )
    trims = not text.startswith(f"{_END} ", end)
    # A template may spell the message before its end too, with the mark.
    begun = text[:end].replace(_END if trims else f"{_END} ", "")
    return begun.rstrip() if trims else begun
