"""What is a conversation, in the forms that people keep them in, and what is none."""

import pytest

from stellarbyte_jax.data.conversations import ConversationFormat
from stellarbyte_jax.data.files import BadRecordError

TURN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
BE_BRIEF = {"role": "system", "content": "Be brief."}
FORMS = {
    "messages": {"messages": TURN},
    "a list": TURN,
    "conversation": {"conversation": TURN, "id": 3},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    "without roles": {"conversations": [{"content": "Hi"}, {"content": "Hello."}]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello."},
    "prompt and completion": {"prompt": "Hi", "completion": "Hello."},
    "messages in prompt and completion": {"prompt": TURN[:1], "completion": TURN[1:]},
    "prompt and response": {"prompt": "Hi", "response": "Hello."},
    "question and answer": {"question": "Hi", "answer": "Hello.", "messages": None},
    "input and output": {"input": "Hi", "output": "Hello."},
    "parts of text": {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in TURN]},
    "nulls of a column": {"messages": [{**m, "tool_calls": None, "name": None} for m in TURN], "tools": None},
    "what nobody answers": {"messages": [*TURN, {"role": "user", "content": "And?"}]},
    "roles in capitals": {"messages": [{**m, "role": m["role"].upper()} for m in TURN]},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    assert ConversationFormat().dialogue(FORMS[form]).messages == TURN


def test_what_goes_before():
    found = ConversationFormat().dialogue(
        {"instruction": "Add", "input": "2, 3", "output": "5", "system": "Be brief.", "history": [["Hi", "Hello."]]}
    )
    assert found.messages == [
        BE_BRIEF,
        *TURN,
        {"role": "user", "content": "Add\n2, 3"},
        {"role": "assistant", "content": "5"},
    ]
    assert (
        ConversationFormat().dialogue({"messages": [{**BE_BRIEF, "role": "developer"}, *TURN]}).messages[0] == BE_BRIEF
    )


def test_a_named_field_is_the_one():
    record = {"messages": TURN, "dialog": [BE_BRIEF, *TURN]}
    assert ConversationFormat("dialog").dialogue(record).messages == [BE_BRIEF, *TURN]
    with pytest.raises(BadRecordError, match=r"no field 'talk', which data.chat.field names; .* messages, dialog"):
        ConversationFormat("talk").dialogue(record)


def test_calls_of_tools():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    result = {"role": "tool", "content": "1", "tool_call_id": "x"}
    record = {"messages": [TURN[0], call, result, result, TURN[1]], "tools": [{"name": "f"}]}
    found = ConversationFormat().dialogue(record)
    assert found.messages == [TURN[0], {**call, "content": ""}, result, result, TURN[1]]
    assert found.tools == [{"name": "f"}]
    assert ConversationFormat().dialogue({**record, "tools": '[{"name": "f"}]'}) == found, "as columns hold them"
    assert ConversationFormat().dialogue({**record, "tools": "[]"}).tools is None


def test_messages_with_weight_0_are_not_learnt():
    found = ConversationFormat().dialogue({"messages": [TURN[0], {**TURN[1], "weight": 0}, *TURN]})
    assert found.silent == {1} and found.messages == [*TURN, *TURN]
    assert ConversationFormat().dialogue({"messages": [TURN[0], {**TURN[1], "weight": 1}]}).silent == set()


def test_of_a_prompt_and_its_completion_the_completion_is_learnt():
    """The assistant's messages in the prompt are not, where their weight does not say so."""
    found = ConversationFormat().dialogue({"prompt": [*TURN, TURN[0]], "completion": TURN[1:]})
    assert found.silent == {1} and found.messages == [*TURN, *TURN]
    learnt = {"prompt": [TURN[0], {**TURN[1], "weight": 1}, TURN[0]], "completion": TURN[1:]}
    assert ConversationFormat().dialogue(learnt).silent == set()


def test_parts_are_joined_and_what_is_blank_is_left_out():
    parts = [{"type": "text", "text": text} for text in ("Hel", "lo.")]
    found = ConversationFormat().dialogue({"messages": [TURN[0], {**TURN[1], "content": parts}], "tools": []})
    assert found.messages == TURN and found.tools is None
    assert ConversationFormat().dialogue({"prompt": "Hi", "completion": "Hello.", "input": "x"}).messages == TURN
    assert ConversationFormat().dialogue({"instruction": "Hi", "output": "Hello.", "system": " "}).messages == TURN


BAD = {
    "no conversation": ({"text": "x"}, r"no conversation: neither .* the fields here are: text; data.chat.field"),
    "a number": (3, r"a JSON object or a list of messages, not 3"),
    "no list": ({"messages": "Hi"}, r"field 'messages' must be a list of messages, it is str"),
    "an empty list": ({"messages": []}, r"field 'messages' is empty"),
    "a message that is none": ({"messages": [*TURN, "Hi"]}, r"message 3 must be an object with role and content"),
    "a missing role": ({"messages": [TURN[0], {"content": "x"}]}, r"message 2 has no role"),
    "an unknown role": (
        {"messages": [{"role": "narrator", "content": "x"}]},
        r"message 1 has the role 'narrator'; known",
    ),
    "a role that is no text": ({"messages": [{"role": 1, "content": "x"}]}, r"message 1 has the role 1"),
    "nobody answers": ({"messages": TURN[:1]}, r"no message is the assistant's"),
    "two of the user": (
        {"messages": [TURN[0], *TURN]},
        r"order: message 2, of the user, follows one of the user; there may be: assistant",
    ),
    "the assistant begins": ({"messages": TURN[1:]}, r"message 1, of the assistant, begins the conversation"),
    "a late system message": ({"messages": [*TURN, BE_BRIEF, *TURN]}, r"message 3, of the system, follows"),
    "a tool without a call": (
        {"messages": [TURN[0], {"role": "tool", "content": "1"}, TURN[1]]},
        r"message 2, of the tool",
    ),
    "an empty answer": (
        {"messages": [TURN[0], {"role": "assistant", "content": " \n"}]},
        r"message 2, of the assistant, is empty",
    ),
    "an empty question": ({"instruction": "", "output": "x"}, r"message 1, of the user, is empty"),
    "no content": ({"messages": [{"role": "user"}, TURN[1]]}, r"message 1, of the user, is empty"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, TURN[1]]},
        r"message 1: .* only text can be learnt",
    ),
    "a content that is no text": (
        {"messages": [{"role": "user", "content": 3}, TURN[1]]},
        r"message 1: the content must be a string, it is int",
    ),
    "half a character": (
        {"messages": [{"role": "user", "content": "a\ud800"}, TURN[1]]},
        r"message 1: half of a surrogate pair at character 2",
    ),
    "an output that is no text": ({"instruction": "x", "output": 3}, r"field 'output' must be a string, it is int"),
    "a history of texts": (
        {"instruction": "x", "output": "y", "history": ["z"]},
        r"field 'history' must be a list of pairs",
    ),
    "tools as a text": ({"messages": TURN, "tools": "f"}, r"field 'tools' is text that is no JSON: Expecting value"),
    "one tool": ({"messages": TURN, "tools": '{"name": "f"}'}, r"field 'tools' must be a list .*, it is dict"),
    "calls as a text": (
        {"messages": [TURN[0], {**TURN[1], "tool_calls": "f"}]},
        r"message 2: tool_calls must be a list",
    ),
    "a call without a name": (
        {"messages": [TURN[0], {**TURN[1], "tool_calls": [{"function": {}}]}]},
        r"tool_calls must be",
    ),
    "half a weight": (
        {"messages": [TURN[0], {**TURN[1], "weight": 0.5}]},
        r"message 2 has the weight 0.5: give 0, not to learn it, or 1",
    ),
    "a weight that is no number": ({"messages": [TURN[0], {**TURN[1], "weight": "0"}]}, r"has the weight '0'"),
    "nothing to learn": ({"messages": [TURN[0], {**TURN[1], "weight": 0}]}, r'every message .* "weight": 0'),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_conversation(case):
    record, message = BAD[case]
    with pytest.raises(BadRecordError, match=message) as raised:
        ConversationFormat().dialogue(record)
    assert "\n" not in str(raised.value)
