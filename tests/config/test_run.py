"""Settings of a run that contradict each other are refused."""

import pytest

from stellarbyte_jax.config import (
    ByteConfig,
    ConfigError,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    override,
)


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        (DataConfig, {"sequence_length": 1}, "sequence_length must be at least 2"),
        (DataConfig, {"fields": []}, "fields must name at least one field"),
        (DataConfig, {"workers": -1}, r"workers must be int \(not negative, below 2.63\), got -1"),
        (DataConfig, {"train": "a.jsonl"}, "train must be a list of str, got 'a.jsonl'"),
        (OptimizerConfig, {"b1": 1.0}, r"b1 must be float \(in \[0, 1\)\)"),
        (
            OptimizerConfig,
            {"learning_rate": float("nan")},
            r"learning_rate must be float \(positive, finite\), got nan",
        ),
        (OptimizerConfig, {"weight_decay": -0.1}, r"weight_decay must be float \(not negative, finite\)"),
        (
            DataConfig,
            {"fields": ["a"], "template": "{text}"},
            r"data\.template names the fields .* leave data\.fields out",
        ),
        (OptimizerConfig, {"name": "lion", "eps": 1e-3}, "eps is of adamw and muon: lion takes signs .* leave it out"),
        (OptimizerConfig, {"weight_decay": 0.0, "decay_embeddings": False}, "weight_decay is 0: leave it out"),
        (ScheduleConfig, {"name": "constant", "final_ratio": 0.5}, "constant never falls: leave it out"),
        (ScheduleConfig, {"name": "cosine_restarts", "cycle_decay": 0.5}, r"there is one: set schedule\.cycles"),
        (TrainConfig, {"schedule": {"name": "cosine_restarts", "cycles": 451}}, "451 do not fit into the 900 steps"),
        (ScheduleConfig, {"cycles": 2}, "belong to cosine_restarts, the schedule is cosine"),
        (ScheduleConfig, {"decay_steps": 2}, "belongs to wsd, the schedule is cosine"),
        (ScheduleConfig, {"final_ratio": 1.5}, r"final_ratio must be float \(in \[0, 1\]\)"),
        (
            LoggingConfig,
            {"trackers": ["mlflow"]},
            r"^logging\.trackers may hold tensorboard, wandb, swanlab, got mlflow$",
        ),
        (
            TrainConfig,
            {"steps": 150, "schedule": {"name": "wsd", "decay_steps": 60}},
            r"^schedule\.warmup_steps=100 and schedule\.decay_steps=60 do not fit into steps=150: lower them, or",
        ),
        (
            TrainConfig,
            {"steps": 10},
            r"^schedule\.warmup_steps=100 do not fit into steps=10: lower them, or set more steps$",
        ),
        (TrainConfig, {"global_batch_size": 32, "gradient_accumulation_steps": 5}, "32 is not divisible by .* 5"),
        (TrainConfig, {"model": ByteConfig(max_position_embeddings=512)}, "1024 is longer than .* 512"),
        (TrainConfig, {"ema_decay": 1.0}, "ema_decay must be"),
        (TrainConfig, {"output_dir": " "}, "output_dir is empty: name a directory for the run, such as runs/first"),
        (TrainConfig, {"init_from": ""}, "init_from is empty: name a directory, or none"),
        (TrainConfig, {"sample_interval": 5}, "sample_interval=5 would change nothing without sample_prompts: name"),
    ],
)
def test_contradictions_are_refused(section, settings, message):
    required = {"output_dir": "runs/a", "steps": 1000} if section is TrainConfig else {}
    with pytest.raises(ConfigError, match=message):
        section(**(required | settings))


@pytest.mark.parametrize(
    "setting", ["evaluation.patience=3", "evaluation.interval=7", "evaluation.batches=3", "checkpoint.keep_best=5"]
)
def test_evaluation_needs_validation_data(setting):
    run = TrainConfig(output_dir="runs/test", steps=1000)
    name = setting.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{name} would change nothing without data.validation: .* or set ") as caught:
        override(run, [setting])
    reset = str(caught.value).partition("or set ")[2].partition(",")[0]
    assert override(run, [setting, *reset.split()]) == run  # what it says is a way out
    assert override(run, [setting, "data.validation=v.jsonl"]) != run


def test_every_cycle_has_a_first_step_and_a_last_one():
    schedule = ScheduleConfig(name="cosine_restarts", cycles=450)
    assert TrainConfig(output_dir="runs/test", steps=1000, schedule=schedule).schedule.cycles == 450
