"""Generated answers: settings of tasks, prompts in batches, and texts that end before a stop text."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from stellarbyte_jax.config.foreign import listed
from stellarbyte_jax.evaluation.texts import TextEncoder
from stellarbyte_jax.inference.api import NewTokens, generate
from stellarbyte_jax.inference.text import TextStream
from stellarbyte_jax.model.decoder import ByteTransformer, Params
from stellarbyte_jax.tokenizer.codec import Tokenizer
from stellarbyte_jax.tokenizer.directory import GENERATION_CONFIG, TokenizerDirectory

_log = logging.getLogger(__name__)
_MOST_TOKENS = 256  # where a task does not say, as in lm-eval
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one counts
_FILTERS = ("top_k", "top_p", "min_p")
_OF_THE_MODEL = ("repetition_penalty", *_FILTERS)  # where a task says nothing of them
# What only transformers has, with the value that changes no answer.
_WITHOUT_EFFECT = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "length_penalty", "typical_p"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), 0),
    **dict.fromkeys(("diversity_penalty", "epsilon_cutoff", "eta_cutoff"), 0),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale"), 1),
    "early_stopping": False,
}
_OTHERS = ("bad_words_ids", "begin_suppress_tokens", "exponential_decay_length_penalty", "forced_eos_token_id")
_OTHERS += ("max_new_tokens", "sequence_bias", "suppress_tokens")


@dataclass(frozen=True)
class AnswerSettings:
    """How an answer is generated.

    Attributes:
      until: texts that end it.
      max_new_tokens: its largest number of tokens.
      sampling: ``temperature`` and other settings of ``generate``, as pairs.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: tuple[tuple[str, Any], ...]

    @classmethod
    def read(cls, given: Mapping[str, Any], of_model: Mapping[str, Any] = MappingProxyType({})) -> "AnswerSettings":
        """The ``generation_kwargs`` of a task, as lm-eval's backends understand them.

        Greedy where ``do_sample`` is false, or where neither it nor a temperature is given; ``top_k``, ``top_p`` and
        ``min_p`` then mean nothing.

        Args:
          given: by the task.
          of_model: what holds where the task says nothing, see :func:`model_settings`.

        Raises:
          ValueError: a setting is not known or has no such value.
        """
        known = ("until", "do_sample", "temperature", "repetition_penalty", *_FILTERS, *_LENGTHS)
        given = {**of_model, **{n: v for n, v in given.items() if n not in _WITHOUT_EFFECT or v != _WITHOUT_EFFECT[n]}}
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(
                f"generation_kwargs.{unknown[0]} of a task is not supported: leave it out "
                f"(there are {', '.join(known)})"
            )
        values = {name: value for name, value in given.items() if value is not None}
        until = values.get("until", [])
        until = [until] if isinstance(until, str) else until
        if not isinstance(until, list | tuple) or not all(isinstance(text, str) for text in until):
            raise ValueError(f"generation_kwargs.until of a task must be a text or a list of texts, got {until!r}")
        longest = next((values[name] for name in _LENGTHS if name in values), _MOST_TOKENS)
        if isinstance(longest, bool) or not isinstance(longest, int) or longest < 1:
            raise ValueError(f"generation_kwargs.max_gen_toks of a task must be an integer above 0, got {longest!r}")
        return cls(tuple(text for text in until if text), longest, tuple(_sampling(values).items()))


def _sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    temperature = values.get("temperature", 1.0 if values.get("do_sample") else 0.0)
    if not values.get("do_sample", temperature != 0):
        temperature = 0.0
    filters = () if temperature == 0 else _FILTERS
    named = {name: values[name] for name in (*filters, "repetition_penalty") if name in values}
    if named.get("top_k") in (0, -1):  # spellings of none
        del named["top_k"]
    return {"temperature": temperature, **named}


def model_settings(directory: str) -> dict[str, Any]:
    """What a model's ``generation_config.json`` says of all answers, as transformers obeys it, greedy ones too.

    What is obeyed here, and what would be there alone, is logged.

    Raises:
      ValueError: the file is not a JSON object.
    """
    stated = {n: v for n, v in TokenizerDirectory(directory).generation_settings().items() if v is not None}
    found = {name: stated[name] for name in _OF_THE_MODEL if name in stated}
    penalty = found.get("repetition_penalty", 1)
    where = f"{directory}/{GENERATION_CONFIG}"
    if penalty != 1:
        _log.warning(
            "%s: repetition_penalty %s holds for answers to tasks that name none, as in transformers", where, penalty
        )
    lost = [n for n, v in stated.items() if n in _OTHERS or (n in _WITHOUT_EFFECT and v != _WITHOUT_EFFECT[n])]
    if lost:
        _log.warning("%s: answers are made without %s, which transformers would obey", where, listed(lost))
    return found


