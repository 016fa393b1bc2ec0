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
        (DataConfig, {"workers": -1}, r"workers must be int \(not negative\), got -1"),
        (DataConfig, {"train": "a.jsonl"}, "train must be a list of str, got 'a.jsonl'"),
        (OptimizerConfig, {"b1": 1.0}, r"b1 must be float \(in \[0, 1\)\)"),
        (OptimizerConfig, {"learning_rate": float("nan")}, r"learning_rate must be float \(positive\), got nan"),
        (OptimizerConfig, {"weight_decay": -0.1}, r"weight_decay must be float \(not negative\)"),
        (ScheduleConfig, {"cycles": 2}, "belong to cosine_restarts, the schedule is cosine"),
        (ScheduleConfig, {"decay_steps": 2}, "belongs to wsd, the schedule is cosine"),
        (ScheduleConfig, {"final_ratio": 1.5}, r"final_ratio must be float \(in \[0, 1\]\)"),
        (LoggingConfig, {"trackers": ["mlflow"]}, "trackers may hold .* got .'mlflow'"),
        (TrainConfig, {"steps": 10}, "warmup_steps 100 and decay_steps None do not fit into 10 steps"),
        (TrainConfig, {"global_batch_size": 32, "gradient_accumulation_steps": 5}, "32 is not divisible by .* 5"),
        (TrainConfig, {"model": ByteConfig(max_position_embeddings=512)}, "1024 is longer than .* 512"),
        (TrainConfig, {"ema_decay": 1.0}, "ema_decay must be"),
    ],
)
def test_contradictions_are_refused(section, settings, message):
    required = {"output_dir": "runs/a", "steps": 1000} if section is TrainConfig else {}
    with pytest.raises(ConfigError, match=message):
        section(**(required | settings))


def test_patience_needs_validation_data():
    run = TrainConfig(output_dir="runs/test", steps=1000)
    with pytest.raises(ConfigError, match=r"evaluation\.patience .* give data\.validation"):
        override(run, ["evaluation.patience=3"])
    assert override(run, ["evaluation.patience=3", "data.validation=v.jsonl"]).evaluation.patience == 3
