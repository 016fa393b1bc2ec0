"""JAX that cannot be imported, or starts no device: one line with what to do, whatever was typed."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from stellarbyte_jax.backend import failed_start, import_problem, start_problem
from stellarbyte_jax.command import command
from stellarbyte_jax.interrupts import imports

ROOT = Path(__file__).parents[1]
NO_GPU = {"JAX_PLATFORMS": "cuda", "PATH": "/nowhere"}
NO_NUMBER = {"JAX_NUM_CPU_DEVICES": "x", "JAX_PLATFORMS": "cpu"}


def ended(words, variables):
    return subprocess.run(
        [sys.executable, *words], env=os.environ | variables, capture_output=True, text=True, cwd=ROOT, timeout=300
    )


@pytest.mark.parametrize(
    ("variables", "check", "what", "measured"),
    [
        (NO_GPU, "devices", "JAX could not start: no device for JAX_PLATFORMS=cuda", True),
        (NO_NUMBER, "jax", 'jax cannot be imported: Invalid value "x" for JAX flag jax_num_cpu_devices', False),
    ],
)
def test_the_doctor_goes_on_with_what_it_can_check(variables, check, what, measured, tmp_path):
    done = ended(["-m", "stellarbyte_jax.launch", "doctor", "--set", f"output_dir={tmp_path}"], variables)
    lines = done.stdout.splitlines()
    (fault,) = [line for line in lines if line.startswith("fault")]
    name = next(name for name in variables if name != "PATH")
    assert fault.split()[1] == check and f"{what} (mend: unset {name}, or " in fault
    assert done.returncode == 1 and "Traceback" not in done.stderr
    seen = {line.split(maxsplit=1)[1].split("  ")[0].strip() for line in lines[:-1]}
    assert {"python", "packages", "nvidia-smi", "output", "locks", "open files", "memory", "cores"} <= seen
    assert ("compile cache" in seen) == measured


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("train.py", ["--config", "quickstart"]),
        ("generate.py", ["--model", "none", "--prompt", "a"]),
        ("model_info.py", ["--config", "quickstart"]),
    ],
)
def test_a_wrong_value_of_a_variable_is_one_line(script, words):
    done = ended([f"scripts/{script}", *words], NO_NUMBER)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        'error: jax cannot be imported: Invalid value "x" for JAX flag jax_num_cpu_devices: '
        "unset JAX_NUM_CPU_DEVICES, or give it a value that jax knows\n"
    )


@pytest.mark.parametrize("variables", [NO_GPU, {"JAX_PLATFORMS": "no_such", "PATH": "/nowhere"}])
def test_a_run_without_a_device_is_one_line(variables, tmp_path):
    done = ended(["scripts/train.py", "--config", "quickstart", "--set", f"output_dir={tmp_path / 'run'}"], variables)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: JAX could not start: ")
    assert done.stderr.endswith("unset JAX_PLATFORMS, or ask for devices that are here\n")
    assert not (tmp_path / "run").exists()


def test_any_command_says_it(monkeypatch, capsys):
    """Where the first array is made; the error is jax's own, and its frames are left out."""

    def fail():
        assert False  # noqa: B011

    exec(compile("def first_array(): assert devices() is not None", "jax", "exec"), told := {"__name__": "jax._src.x"})
    told["devices"] = lambda: None
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", fail)
    assert command(told["first_array"])() == 1
    assert capsys.readouterr().err.startswith("error: JAX could not start: assert False: unset JAX_PLATFORMS")
    with pytest.raises(AssertionError):  # of ours: a fault of the program
        command(fail)()
    monkeypatch.setattr(jax, "devices", list)
    with pytest.raises(AssertionError):  # jax's, which has devices
        command(told["first_array"])()


def test_other_errors_are_left_alone(monkeypatch):
    for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ModuleNotFoundError), imports():
        import no_such_module  # noqa: F401
    assert import_problem(ValueError("jax")) is None and failed_start(RuntimeError("x")) is None
    assert start_problem(RuntimeError("x")) == ("JAX could not start: x", "see stellarbyte doctor")
