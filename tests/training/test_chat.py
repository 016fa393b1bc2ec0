"""A run of conversations: what it validates, samples and leaves to those who use its weights."""

import dataclasses
import json

import pytest
from helpers.runs import ROOT, cli, write_config

from stellarbyte_jax.checkpoint.bundle import load_bundle
from stellarbyte_jax.config import compose, load
from stellarbyte_jax.tokenizer.chat import Conversation
from stellarbyte_jax.training.chat import ends_of_texts, ids_of_run, prompt_ids, tokenizer_of_run

TEMPLATE = (
    "{% for m in messages %}<|SBOS|>{{ m.role }}\n{{ m.content }}"
    "{{ '<|PAD|>' if m.role == 'assistant' else '<|SEOS|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|SBOS|>assistant\n{% endif %}"
)


def records(path, count):
    lines = []
    for n in range(count):
        turns = [{"role": role, "content": f"{role[0]}{n}"} for role in ("user", "assistant")]
        lines.append(json.dumps({"messages": turns * (1 + n % 2)}) + "\n")
    path.write_text("".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Settings of a run that is done, and its directory."""
    directory = tmp_path_factory.mktemp("chat")
    (directory / "own.jinja").write_text(TEMPLATE)
    settings = [
        f"data.train={records(directory / 'train.jsonl', 60)}",
        f"data.validation={records(directory / 'valid.jsonl', 9)}",
        f"data.chat.template={directory / 'own.jinja'}",
        "data.format=chat",
        "data.chat.prompt_weight=0.1",
        "data.sequence_length=64",
        "steps=4",
        "evaluation.interval=2",
        "sample_prompts=Hi",
        "export_at_end=true",
    ]
    file = write_config(directory)
    assert cli(file, *settings) == 0
    return load(str(file), settings), directory / "run"


def test_validation_tells_each_reply(run):
    lines = [json.loads(line) for line in (run[1] / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "validation/loss" in line]
    assert len(validated) == 2 and {"validation/loss_reply_1", "validation/loss_reply_2"} <= validated[0].keys()
    assert "validation/loss_reply_3" not in validated[0]


def test_validation_tells_what_it_did_not_read(run, tmp_path, capsys):
    """Of each pass, a conversation that does not fit and one that is no conversation."""
    config, _ = run
    valid = tmp_path / "valid.jsonl"
    long = {"messages": [{"role": "user", "content": "long " * 99}, {"role": "assistant", "content": "ok"}]}
    lines = open(config.data.validation[0], encoding="utf-8").read()
    valid.write_text(f"{lines}{json.dumps(long)}\n" + '{"messages": []}\n')
    told = [f"data.validation={valid}", "data.on_error=skip", f"output_dir={tmp_path / 'run'}"]
    settings = [f"data.train={config.data.train[0]}", f"data.chat.template={config.data.chat.template}", *told]
    more = ["data.format=chat", "data.sequence_length=64", "steps=4", "evaluation.interval=2"]
    assert cli(write_config(tmp_path), *settings, *more) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    counts = [
        (line["validation/skipped_lines"], line["validation/left_out_conversations"])
        for line in lines
        if "validation/loss" in line
    ]
    assert counts == [(1, 1), (1, 1)]
    assert "skipped lines 1  left out 1" in capsys.readouterr().out


def test_a_template_that_was_moved_is_the_one_that_the_run_keeps(run, tmp_path, capsys):
    config, _ = run
    template, kept = tmp_path / "t.jinja", tmp_path / "run" / "chat_template.jinja"
    template.write_text(TEMPLATE)
    settings = [f"data.train={config.data.train[0]}", f"data.chat.template={template}", f"output_dir={kept.parent}"]
    settings += [
        "data.format=chat",
        "data.sequence_length=64",
        f"data.validation={config.data.validation[0]}",
        "schedule.warmup_steps=1",
    ]
    file = write_config(tmp_path)
    assert cli(file, *settings, "steps=2") == 0
    template.rename(tmp_path / "moved.jinja")
    assert cli(file, *settings, "steps=4") == 0
    assert f"data.chat.template: {template} does not exist; its copy in {kept} is used" in capsys.readouterr().out
    assert load(str(kept.parent / "train_config.json"), []).data.chat.template == str(template)
    other = [*settings, f"data.chat.template={tmp_path / 'other.jinja'}"]
    assert cli(file, *other, "steps=6") != 0
    assert "other.jinja cannot be read" in capsys.readouterr().err, "not the file of this run"


def test_what_is_sampled_is_an_answer(run):
    config, directory = run
    (sample,) = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    assert sample["prompt"] == "Hi"
    tokenizer = tokenizer_of_run(config)
    asked = tokenizer.decode(prompt_ids(config, tokenizer, "Hi"), skip_special_tokens=False)
    assert asked == "<|SBOS|>user\nHi<|SEOS|><|SBOS|>assistant\n"


def test_a_run_and_its_export_know_the_template_and_the_end_of_a_reply(run):
    config, directory = run
    pad = tokenizer_of_run(config).pad_id
    for place in (directory, directory / "hf"):
        bundle = load_bundle(place)
        assert bundle.tokenizer.chat_template == TEMPLATE and not bundle.plain_text
        assert bundle.stop_ids == [bundle.tokenizer.eos_id, pad]
        Conversation(bundle.tokenizer).ask("Hi")
    assert json.loads((directory / "hf" / "generation_config.json").read_text())["eos_token_id"] == bundle.stop_ids
    assert "plain text" not in (directory / "hf" / "README.md").read_text()


def test_a_run_of_texts_knows_nothing_of_replies(tmp_path):
    config = load(str(write_config(tmp_path)), [])
    assert ends_of_texts(config, tokenizer_of_run(config)) == [tokenizer_of_run(config).eos_id]
    assert prompt_ids(config, tokenizer_of_run(config), "Hi")[0] == tokenizer_of_run(config).bos_id


def test_a_template_without_an_end_is_told(run, tmp_path, caplog):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    config = compose(run[0], overrides=[f"data.chat.template={tmp_path / 't.jinja'}"])
    tokenizer = tokenizer_of_run(config)
    assert ends_of_texts(config, tokenizer) == [tokenizer.eos_id]
    assert "writes no special token after a reply" in caplog.text


def test_the_end_of_a_reply_may_be_marked_with_a_newline(run, tmp_path):
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|SEOS|>{% else %}"
        "{% generation %}{{ '<|SBOS|>' + m.content + '<|PAD|>\n' }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    config = compose(run[0], overrides=[f"data.chat.template={tmp_path / 't.jinja'}"])
    tokenizer = tokenizer_of_run(config)
    assert ends_of_texts(config, tokenizer) == [tokenizer.eos_id, tokenizer.pad_id]


def test_other_ends_stay_and_those_without_a_row_are_left_out(run):
    config, _ = run
    tokenizer = tokenizer_of_run(config)
    kept = ids_of_run(config, {"eos_token_id": 7, "pad_token_id": 1})
    assert kept == {"eos_token_id": [7, tokenizer.eos_id, tokenizer.pad_id], "pad_token_id": 1}
    ends = (tokenizer.eos_id, tokenizer.pad_id)
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=max(ends)))
    assert ends_of_texts(small, tokenizer) == [min(ends)]


def test_the_set_in_the_repository_is_read(tmp_path):
    config = load(str(ROOT / "configs" / "sft.py"), [])
    assert config.data.format == "chat" and config.init_from == "runs/quickstart"
    for name in (*config.data.train, *config.data.validation):
        assert all(json.loads(line)["messages"] for line in open(name, encoding="utf-8"))