def answers(
    model: ByteTransformer,
    params: Params,
    encoder: TextEncoder,
    requests: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    stop_ids: Sequence[int],
    batch_size: int,
    max_length: int,
    of_model: Mapping[str, Any] = MappingProxyType({}),
    progress: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """The text that follows each prompt, up to its first stop text, or to eos where it is spelled out.

    Args:
      model: the network.
      params: its weights.
      encoder: of prompts.
      requests: a prompt and the ``generation_kwargs`` of its task.
      stop_ids: tokens that end a text.
      batch_size: prompts of one call.
      max_length: tokens of a prompt with its answer; a longer prompt loses its beginning.
      of_model: see :meth:`AnswerSettings.read`.
      progress: called with the number of answers made since the last call.

    Raises:
      ValueError: settings are not known, or leave no room for a prompt.
    """
    by_settings: dict[AnswerSettings, list[int]] = {}
    for number, (_, given) in enumerate(requests):
        by_settings.setdefault(AnswerSettings.read(given, of_model), []).append(number)
    made = [""] * len(requests)
    for settings, numbers in by_settings.items():
        room = max_length - settings.max_new_tokens
        if room < 1:
            raise ValueError(
                f"generation_kwargs.max_gen_toks of a task is {settings.max_new_tokens}, which leaves no room for a "
                f"prompt in the {max_length} positions of the model: lower it in the task"
            )
        encoded = encoder.encode([requests[number][0] for number in numbers])
        rows = {number: list(ids[-room:]) for number, ids in zip(numbers, encoded, strict=True)}
        ordered = sorted(numbers, key=lambda number: len(rows[number]), reverse=True)
        for at in range(0, len(ordered), batch_size):
            part = ordered[at : at + batch_size]
            prompts = [rows[number] or [encoder.prefix_id] for number in part]
            size = min(batch_size, len(ordered))
            texts = _continue(model, params, encoder.tokenizer, prompts, part, size, settings, stop_ids)
            for number, text in zip(part, texts, strict=True):
                made[number] = text
            progress(len(part))
    return made


def _continue(
    model: ByteTransformer,
    params: Params,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    seeds: list[int],
    batch_size: int,
    settings: AnswerSettings,
    stop_ids: Sequence[int],
) -> list[str]:
    """Texts behind prompts; a batch that is not full repeats its last prompt, for the sake of the program's shape."""
    more = batch_size - len(prompts)
    named = [ids[0] for ids in map(lambda text: _control(tokenizer, text), settings.until) if ids]
    # What follows a prompt is decoded by itself, as lm-eval does: a space before its first word may be left out.
    streams = [TextStream(tokenizer, stop_texts=settings.until) for _ in prompts]

    ended = [False] * len(prompts)

    def all_ended(new: NewTokens) -> bool:
        for row, stream in enumerate(streams):
            stream.push(new[row])
            ended[row] = stream.stopped or not new[row]  # which is so behind a stop token
        return all(ended)

    generated = generate(
        model,
        params,
        prompts + [prompts[-1]] * more,
        max_new_tokens=settings.max_new_tokens,
        stop_tokens=[*stop_ids, *named],
        seed=[*seeds, *[seeds[-1]] * more],
        pad_token=tokenizer.pad_id or 0,
        stream=all_ended if settings.until else None,
        **dict(settings.sampling),
    )
    known = tokenizer.vocab_size
    texts = [tokenizer.decode([i for i in row if i < known]) for row in generated.sequences[: len(prompts)]]
    end = [] if tokenizer.eos_id is None else [tokenizer.decode([tokenizer.eos_id], skip_special_tokens=False)]
    for stop in (*settings.until, *end):
        texts = [text.split(stop)[0] for text in texts]
    return texts


def _control(tokenizer: Tokenizer, text: str) -> list[int]:
    """The control token that a stop text spells, which decoded text does not show; nothing where it is none."""
    ids = tokenizer.encode(text, parse_special=True)
    return ids if len(ids) == 1 and tokenizer.decode(ids) == "" else []
