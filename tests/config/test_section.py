"""What every section does: it is exact in JSON, frozen, and knows its names."""

import copy
import dataclasses
import json

import pytest

from stellarbyte_jax.config import ByteConfig, ConfigError, DataConfig, ScheduleConfig, TrainConfig


@pytest.fixture
def run() -> TrainConfig:
    return TrainConfig(output_dir="runs/test", steps=1000)


def test_json_round_trip_is_exact():
    config = TrainConfig(
        output_dir="运行/一",
        steps=200,
        sample_prompts=("学而时习之", "Call me"),
        model=ByteConfig(num_hidden_layers=2, sliding_window=8, layer_types=("full_attention", "sliding_attention")),
        data=DataConfig(train=("a.jsonl",)),
        schedule=ScheduleConfig(name="wsd", warmup_steps=3, decay_steps=10),
    )
    text = config.to_json()
    again = TrainConfig.from_dict(json.loads(text))
    assert again == config
    assert again.to_json() == text
    assert "运行" in text


def test_an_int_given_for_a_float_is_stored_as_one():
    assert ByteConfig(rope_theta=10000).to_dict() == ByteConfig().to_dict()
    assert type(ByteConfig(rope_theta=10000).rope_theta) is float


def test_from_dict_wants_objects_and_known_names(run):
    with pytest.raises(ConfigError, match="ByteConfig must be an object with named settings, got 3"):
        TrainConfig.from_dict(run.to_dict() | {"model": 3})
    with pytest.raises(ConfigError, match="TrainConfig lacks output_dir, steps: give it"):
        TrainConfig.from_dict({})
    with pytest.raises(ConfigError, match="DataConfig: there is no setting 'trains'; did you mean train"):
        TrainConfig.from_dict(run.to_dict() | {"data": {"trains": ["a"]}})


def test_frozen_hashable_and_copied_whole(run):
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.steps = 3  # type: ignore[misc]
    assert copy.deepcopy(run) == run and hash(copy.deepcopy(run)) == hash(run)
    with pytest.raises(ConfigError, match="no setting 'stepz'"):
        dataclasses.replace(run, stepz=3)


def test_a_value_without_a_name_is_told_to_have_one():
    for section, value, example in (
        (ByteConfig, 768, "ByteConfig(hidden_size=768)"),
        (TrainConfig, "runs/a", "TrainConfig(output_dir='runs/a')"),
    ):
        with pytest.raises(ConfigError) as caught:
            section(value)
        assert str(caught.value) == f"settings of {section.__name__} are given by name, such as {example}"
