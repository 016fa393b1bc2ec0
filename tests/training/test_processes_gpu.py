"""Processes with a GPU each: their run is that of one, goes on with fewer of them, and ends when one is killed."""

import os
import shutil

import jax
import pytest
from helpers.runs import write_config
from helpers.several import run
from training.test_processes import COMMON, assert_done, assert_same_run, numbers

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpus():
    """Numbers of two or four GPUs."""
    count = len(jax.devices())
    if count < 2:
        pytest.skip("needs two GPUs, JAX finds one")
    named = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return named[: 4 if count >= 4 else 2]


def test_a_run_of_a_process_for_each_gpu_goes_on_with_half_of_them_and_is_that_of_one(gpus, tmp_path):
    (tmp_path / "alone").mkdir()
    alone, several = write_config(tmp_path / "alone"), write_config(tmp_path)
    assert_done(run(alone, 1, *COMMON, gpus=gpus[:1]))
    assert_done(run(several, len(gpus), *COMMON, f"mesh.fsdp={len(gpus)}", gpus=gpus))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    half = gpus[: len(gpus) // 2]
    ended = run(several, len(half), *COMMON, f"mesh.fsdp={len(half)}", gpus=half)
    assert_done(ended)
    assert "resumed at step 4" in ended[0].out
    assert_same_run(numbers(tmp_path / "run"), numbers(tmp_path / "alone" / "run"))


def test_a_killed_process_ends_the_others_within_a_minute_and_the_run_goes_on_without_it(gpus, tmp_path):
    config, killed = write_config(tmp_path), len(gpus) - 1
    before = f"if rank == {killed}: at_step(3, lambda: (saved(2), os.kill(os.getpid(), signal.SIGKILL)))"
    ended = run(config, len(gpus), *COMMON, f"mesh.fsdp={len(gpus)}", before=before, gpus=gpus)
    assert [each.code for each in ended] == [1] * killed + [-9], ended[0].err
    for each in ended[:killed]:
        assert f"process {killed} of {len(gpus)} is gone" in each.err.splitlines()[-1]
    assert max(each.ended_at for each in ended) - ended[killed].ended_at < 60
    again = run(config, 1, *COMMON, gpus=gpus[:1])
    assert_done(again)
    assert "resumed at step 2" in again[0].out
