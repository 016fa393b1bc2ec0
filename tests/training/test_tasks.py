"""Tasks of lm-eval during a run, with a stand-in for what lm-eval measures."""

import functools
import json
import os
import re
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.runs import cli, log_of, same_weights
from helpers.tiny_documents import save_byte_tokenizer
from helpers.training import one_layer

from stellarbyte_jax.checkpoint.weights import load_weights
from stellarbyte_jax.command import MendableError
from stellarbyte_jax.config import ConfigError, EvaluationConfig
from stellarbyte_jax.evaluation.tasks import Result
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes
from stellarbyte_jax.tokenizer.codec import load_tokenizer
from stellarbyte_jax.training import finish, tasks
from stellarbyte_jax.training.samples import Sampler
from stellarbyte_jax.training.tasks import TaskRounds

RESULTS = [Result("a", "acc", 0.25, 0.125, 8), Result("a", "f1/strict", 2, None, 8), Result("b", "acc", "N/A", None, 1)]
NUMBERS = {"tasks/a/acc": 0.25, "tasks/a/acc_stderr": 0.125, "tasks/a/f1/strict": 2.0}


@pytest.fixture
def run(tmp_path, tmp_path_factory):
    """Settings of a run with a vocabulary of bytes and one layer, in a directory that exists."""
    (tmp_path / "run").mkdir()
    tokenizer = load_tokenizer(save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    return functools.partial(one_layer, tmp_path / "run", tokenizer)


@pytest.fixture
def asked(monkeypatch):
    """What is asked of lm-eval; it answers after it has told of a batch."""
    calls = []

    def evaluate(lm, names, **options):
        bundle, progress = lm
        calls.append((bundle, tuple(names), options))
        progress("loglikelihood", 1, 2)
        return RESULTS

    monkeypatch.setattr(tasks, "as_lm", lambda bundle, batch_size, progress: (bundle, progress))
    monkeypatch.setattr(tasks, "evaluate_tasks", evaluate)
    return calls


def rounds_of(config, start=0, stopped=lambda: False, published=None):
    publish = None if published is None else lambda *taken: published.append(taken)
    return TaskRounds(config, ByteTransformer(config.model), start, stopped, publish)


def settings(run, **more):
    return run(evaluation=EvaluationConfig(tasks=("a", "b.yaml"), tasks_limit=8, **more))


def lines_of(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if any(name.startswith("tasks/") for name in line)]


def test_a_round_is_told_and_published_once(run, asked, tmp_path):
    config, said, published = settings(run, tasks_interval=3), [], []
    rounds = rounds_of(config, published=published)
    assert [step for step in range(10) if rounds.due(step)] == [3, 6, 9] and rounds.missing(4)
    rounds.measure("weights", 3, said.append)
    assert said == ["tasks: a/acc 0.2500 ± 0.1250, a/f1/strict 2.0000"]
    assert published == [(3, NUMBERS)]
    ((bundle, names, options),) = asked
    assert (bundle.params, names, options) == ("weights", ("a", "b.yaml"), {"limit": 8})
    assert bundle.stop_ids == [bundle.tokenizer.eos_id] and bundle.add_bos
    assert not rounds.due(3) and rounds.due(6)
    assert not rounds_of(config, start=3).due(3)  # of a resumed run
    assert rounds_of(config, start=2).due(3)  # whose line was dropped
    assert rounds_of(settings(run), start=3).missing(4) and not rounds_of(settings(run), start=3).missing(3)
    for other in ({"tasks": ("c",)}, {"tasks": ("a", "b.yaml"), "tasks_limit": 9}, {"tasks": ("a", "b.yaml")}):
        assert rounds_of(run(evaluation=EvaluationConfig(**other)), start=3).missing(3)
    assert not rounds_of(run(), start=3).missing(4) and not rounds_of(settings(run)).due(3)


def test_ends_of_texts_that_the_model_has_no_row_for_are_left_out(run, asked):
    config = settings(run)
    tokenizer = load_tokenizer(config.data.tokenizer)
    ends = [tokenizer.eos_id, config.model.vocab_size]
    Path(tokenizer.path, "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    rounds_of(config, published=[]).measure("weights", 3, lambda line: None)
    assert asked[0][0].stop_ids == [tokenizer.eos_id]


@pytest.mark.parametrize("note", ["{", "[]", '{"step": "x"}'])
def test_a_broken_note_counts_as_none(run, asked, tmp_path, note):
    (tmp_path / "run" / "tasks.json").write_text(note)
    assert rounds_of(settings(run), start=3).missing(3)


def test_a_round_that_a_signal_breaks_off_is_made_later(run, asked, tmp_path):
    config, said, published = settings(run, tasks_interval=3), [], []
    rounds = rounds_of(config, stopped=lambda: True, published=published)
    rounds.measure("weights", 3, said.append)
    assert said == ["tasks broken off: they are measured when the run goes on"]
    assert published == [] and rounds.due(3) and rounds_of(config, start=3).due(3)


def test_the_end_of_a_run_measures_what_is_missing(run, asked, tmp_path):
    """Also of a run that is complete, whose file is then appended to."""
    config, said = settings(run), []
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 5, "loss": 2.0}\n')
    model = ByteTransformer(config.model)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), param_shapes(model))
    for stopped in (True, False, False):
        sampler, rounds = Sampler(config, model, 5, lambda: False), rounds_of(config, 5, lambda: stopped)  # noqa: B023
        finish.finish(config, model, params, 5, said.append, sampler, rounds)
        assert finish.is_done(config, 5, sampler, rounds) != stopped
    assert lines_of(tmp_path / "run") == [{"step": 5, **NUMBERS}]
    assert len(asked) == 1 and len(said) == 1
    assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith('{"step": 5, "loss": 2.0}\n')


