"""What is read of a run: every number once and in order, whatever is damaged or missing."""

import json

import numpy as np
import pytest
from helpers.training import settings

from stellarbyte_jax.config import override
from stellarbyte_jax.training import record as reading
from stellarbyte_jax.training.record import Continuation, about, read_record
from stellarbyte_jax.training.record import setting as value_of


def write_lines(directory, *lines, name="metrics.jsonl"):
    (directory / name).write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))


def write_run(directory, *lines):
    write_lines(directory, *lines)
    (directory / "train_config.json").write_text(settings().to_json())
    (directory / "about.json").write_text(json.dumps(about(123, 45)))


def test_a_series_is_a_metric_in_order_of_steps(tmp_path):
    write_run(
        tmp_path,
        {"step": 2, "loss": 3, "wall_seconds": 4.5, "tokens": 20},
        {"step": 2, "validation/loss": 2.5, "wall_seconds": 5, "tokens": 20},
        {"step": 4, "loss": 2.0},
        {"step": 1, "loss": 4.0, "tokens": 10},
    )
    record = read_record(tmp_path, "it")
    loss = record.series["loss"]
    np.testing.assert_array_equal(loss.values, [4, 3, 2])
    np.testing.assert_array_equal(loss.at["steps"], [1, 2, 4])
    np.testing.assert_array_equal(loss.at["tokens"], [10, 20, np.nan])
    np.testing.assert_array_equal(loss.at["time"], [np.nan, 4.5, np.nan])
    assert record.series.keys() == {"loss", "validation/loss"}
    assert (record.name, record.notes, record.samples, record.config) == ("it", [], [], settings())
    assert (
        record.about["parameters"] == 123
        and record.about["active_parameters"] == 45
        and record.about["environment"]["jax"]
    )
    assert record.last("loss") == 2.0 and record.last("nothing") is None


DAMAGE = ["", "\0\0", "[" * 100_000, "3", '{"step": "x", "loss": 1}', '{"step": 2, "lo', '{"step": true, "loss": 1}']


def test_damaged_lines_are_skipped_and_counted(tmp_path):
    write_run(tmp_path, {"step": 1, "loss": 2.0}, *DAMAGE)
    record = read_record(tmp_path, "it")
    assert record.series["loss"].values.tolist() == [2.0]
    assert record.notes == [f"{tmp_path}/metrics.jsonl: {len(DAMAGE)} damaged lines were skipped"]


def test_what_is_no_number_is_left_out_and_counted(tmp_path):
    values = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 400, '"2"', "null", "true", "[1]", "2e100"]
    write_run(tmp_path, *(f'{{"step": {step}, "loss": {value}}}' for step, value in enumerate(["2.0", *values], 1)))
    record = read_record(tmp_path, "it")
    assert record.series["loss"].values.tolist() == [2.0]
    assert record.notes == [f"{tmp_path}/metrics.jsonl: {len(values)} values that are no finite number were left out"]


def test_there_is_an_end_to_the_names_of_metrics(tmp_path):
    write_run(tmp_path, {"step": 1, **{f"m{i}": i for i in range(2100)}})
    record = read_record(tmp_path, "it")
    assert len(record.series) == 2000 and "100 values" in record.notes[0]


def test_without_metrics_there_is_no_record(tmp_path):
    with pytest.raises(ValueError, match=r"/metrics\.jsonl is missing: give the directory of a run \(its output_dir\)"):
        read_record(tmp_path, "it")
    for lines in ((), ("3",), ({"step": 1},)):
        write_lines(tmp_path, *lines)
        with pytest.raises(ValueError, match=r"metrics\.jsonl holds no line with numbers: wait for the run's first"):
            read_record(tmp_path, "it")


@pytest.mark.parametrize(
    ("config", "facts", "notes"),
    [
        (None, None, ["train_config.json is missing", "about.json is missing"]),
        ("{", "[1]", ["train_config.json is not valid JSON", "about.json must hold a JSON object"]),
        ('{"steps": 1, "output_dir": "", "colour": 2}', "{}", ["TrainConfig: there is no setting 'colour'"]),
    ],
)
def test_what_else_is_missing_is_noted(tmp_path, config, facts, notes):
    write_lines(tmp_path, {"step": 1, "loss": 2.0})
    for name, content in (("train_config.json", config), ("about.json", facts)):
        if content is not None:
            (tmp_path / name).write_text(content)
    record = read_record(tmp_path, "it")
    assert record.config is None and record.about == {} and record.series["loss"].values.tolist() == [2.0]
    assert len(record.notes) == len(notes) and all(n in found for n, found in zip(notes, record.notes, strict=True))


def test_samples_are_read(tmp_path):
    write_run(tmp_path, {"step": 1, "loss": 2.0})
    good = {"step": 5, "prompt": "a", "text": "b\u2028c"}
    write_lines(tmp_path, good, '{"step": 5', {**good, "text": 3}, name="samples.jsonl")
    record = read_record(tmp_path, "it")
    assert record.samples == [Continuation(5, "a", "b\u2028c")]
    assert record.notes == [f"{tmp_path}/samples.jsonl: 2 damaged lines were skipped"]


def test_a_setting_is_found_by_its_name():
    assert value_of(override(settings(), ["data.train=a"]), "data.train") == ("a",)


def test_a_file_that_the_system_does_not_give_is_one_line(tmp_path, monkeypatch):
    """As root, whom no permission stops, the system's answer is put in its place."""

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    write_run(tmp_path, {"step": 1, "loss": 2.0})
    monkeypatch.setattr(reading, "read_lines", refuse)
    with pytest.raises(ValueError, match=r"/metrics\.jsonl cannot be read: Permission denied; make it readable$"):
        read_record(tmp_path, "it")
