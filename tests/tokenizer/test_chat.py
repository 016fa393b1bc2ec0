"""Messages to a prompt, as transformers makes it."""

import dataclasses
from pathlib import Path

import pytest

from stellarbyte_jax.tokenizer.chat import Conversation
from stellarbyte_jax.tokenizer.codec import load_tokenizer

COMMITTED = Path(__file__).resolve().parents[2] / "tokenizer"


@pytest.fixture(scope="module")
def words():
    """The committed tokenizer."""
    return load_tokenizer(COMMITTED)


def test_a_conversation_is_the_template_of_transformers(words):
    import transformers

    peer = transformers.AutoTokenizer.from_pretrained(words.path)
    conversation = Conversation(words, system="Be brief.")
    conversation.ask("你好\n")
    conversation.answer(" Hello. ")
    ids = conversation.ask("And?")
    assert ids == peer.apply_chat_template(conversation.messages, add_generation_prompt=True)["input_ids"]
    assert ids[0] == words.bos_id and ids.count(words.eos_id) == 4


def test_conversations_that_cannot_be(words):
    with pytest.raises(ValueError, match="has no chat_template"):
        Conversation(dataclasses.replace(words, chat_template=None))
    with pytest.raises(ValueError, match="is not valid"):
        Conversation(dataclasses.replace(words, chat_template="{% for %}"))
    refusing = Conversation(dataclasses.replace(words, chat_template="{{ raise_exception('no roles here') }}"))
    with pytest.raises(ValueError, match="refuses the messages: no roles here"):
        refusing.ask("x")


def test_old_turns_are_forgotten_but_not_the_system_message(words):
    conversation = Conversation(words, system="Be brief.")
    conversation.ask("one " * 10)
    conversation.answer("first")
    both = conversation.ask("two")
    conversation.answer("second")
    assert conversation.ask("three", limit=len(both)) != both
    assert [m["content"].split()[0] for m in conversation.messages] == ["Be", "two", "second", "three"]
    conversation.answer("third")
    short = Conversation(words, system="Be brief.").ask("four")
    assert conversation.ask("four", limit=len(short)) == short
    with pytest.raises(ValueError, match=f"room for {len(short)}: shorten it, or ask for fewer new tokens"):
        conversation.ask("five " * 40, limit=len(short))
