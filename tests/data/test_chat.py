"""Conversations from files to batches: what is learnt of them, what does not fit, what is wrong with a line."""

import datetime
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from stellarbyte_jax.config import ChatConfig, ConfigError, DataConfig
from stellarbyte_jax.data.encode import document_groups
from stellarbyte_jax.data.loader import make_loader
from stellarbyte_jax.data.shards import prepare
from stellarbyte_jax.data.sources import DataError
from stellarbyte_jax.data.text import TextFormat
from stellarbyte_jax.tokenizer.codec import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = load_tokenizer(ROOT / "tokenizer")


def conversation(*said):
    roles = ["user", "assistant"] * len(said)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]}


@pytest.fixture
def written(tmp_path):
    """Writes records to a file, and gives settings that read it."""

    def write(records, *, chat=None, name="a.jsonl", **settings):
        path = tmp_path / name
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        files = {"train": (str(path),), "validation": (str(path),), "cache_dir": str(tmp_path / "cache")}
        fixed = {"tokenizer": TOKENIZER.path, "format": "chat", "sequence_length": 64, "workers": 0, "epochs": 1}
        return DataConfig(**{**files, **fixed, "chat": ChatConfig(**(chat or {})), **settings})

    return write


def batches(data, split="train", rows=2, seed=0):
    with make_loader(data, split=split, batch_size=rows, seed=seed) as loader:
        found = list(loader)
        return found, loader.counts


def learnt(found):
    """Each reply as text, in the order of rows."""
    texts = []
    for batch in found:
        for tokens, replies, segments, mask in zip(
            batch["tokens"], batch["replies"], batch["segment_ids"], batch["loss_mask"], strict=True
        ):
            for segment in range(1, segments.max() + 1):
                for reply in range(1, replies.max() + 1):
                    ids = tokens[(segments == segment) & (replies == reply) & mask]
                    texts += [TOKENIZER.decode(ids.tolist(), skip_special_tokens=False)] if len(ids) else []
    return texts


TALK = [conversation("Hi", "Hello."), conversation("1+1?", "2", "2+2?", "4"), conversation("你是谁", "鲸鱼")]


def test_replies_and_their_ends_are_learnt(written):
    found, counts = batches(written(TALK, shuffle=False))
    assert learnt(found) == ["Hello.<|SEOS|>", "2<|SEOS|>", "4<|SEOS|>", "鲸鱼<|SEOS|>"] and counts == {}


def test_the_last_reply_alone(written):
    found, _ = batches(written(TALK, shuffle=False, chat={"replies": "last"}))
    assert learnt(found) == ["Hello.<|SEOS|>", "4<|SEOS|>", "鲸鱼<|SEOS|>"]


def test_a_reply_of_weight_0_is_read_and_not_learnt(written):
    record = conversation("1+1?", "3", "No.", "2")
    record["messages"][1]["weight"] = 0
    (batch,), _ = batches(written([record]))
    assert learnt([batch]) == ["2<|SEOS|>"]
    assert "3" in TOKENIZER.decode(batch["tokens"][0].tolist())


def test_prompts_are_learnt_where_they_have_a_weight_and_never_in_validation(written):
    data = written(TALK, chat={"prompt_weight": 0.5})
    (batch,), _ = batches(data)
    np.testing.assert_array_equal(batch["loss_mask"], (batch["segment_ids"] > 0) & (batch["positions"] > 0))
    (validated,), _ = batches(data, "validation")
    np.testing.assert_array_equal(validated["loss_mask"], validated["replies"] > 0)


@pytest.mark.parametrize("replies", ["all", "last"])
def test_a_reply_that_is_not_learnt_has_no_weight_of_prompts(replies, written):
    record = conversation("1+1?", "3", "No.", "2")
    if replies == "all":
        record["messages"][1]["weight"] = 0
    (batch,), _ = batches(written([record], chat={"prompt_weight": 0.5, "replies": replies}))
    rest = TOKENIZER.decode(batch["tokens"][0][batch["loss_mask"][0]].tolist())
    assert "3" not in rest and "No." in rest and "2" in rest
    assert set(batch["replies"][0].tolist()) == {-1, 0, 2}


def test_a_last_reply_of_weight_0_leaves_nothing_to_learn(written):
    record = conversation("1+1?", "2", "No.", "3")
    record["messages"][3]["weight"] = 0
    with pytest.raises(DataError, match=r'a.jsonl:1: nothing is to be learnt: each reply has "weight": 0, or is not'):
        batches(written([record], chat={"replies": "last"}))


