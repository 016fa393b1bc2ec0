"""The file of loads: what is written is read, whatever else stands in it."""

import dataclasses
import errno
import json

import numpy as np
import pytest
from helpers.training import MODEL, settings

from stellarbyte_jax.training.loads import LOADS, LoadFile, read_loads

MOE = dataclasses.replace(MODEL, moe={"num_experts": 3, "mlp_only_layers": (0,)}, num_hidden_layers=3)


@pytest.fixture
def config(tmp_path):
    return settings(output_dir=str(tmp_path), model=MOE)


def written(config, start_step, *steps):
    file = LoadFile(config, start_step)
    for step in steps:
        file.write(step, np.array([[1, 2, 3], [0.5, step, 0]], np.float32) / 6)
    file.close()


def test_lines_are_short_and_read_back(config, tmp_path):
    written(config, 0, 1, 5)
    first = (tmp_path / LOADS).read_text().splitlines()[0]
    assert first == '{"step":1,"load":{"1":[0.1667,0.3333,0.5],"2":[0.08333,0.1667,0.0]}}'
    notes = []
    loads = read_loads(tmp_path / LOADS, notes)
    assert (loads.steps.tolist(), loads.layers, notes) == ([1, 5], (1, 2), [])
    np.testing.assert_allclose(loads.shares_SLE[:, 0], [[1 / 6, 1 / 3, 0.5]] * 2, atol=1e-4)
    np.testing.assert_allclose(loads.shares_SLE[1, 1], [0.08333, 0.8333, 0], atol=1e-4)


def test_lines_after_the_step_resumed_from_are_dropped(config, tmp_path):
    written(config, 0, 1, 2, 3, 4)
    written(config, 2, 3)
    assert [json.loads(line)["step"] for line in (tmp_path / LOADS).read_text().splitlines()] == [1, 2, 3]


def test_a_network_without_experts_has_no_file(tmp_path):
    file = LoadFile(settings(output_dir=str(tmp_path)), 0)
    file.write(1, None)
    file.close()
    assert list(tmp_path.iterdir()) == [] and read_loads(tmp_path / LOADS, []) is None


def test_a_full_disk_is_one_line(config, monkeypatch, tmp_path):
    file = LoadFile(config, 0)
    file.close()

    def full(text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file, "_file", type("Full", (), {"write": staticmethod(full), "close": lambda self: None})())
    with pytest.raises(OSError, match=rf"^{tmp_path}/{LOADS} could not be written: No space left on device; "):
        file.write(1, np.ones((2, 3), np.float32) / 3)


DAMAGE = [
    *("", "3", "[" * 100_000, '{"step": 2}', '{"step": 2, "load": {}}', '{"step": 2, "load": [1]}'),
    *('{"step": 2, "load": {"1": [0.5, 0.5]}}', '{"step": 2, "load": {"1": [1, 0, 0], "3": [1, 0, 0]}}'),  # others
    *('{"step": 2, "load": {"1": [1, 0, 0], "2": [1, 0]}}', '{"step": 2, "load": {"1": [1, 0, 0], "2": 1}}'),
    *('{"step": 2, "load": {"1": [1, 0, 0], "x": [1, 0, 0]}}', '{"step": 2, "load": {"1": [], "2": []}}'),
    *(
        '{"step": 2, "load": {"1": [1, 0, 0], "2": [1, NaN, 0]}}',
        '{"step": 2, "load": {"1": [1, 0, 0], "2": [2, 0, 0]}}',
    ),
    *(
        '{"step": 2, "load": {"1": [1, 0, 0], "2": [-1, 0, 0]}}',
        '{"step": 2, "load": {"1": [1, 0, 0], "2": [true, 0, 0]}}',
    ),
    '{"step": %s, "load": {"1": [1, 0, 0], "2": [1, 0, 0]}}' % ("9" * 400),
    '{"step": -1, "load": {"1": [1, 0, 0], "2": [1, 0, 0]}}',
    '{"step": 2, "load": {"1": [1, 0, 0], "%s": [1, 0, 0]}}' % ("9" * 5000),
    '{"step": 2, "load": {"1": [1, 0, 0], "2": [1, 0',
]


def test_damaged_lines_are_skipped_and_counted(config, tmp_path):
    written(config, 0, 1)
    with (tmp_path / LOADS).open("a") as file:
        file.write("".join(f"{line}\n" for line in DAMAGE))
    notes = []
    assert read_loads(tmp_path / LOADS, notes).steps.tolist() == [1]
    assert notes == [f"{tmp_path / LOADS}: {len(DAMAGE)} damaged lines were skipped"]


def test_a_file_with_nothing_in_it_has_no_loads(tmp_path):
    for text in ("", '{"step": 1, "load": {"0": []}}\n'):
        (tmp_path / LOADS).write_text(text)
        assert read_loads(tmp_path / LOADS, []) is None
