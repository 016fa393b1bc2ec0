"""Runs of conversations: prompts that are messages, and the end of a reply that what reads the weights must know."""

import dataclasses
import logging
from pathlib import Path

from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.data.encode_chat import template_source
from stellarbyte_jax.inference.text import encode_prompt
from stellarbyte_jax.tokenizer.chat import Conversation
from stellarbyte_jax.tokenizer.codec import Tokenizer, load_tokenizer
from stellarbyte_jax.tokenizer.directory import CHAT_TEMPLATE
from stellarbyte_jax.tokenizer.special import as_list, stop_ids
from stellarbyte_jax.tokenizer.template import ChatTemplate
from stellarbyte_jax.tokenizer.turns import TurnEncoder

_log = logging.getLogger(__name__)


def tokenizer_of_run(config: TrainConfig) -> Tokenizer:
    """The tokenizer of a run's settings; of conversations with the chat template that the run uses.

    Raises:
      ValueError: it is missing or broken, or there is no template.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    if config.data.format == "text":
        return tokenizer
    return dataclasses.replace(tokenizer, chat_template=template_source(config.data.chat, tokenizer)[0])


def prompt_ids(config: TrainConfig, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of one of ``sample_prompts``: of a text that goes on, or of a message that is answered.

    Raises:
      ValueError: the template refuses the message.
    """
    if config.data.format == "chat":
        return Conversation(tokenizer).ask(prompt)
    return encode_prompt(tokenizer, prompt, add_bos=config.data.add_bos)


def ends_of_texts(config: TrainConfig, tokenizer: Tokenizer) -> list[int]:
    """Ids that end what the model writes: the tokenizer's, and of conversations the one after a reply."""
    ends = stop_ids(tokenizer.path, tokenizer.eos_id)
    if config.data.format == "chat" and (end := _end_of_reply(tokenizer)) is not None and end not in ends:
        ends.append(end)
    return [i for i in ends if 0 <= i < config.model.vocab_size]  # an end that the model has no row for never comes


def _end_of_reply(tokenizer: Tokenizer) -> int | None:
    """The special token that the chat template writes after a reply."""
    assert tokenizer.chat_template is not None
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens, tokenizer.path)
    turns = TurnEncoder(tokenizer, template).encode(
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    )
    learnt = [token for token, reply in zip(turns.ids, turns.replies, strict=True) if reply]
    # A template may mark the newline after the end too.
    end = next((i for i in reversed(learnt) if i in tokenizer.control_ids or tokenizer.decode([i]).strip()), None)
    if end not in tokenizer.control_ids:
        _log.warning(
            "warning: the chat template of %s writes no special token after a reply: the model cannot learn where to "
            "stop",
            tokenizer.path,
        )
        return None
    return end


def keep_template(config: TrainConfig, run: Path, tokenizer: Path) -> None:
    """Gives the run's copy of the tokenizer the run's own chat template, for what reads its weights later.

    The run has one beside it, with which it goes on where the file was moved, see ``begin.find_tokenizer``.
    """
    if config.data.format == "chat" and config.data.chat.template is not None:
        template, _ = template_source(config.data.chat, load_tokenizer(config.data.tokenizer))
        for copy in (run / CHAT_TEMPLATE, tokenizer / CHAT_TEMPLATE):
            if not copy.is_file() or copy.read_text(encoding="utf-8") != template:
                copy.write_text(template, encoding="utf-8")


def ids_of_run(config: TrainConfig, kept: dict[str, int | list[int]]) -> dict[str, int | list[int]]:
    """Special ids for the run's copy of the tokenizer: those that were ``kept``, and the end of a reply."""
    if config.data.format == "text":
        return kept
    tokenizer = tokenizer_of_run(config)
    before = stop_ids(tokenizer.path, tokenizer.eos_id)
    ends = list(dict.fromkeys([*as_list(kept.get("eos_token_id", [])), *ends_of_texts(config, tokenizer)]))
    return kept if ends == before else {**kept, "eos_token_id": ends}