def test_tasks_are_checked_before_a_run(run, monkeypatch):
    finish.check(run())
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"^evaluation\.tasks: evaluation on tasks needs lm-eval .*\[eval\]'$"):
        finish.check(settings(run))
    monkeypatch.setattr(tasks, "require_lm_eval", lambda: None)

    def unknown(names):
        raise MendableError(f"{names[0]}: lm-eval knows no task of this name")

    monkeypatch.setattr(tasks, "check_tasks", unknown)
    with pytest.raises(MendableError, match=r"^evaluation\.tasks: a: lm-eval knows no task of this name$"):
        finish.check(settings(run))


@pytest.mark.parametrize("name", ["tasks_interval", "tasks_limit"])
def test_settings_of_tasks_without_any_are_refused(run, name):
    with pytest.raises(ConfigError, match=rf"^evaluation\.{name}=3 would change nothing without evaluation\.tasks: "):
        run(evaluation=EvaluationConfig(**{name: 3}))
    with pytest.raises(ConfigError, match=r"^evaluation\.tasks holds an empty name"):
        EvaluationConfig(tasks=("",))
    assert run(evaluation=EvaluationConfig(tasks=("a",), **{name: 3})).data.validation == ()


TASKS = ("evaluation.tasks=a", "evaluation.tasks_interval=7", "evaluation.tasks_limit=4")


def test_tasks_change_nothing_in_a_run_and_see_its_averaged_weights(
    config_file, straight, tmp_path, capsys, monkeypatch
):
    """The run is stopped by a signal in its first round, goes on, and trains as one without tasks."""

    def stand_in(before):
        def evaluate(lm, names, limit):
            bundle, progress = lm
            before()
            progress("loglikelihood", 1, 2)
            norm = sum(float(abs(x).sum()) for x in jax.tree.leaves(bundle.params))
            return [Result("a", "norm", norm, None, limit)]

        monkeypatch.setattr(tasks, "check", lambda config: None)
        monkeypatch.setattr(tasks, "as_lm", lambda bundle, batch_size, progress: (bundle, progress))
        monkeypatch.setattr(tasks, "evaluate_tasks", evaluate)

    stand_in(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert cli(config_file, *TASKS) == 143
    out = capsys.readouterr().out
    assert "tasks broken off" in out and "stopped at step 7 of 20" in out
    run = tmp_path / "run"
    assert lines_of(run) == []
    stand_in(lambda: None)
    assert cli(config_file, *TASKS) == 0
    out = capsys.readouterr().out
    assert [line["step"] for line in lines_of(run)] == [7, 14, 20]
    assert re.search(r"^step 14/20  tasks: a/norm \d", out, re.MULTILINE)
    for line in lines_of(run):
        assert line.keys() == {"step", "tasks/a/norm", "wall_seconds", "tokens"}
        if line["step"] in (14, 20):  # checkpoints hold the average as weights to be used
            norm = sum(float(np.abs(x).sum()) for x in jax.tree.leaves(load_weights(run, line["step"])[1]))
            assert line["tasks/a/norm"] == pytest.approx(norm, rel=1e-5)
    assert same_weights(load_weights(run)[1], load_weights(straight)[1])
    kept = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "tasks/" not in line]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in kept))
    assert log_of(run) == log_of(straight)
    assert cli(config_file, *TASKS) == 0  # complete
    assert "a/norm" not in capsys.readouterr().out
