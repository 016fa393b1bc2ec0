"""Runs that several tests of a module start from."""

import os
from collections.abc import Iterator

import pytest
from helpers.once import alone
from helpers.programs import shared_programs
from helpers.runs import child, write_config


@pytest.fixture(autouse=True, scope="module")
def programs_of_runs() -> Iterator[None]:
    """Runs in the tests' process compile what they have in common once."""
    with shared_programs():
        yield


@pytest.fixture
def config_file(tmp_path):
    return write_config(tmp_path)


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """Twenty steps without interruption: what every interrupted run must arrive at. Not to be changed.

    One for all processes of xdist.
    """
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "straight"
    with alone(directory):
        if not (directory / "done").exists():
            directory.mkdir()
            done = child(write_config(directory))
            assert done.returncode == 0, done.stderr
            (directory / "done").touch()
    return directory / "run"
