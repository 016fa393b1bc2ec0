"""Runs that several tests of a module start from."""

import pytest
from helpers.runs import child, write_config


@pytest.fixture
def config_file(tmp_path):
    return write_config(tmp_path)


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """Twenty steps without interruption: what every interrupted run must arrive at. Not to be changed."""
    directory = tmp_path_factory.mktemp("straight")
    done = child(write_config(directory))
    assert done.returncode == 0, done.stderr
    return directory / "run"
