"""The command that evaluates, with lm-eval or what stands for it."""

import json
import sys

import jax
import pytest
from helpers.hf_models import random_model, save_words
from helpers.runs import one_error

from stellarbyte_jax.cli import evaluate
from stellarbyte_jax.evaluation.tasks import Result
from stellarbyte_jax.hf.directory import save_pretrained

RESULTS = [
    Result("a", "acc", 0.25, 0.125, 8),
    Result("a", "f1/strict", 3e21, None, 8),
    Result("b", "acc", "N/A", None, None),
    Result("a task with a name of many words", "a_metric_of_its_own/a_filter_of_its_own", -2.5e6, None, None),
]


@pytest.fixture
def directory(tmp_path):
    words = save_words(tmp_path / "words", ["x", "<b>", "<e>", "y"], bos_token="<b>", eos_token="<e>")
    model, params = random_model(num_hidden_layers=1)
    save_pretrained(tmp_path / "hf", model, params, tokenizer=words)
    return tmp_path / "hf"


@pytest.fixture
def asked(monkeypatch):
    """The calls that reach lm-eval, which is not needed."""
    calls = []
    monkeypatch.setattr(evaluate, "require_lm_eval", lambda: None)
    monkeypatch.setattr(evaluate, "check_tasks", lambda names: calls.append(names))
    monkeypatch.setattr(evaluate, "as_lm", lambda bundle, **options: (bundle, options))
    monkeypatch.setattr(
        evaluate, "evaluate_tasks", lambda lm, names, **more: calls.append((lm, names, more)) or RESULTS
    )
    return calls


def test_results_are_a_table_and_json(directory, asked, tmp_path, capsys):
    output = tmp_path / "made" / "results.json"
    arguments = [f"--model={directory}", "--tasks=a,my/b.yaml", "--limit=8", "--batch-size=5", f"--output={output}"]
    assert evaluate.main([*arguments, "--num-fewshot=0", "--compute-dtype=bf16", "--set", "cache.dtype=int8"]) == 0
    names, ((bundle, options), again, settings) = asked
    assert names == again == ("a", "my/b.yaml")
    assert settings == {"limit": 8, "num_fewshot": 0, "chat": False}
    assert options["batch_size"] == 5
    assert (bundle.model.config.compute_dtype, bundle.model.config.cache.dtype) == ("bfloat16", "int8")
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "acc", "0.2500", "0.1250", "8"] in lines
    assert ["a", "f1/strict", "3.0000e+21", "8"] in lines
    assert ["b", "acc", "N/A"] in lines
    assert [*"a task with a name of many words a_metric_of_its_own/a_filter_of_its_own -2.5000e+06".split()] in lines
    written = json.loads(output.read_text(encoding="utf-8"))
    assert written["results"][0] == {"task": "a", "metric": "acc", "value": 0.25, "stderr": 0.125, "samples": 8}
    assert f"jax {jax.__version__}, " in written["on"]
    assert (written["model"], written["limit"], written["compute_dtype"]) == (str(directory), 8, "bfloat16")


def test_results_that_cannot_be_written_are_printed_and_told_in_one_line(directory, asked, tmp_path, capsys):
    assert evaluate.main([f"--model={directory}", "--tasks=a", f"--output={tmp_path}"]) == 1
    told = capsys.readouterr()
    assert "f1/strict" in told.out and "wrote" not in told.out
    (line,) = told.err.splitlines()
    assert line.startswith(f"error: {tmp_path} could not be written: Is a directory; ")
    assert line.endswith("choose another --output")


def test_which_model_is_asked_and_how(directory, asked, monkeypatch):
    loaded, bundle = [], evaluate.load_bundle(directory)
    monkeypatch.setattr(evaluate, "load_bundle", lambda *given, **named: loaded.append((given, named)) or bundle)
    arguments = ["--model=org/name", "--tasks=a, my/b.yaml", "--revision=v2", "--step=7", "--chat", "--num-fewshot=3"]
    assert evaluate.main(arguments) == 0
    assert loaded == [(("org/name", 7), {"revision": "v2"})]
    assert asked[1][1:] == (("a", "my/b.yaml"), {"limit": None, "num_fewshot": 3, "chat": True})


def test_how_far_requests_are_is_told_every_few_seconds(monkeypatch, capsys):
    clock = iter([0.0, 0.0, 9.0, 10.0, 10.0, 12.0, 13.0])
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: next(clock))
    tell = evaluate._teller()
    for done in (0, 5, 6, 7, 9):
        tell("loglikelihood", done, 9)
    assert capsys.readouterr().err.splitlines() == [f"loglikelihood: {n} of 9" for n in (0, 6, 9)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks=a,,b"], "'a,,b' has an empty name"),
        (["--tasks=a", "--limit=0"], "must be an integer of at least 1"),
        (["--tasks=a", "--num-fewshot=-1"], "'-1' must be an integer of at least 0"),
    ],
)
def test_options_that_cannot_be_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--model=x", *arguments])
    assert one_error(capsys, message)


def test_without_lm_eval_one_line_names_the_extra(directory, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert evaluate.main([f"--model={directory}", "--tasks=a"]) == 1
    assert one_error(capsys, "evaluation on tasks needs lm-eval", "pip install 'stellarbyte_jax[eval]'")