def test_a_template_that_marks_nothing_is_an_error(written, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.content }}{% if 0 %}{% generation %}{% endgeneration %}{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"a.jsonl:1: the chat template marks nothing of what is to be learnt"):
        batches(written(TALK, chat={"template": str(template)}))


def test_a_template_of_ones_own(written, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<|SEOS|>{% endfor %}")
    found, _ = batches(written(TALK[:1], chat={"template": str(template)}))
    assert TOKENIZER.decode(found[0]["tokens"][0].tolist(), skip_special_tokens=False).startswith(
        "u:Hi<|SEOS|>a:Hello."
    )
    with pytest.raises(DataError, match=r"data.chat.template=.*absent cannot be read: No such file"):
        batches(written(TALK, chat={"template": str(tmp_path / "absent")}))
    with pytest.raises(DataError, match=r"a.jsonl:1: the chat template of .*t.jinja refuses the messages: no"):
        template.write_text("{{ raise_exception('no') }}")
        batches(written(TALK, chat={"template": str(template)}))
    template.write_text("{% for %}")
    for on_error in ("raise", "skip"):  # it is no line that is to be skipped
        with pytest.raises(ValueError, match=r"^the chat template of .*t.jinja is not valid: [^;]*$"):
            batches(written(TALK, chat={"template": str(template)}, on_error=on_error))


LONG = conversation("one", "1 " * 20, "two", "2 " * 20, "three", "3 " * 20)


def test_a_conversation_that_does_not_fit_loses_whole_turns(written):
    data = written([LONG, *TALK], shuffle=False, sequence_length=120)
    found, counts = batches(data)
    texts = learnt(found)
    assert sorted(text[0] for text in texts) == sorted("12H24鲸") and "2 " * 20 + "<|SEOS|>" in texts
    assert counts == {"shortened_conversations": 1}
    found, counts = batches(written([LONG, *TALK], shuffle=False, sequence_length=32))
    assert sorted(text[0] for text in learnt(found)) == sorted("H24鲸") and counts == {"left_out_conversations": 1}
    found, _ = batches(written([LONG], sequence_length=120, chat={"replies": "last"}))
    assert learnt(found) == ["2 " * 20 + "<|SEOS|>"], "the last that is left"
    skipped = written([LONG, *TALK], shuffle=False, sequence_length=100, chat={"too_long": "skip"})
    found, counts = batches(skipped)
    assert len(learnt(found)) == 4 and counts == {"left_out_conversations": 1}
    with pytest.raises(DataError, match=r"a.jsonl:1: \d+ tokens are more than data.sequence_length=100: raise that"):
        batches(written([LONG, *TALK], sequence_length=100, chat={"too_long": "raise"}))
    with pytest.raises(DataError, match=r"too long or was skipped; .* raise data.sequence_length .* is 32$"):
        batches(written([LONG], sequence_length=32))


def test_a_conversation_is_left_out_where_nothing_to_learn_would_stay(written):
    silent = {"messages": [{**m, "weight": int(n > 4)} for n, m in enumerate(LONG["messages"])]}
    found, counts = batches(written([silent, *TALK], shuffle=False, sequence_length=120))
    assert sorted(text[0] for text in learnt(found)) == sorted("H24鲸") and counts == {"left_out_conversations": 1}


def test_each_time_that_a_conversation_comes_is_counted(written):
    data = written([LONG], epochs=None, weights=(1.0,), sequence_length=120)
    with make_loader(data, split="train", batch_size=2, seed=0) as loader:
        next(loader)
        assert loader.counts == {"shortened_conversations": 64}, "those that wait"


def test_a_bad_line_is_named_or_skipped(written):
    bad = [*TALK[:2], conversation("Hi"), *TALK[2:]]
    with pytest.raises(DataError, match=r"a.jsonl:3: no message is the assistant's.*; mend the line or leave such"):
        batches(written(bad))
    found, counts = batches(written(bad, on_error="skip"))
    assert len(learnt(found)) == 4 and counts == {"skipped_lines": 1}
    with pytest.raises(DataError, match=r"a.jsonl:1: field 'messages' is empty"):
        make_loader(written([{"messages": []}, *TALK]), split="train", batch_size=2, seed=0)


def test_the_first_line_of_each_file_is_read_at_once(written, tmp_path):
    written([{"messages": []}], name="b.jsonl")
    data = written([*TALK], train=tuple(str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")))
    with pytest.raises(DataError, match=r"b.jsonl:1: field 'messages' is empty"):
        make_loader(data, split="train", batch_size=2, seed=0)


def test_a_tokenizer_that_was_made_again_is_read_again(written, tmp_path):
    template = tmp_path / "t.jinja"
    for end in ("<|SEOS|>", "<|PAD|>"):
        template.write_text("{% for m in messages %}{{ m.content }}" + end + "{% endfor %}")
        found, _ = batches(written(TALK[:1], chat={"template": str(template)}))
        assert learnt(found) == ["Hello." + end]


def test_a_state_is_of_the_replies_that_are_learnt(written):
    with make_loader(written(TALK), split="train", batch_size=2, seed=0) as loader:
        state = loader.state()
    last = written(TALK, chat={"replies": "last"})
    with (
        make_loader(last, split="train", batch_size=2, seed=0) as loader,
        pytest.raises(DataError, match="replies was 'all' and is now 'last'"),
    ):
        loader.restore(state)


def test_mixtures_are_shuffled_anew_each_time_and_validation_is_not_mixed(written):
    groups = document_groups(0, seed=1, parts=[(0, 20)], weights=[1.0])
    seen = [*groups[0], *groups[1]]
    first, second = seen[:20], seen[20:40]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != list(range(20)) and first != second
    data = written(TALK, epochs=None, weights=(1.0,), name="a.jsonl")
    with make_loader(data, split="validation", batch_size=2, seed=0) as loader:
        assert len(learnt(itertools.islice(loader, 9))) == 4, "each once"


def test_what_cannot_hold_conversations_is_refused(written, tmp_path):
    (tmp_path / "b.txt").write_text("Hi")
    with pytest.raises(DataError, match=r"b.txt holds no conversations, which data.format=chat reads of .jsonl"):
        batches(written(TALK, train=(str(tmp_path / "b.txt"),)))
    texts = tmp_path / "c.jsonl"
    texts.write_text('{"text": "Hi"}\n')
    prepare([str(texts)], tmp_path / "prepared", tokenizer=TOKENIZER.path, text=TextFormat(), workers=0)
    with pytest.raises(DataError, match=r"prepared holds no conversations"):
        batches(written(TALK, train=(str(tmp_path / "prepared"),)))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.json").write_text((ROOT / "tokenizer" / "tokenizer.json").read_text())
    (bare / "tokenizer_config.json").write_text('{"eos_token": "<|SEOS|>"}')
    with pytest.raises(DataError, match=r"bare has no chat template.*data.chat.template"):
        batches(written(TALK, tokenizer=str(bare)))


def test_settings_that_say_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"data.chat.replies would change nothing: set data.format=chat"):
        DataConfig(chat=ChatConfig(replies="last"))
    with pytest.raises(ConfigError, match=r"data.fields is of texts"):
        DataConfig(format="chat", fields=("x",))
    with pytest.raises(ConfigError, match=r"arrangement=contiguous cuts documents"):
        DataConfig(format="chat", arrangement="contiguous")
    with pytest.raises(ConfigError, match=r"data.weights has 1 numbers and data.train 2 entries"):
        DataConfig(train=("a", "b"), weights=(1.0,))
    with pytest.raises(ConfigError, match=r"leave data.epochs out"):
        DataConfig(train=("a",), weights=(1.0,), epochs=2)
    with pytest.raises(ConfigError, match=r"weights must be a list of float \(positive, finite\)"):
        DataConfig(train=("a",), weights=(0.0,))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_hold_conversations(kind, written, tmp_path):
    """Beside columns of any type, such as days."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([{**record, "day": datetime.date(2026, 1, n + 1)} for n, record in enumerate(TALK)])
    path = tmp_path / f"d.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    found, _ = batches(written(TALK, shuffle=False, train=(str(path),)))
    assert learnt(found) == learnt(batches(written(TALK, shuffle=False))[0])


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("as_json", [False, True])
def test_columns_hold_what_each_tool_is_called_with(kind, as_json, written, tmp_path):
    """And nothing of the others, whose arguments have fields in each row of the column."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    template = tmp_path / "t.jinja"
    template.write_text(
        "{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.tool_calls | tojson "
        "if m.tool_calls }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    def calling(name, arguments):
        asked, answered = conversation("Hi", "Hello.")["messages"]
        calls = {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}
        described = {
            "type": "function",
            "function": {"name": name, "parameters": {key: {"a": "b"} for key in arguments}},
        }
        return {"messages": [asked, calls, {"role": "tool", "content": "1"}, answered], "tools": [described]}

    records = [calling("f", {"city": "北京", "in": [{"x": 1}]}), calling("g", {"in": [{"y": 2}], "path": "/"})]
    settings = {"shuffle": False, "sequence_length": 400, "chat": {"template": str(template)}}
    expected, _ = batches(written(records, **settings))
    if as_json:  # as datasets.Json stores them
        objects = [[json.dumps(m) for m in record["messages"]] for record in records]
        column = pa.ExtensionArray.from_storage(pa.json_(), pa.array([each for row in objects for each in row]))
        offsets = np.cumsum([0, *map(len, objects)]).astype(np.int32)
        parameters = pa.map_(pa.string(), pa.struct({"a": pa.string()}))
        described = pa.struct(
            {"type": pa.string(), "function": pa.struct({"name": pa.string(), "parameters": parameters})}
        )
        tools = pa.array([record["tools"] for record in records], pa.list_(described))
        table = pa.table({"messages": pa.ListArray.from_arrays(offsets, column), "tools": tools})
    else:
        table = pa.Table.from_pylist(records)
    path = tmp_path / f"d.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    found, _ = batches(written([], train=(str(path),), **settings))
    np.testing.assert_array_equal(found[0]["tokens"], expected[0]["tokens"])
    np.testing.assert_array_equal(found[0]["replies"], expected[0]["replies"])


@pytest.mark.parametrize("form", ["chat", "text"])
def test_mixtures(form, written, tmp_path):
    """Shares hold in every stretch; each set is gone through again and again; any place can be gone back to."""

    def record(name, number):
        said = f"{name}{number}"
        return {"text": said} if form == "text" else conversation("?", said)

    names = {"a": 30, "b": 7}
    for name, count in names.items():
        written([record(name, n) for n in range(count)], name=f"{name}.jsonl")
    train = tuple(str(tmp_path / f"{name}.jsonl") for name in names)
    data = written([record("a", 0)], name="v.jsonl", train=train, weights=(3, 1), epochs=None, format=form)

    def texts(loader, count):
        found = []
        for _ in range(count):
            batch = next(loader)
            for row, ids in zip(batch["tokens"], batch["segment_ids"], strict=True):
                found += [TOKENIZER.decode(row[ids == n].tolist()) for n in range(1, ids.max() + 1)]
        return [text.split("\n")[-2] if form == "chat" else text for text in found]

    with make_loader(data, split="train", batch_size=2, seed=3) as loader:
        seen = texts(loader, 12)
        state = loader.state()
        after = texts(loader, 3)
    shares = [sum(text.startswith(name) for text in seen) for name in names]
    assert abs(shares[0] - 3 * shares[1]) < 20
    of_b = [text for text in seen if text.startswith("b") and len(text) > 1]  # a row of text may cut one
    assert {f"b{n}" for n in range(7)} == set(of_b) and len(of_b) > 7, "repeated"
    with make_loader(data, split="train", batch_size=2, seed=3) as again:
        again.restore(json.loads(json.dumps(state)))
        assert texts(again, 3) == after
    other = DataConfig.from_dict({**data.to_dict(), "weights": [1, 1]})
    with (
        make_loader(other, split="train", batch_size=2, seed=3) as loader,
        pytest.raises(DataError, match=r"weights was \[3, 1\] and is now \[1, 1\]"),
    ):
        loader.restore(state)
    del state["stream"]["weights"], state["stream"]["format"]  # of an earlier version
    with (
        make_loader(data, split="train", batch_size=2, seed=3) as loader,
        pytest.raises(DataError, match=r"was (\[\]|'text') and is now"),
    ):
        loader.restore(state)


def test_batches_do_not_depend_on_workers(written):
    records = [conversation(f"say {n}", f"{n} " * (n % 30 + 1)) for n in range(150)]
    data = written(records, epochs=2)
    alone, counts = batches(data)
    shared, shared_counts = batches(DataConfig.from_dict({**data.to_dict(), "workers": 2}))
    assert len(alone) == len(shared) and counts == shared_counts
    for a, b in zip(alone, shared, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
