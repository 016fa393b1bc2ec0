"""Is a mistyped command line one line, and does it say how a setting is given?"""

import shlex

import pytest

from stellarbyte_jax.cli import benchmark, convert, generate, info, prepare, report, tokenizer, train
from stellarbyte_jax.cli.main import main
from stellarbyte_jax.cli.parser import Parser
from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.config.files import parsed


def refused(act, words, capsys):
    """The one line on standard error of a command that ends at once."""
    with pytest.raises(SystemExit) as end:
        act(shlex.split(words))
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == ""
    (line,) = printed.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("act", "words", "told"),
    [
        (main, "", "the following arguments are required: COMMAND (see stellarbyte --help)"),
        (main, "trian", "argument COMMAND: invalid choice: "),
        (main, "train", "the following arguments are required: --config (see "),
        (train.main, "--config", "argument --config: expected one argument (see "),
        (train.main, "--list-settings zzz", "no setting matches 'zzz' (see "),
        (generate.main, "--model x --seed a", "argument --seed: invalid int value: 'a' (see "),
        (convert.main, "", "the following arguments are required: command (see "),
        (convert.main, "to-hf", "the following arguments are required: source, target (see "),
        (prepare.main, "--output x", "the following arguments are required: --input (see "),
        (info.main, "--config x --format md", "--format belongs to --output (see "),
        (info.main, "--config x --revision v1", "--revision belongs to --model (see "),
        (tokenizer.main, "--output x", "the following arguments are required: --corpus, --stage (see "),
        (report.main, "", "the following arguments are required: "),
        (benchmark.main, "speed", "argument what: invalid choice: 'speed' (choose from "),
        (train.main, "--config x 'a\nb\x1b[2J'", "unrecognized arguments: a b\\x1b[2J (see "),
    ],
)
def test_an_error_is_one_line_that_names_the_help(act, words, told, capsys):
    line = refused(act, words, capsys)
    assert line.startswith(f"error: {told}") and line.endswith(" --help)")


def test_help_names_the_command_that_was_meant(capsys):
    assert refused(convert.main, "to-hf", capsys).endswith(" convert to-hf --help)")
    assert refused(train.main, "", capsys).endswith(" train --help)")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("--steps 5", ["steps=5"]),
        ("--steps=5", ["steps=5"]),
        ("steps=5", ["steps=5"]),
        ("--data.train x", ["data.train=x"]),
        ("--data.train x.jsonl y.jsonl --other", ["data.train=x.jsonl,y.jsonl"]),
        ("--sample-prompts -5 --other", ["sample_prompts=-5"]),
        ("--data-train x", ["data.train=x"]),
        ("--model_hidden_size 8", ["model.hidden_size=8"]),
        ("--learning-rate 3e-4", ["optimizer.learning_rate=3e-4"]),
        ("--lr 3e-4", ["optimizer.learning_rate=3e-4"]),
        ("-lr 3e-4", ["optimizer.learning_rate=3e-4"]),
        ("--batch-size 8", ["global_batch_size=8"]),
        ("--interval 5", ["evaluation.interval=5", "checkpoint.interval=5", "logging.interval=5"]),
        ("--export-at-end", ["export_at_end=true"]),
        ("--output-dir 'my runs/a'", ["output_dir=my runs/a"]),
        ("--hiden_size 8", ["model.hidden_size=8"]),
        ("--learning-rates 1", ["optimizer.learning_rate=1"]),
        ("--frobnicate", []),
        ("steps", []),
        ("nothing=5", []),
    ],
)
def test_a_setting_that_is_typed_as_an_option_is_shown_as_one(words, meant, capsys):
    line = refused(train.main, f"--config x {words}", capsys)
    told = " or ".join("--set " + shlex.quote(setting) for setting in meant)
    assert f"; did you mean {told}? (see " in line if meant else "did you mean" not in line
    for setting in meant:
        assert parsed(TrainConfig, [setting]), "as it is taken"


def test_a_setting_that_needs_a_value_says_so(capsys):
    assert "did you mean --set steps=VALUE? (see" in refused(train.main, "--config x --steps", capsys)


@pytest.mark.parametrize(("act", "words"), [(benchmark.main, "train"), (info.main, "--config quickstart")])
def test_other_commands_with_settings_of_a_run_know_them(act, words, capsys):
    assert "did you mean --set model.hidden_size=8?" in refused(act, f"{words} --hidden-size 8", capsys)


def test_generation_knows_the_settings_of_the_model(capsys):
    assert "did you mean --set cache.dtype=int8? (see" in refused(generate.main, "--model x --cache-dtype int8", capsys)


@pytest.mark.parametrize(
    ("act", "words", "meant"),
    [
        (generate.main, "--model x --max_new_tokens 5", "--max-new-tokens 5"),  # as transformers writes them
        (generate.main, "--model x --top_p=0.5", "--top-p 0.5"),
        (generate.main, "--model x --temprature 0.8 --prompt a", "--temperature 0.8"),
        (generate.main, "--model x --prompts 'a river'", "--prompt 'a river'"),
        (prepare.main, "--input a --output b --text_documents paragraph", "--text-documents paragraph"),
        (prepare.main, "--input a --output b --Overwrite", "--overwrite"),
        (prepare.main, "--input a --output b --over", "--overwrite"),
        (convert.main, "to-hf a b --dtpe bf16", "--dtype bf16"),
        (convert.main, "from-hf a b --over_write", "--overwrite"),
        (train.main, "--config x --init_from y", "--init-from y"),
        (train.main, "--config x --sets steps=5 seed=1", "--set steps=5 seed=1"),
        (train.main, "--config x --s steps=5", "--set steps=5"),
        (train.main, "--config x --step 5", "--set steps=5"),
        (train.main, "--config x --tokenizer y", "--set data.tokenizer=y"),
        (train.main, "--configs quickstart", "--config quickstart"),
        (train.main, "--con=quickstart", "--config quickstart"),
        (train.main, "--steps 5", "--set steps=5"),
        (train.main, "--config x --set --seed=3", "--set seed=3"),
        (benchmark.main, "train --step 5", "--steps 5"),
    ],
)
def test_an_option_that_is_spelled_otherwise_is_told(act, words, meant, capsys):
    assert f"; did you mean {meant}? (see " in refused(act, words, capsys)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--prompt -hello", "a value that begins with a dash is written --prompt=-hello"),
        ("--stop '-*'", "a value that begins with a dash is written '--stop=-*'"),
        ("--prompt --seed 5", None),
        ("--prompt", None),
    ],
)
def test_a_value_that_begins_with_a_dash_is_told_how_to_write(words, told, capsys):
    line = refused(generate.main, f"--model x {words}", capsys)
    assert "expected one argument" in line and (f"; {told} (see " in line if told else ";" not in line)


def test_numbers_and_sentences_that_begin_with_a_dash_are_values():
    parser = Parser(prog="x")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--prompt", action="append")
    words = ["--seed", "-1", "--prompt", "-5 degrees", "--prompt=-x"]
    parsed = parser.parse_args(words)
    assert (parsed.seed, parsed.prompt) == (-1, ["-5 degrees", "-x"])


def test_an_option_that_is_cut_off_is_none(capsys):
    parser = Parser(prog="x")
    parser.add_argument("--overwrite", action="store_true")
    assert "did you mean --overwrite?" in refused(parser.parse_args, "--over", capsys)


def test_what_is_recognized_is_parsed_as_ever():
    parser = Parser(prog="x", settings=TrainConfig)
    parser.add_argument("--steps", type=int)
    assert parser.parse_args(["--steps", "5"]).steps == 5
