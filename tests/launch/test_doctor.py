"""The doctor as it is typed: what it prints, its status, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest
from helpers.doctor import TWO_H100, free_port, install

from stellarbyte_jax.cli import doctor
from stellarbyte_jax.cli.main import main as stellarbyte
from stellarbyte_jax.launch import doctor as launch_doctor
from stellarbyte_jax.launch.doctor import measure
from stellarbyte_jax.launch.doctor.finding import Finding

ROOT = Path(__file__).parents[2]
THREE_FOR_EACH_KEY = (
    "model.num_attention_heads=12",
    "model.num_key_value_heads=4",
    "model.hidden_size=96",
    "model.intermediate_size=96",
)


@pytest.fixture
def small(monkeypatch):
    """Sizes and repeats of a test."""
    monkeypatch.setattr(measure, "_SIZES", {"cpu": (2**10, 2**12)})
    monkeypatch.setattr(measure, "_MATRIX", {"cpu": 16})
    for name in ("XLA_FLAGS", "STELLARBYTE_COORDINATOR", "STELLARBYTE_PROCESSES", "STELLARBYTE_PROCESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")


def test_the_whole_command_on_eight_devices(small, tmp_path, capsys):
    words = ["doctor", "--json", "--set", "mesh.fsdp=4", "mesh.tensor=2", f"output_dir={tmp_path / 'run'}"]
    before = dict(os.environ)
    assert stellarbyte(words) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["ok"] is True and os.environ == before and not (tmp_path / "run").exists()
    measured = [each["facts"] for each in report["findings"] if each["check"] == "collectives"]
    seen = {(each["collective"], each["axis"], each["devices"]) for each in measured}
    assert seen == {(name, axis, n) for name in measure.COLLECTIVES for axis, n in (("fsdp", 4), ("tensor", 2))}
    assert all(size["bus_bytes_per_second"] > 0 for each in measured for size in each["measured"])
    assert sum(each["check"] == "products" for each in report["findings"]) == 8
    checks = {each["check"] for each in report["findings"]}
    wanted = {"python", "jax", "jaxlib", "flax", "nvidia-smi", "xla client", "nccl", "output", "hub cache", "locks"}
    wanted |= {"temporary", "shared memory", "compile cache", "open files", "memory", "cores", "xla flags", "devices"}
    assert wanted <= checks and "... all_to_all over tensor\n" in printed.err
    assert set(report["findings"][0]) == {"level", "check", "what", "mend", "facts"}


def test_devices_are_measured_without_taking_their_memory_and_without_multicast(small, tmp_path, monkeypatch):
    names, seen = ("XLA_PYTHON_CLIENT_PREALLOCATE", "NCCL_NVLS_ENABLE"), []
    monkeypatch.setattr(launch_doctor, "_devices", lambda *_: seen.append([os.environ.get(n) for n in names]) or [])
    for given in (None, "1"):
        monkeypatch.delenv(names[0], raising=False)
        monkeypatch.setenv(names[1], given) if given else monkeypatch.delenv(names[1], raising=False)
        assert doctor.main(["--set", f"output_dir={tmp_path}"]) == 0
        assert [os.environ.get(n) for n in names] == [None, given]
    assert seen == [["false", "0"], ["false", "1"]], "what is set stays"


def test_a_fault_is_a_line_and_the_status(small, capsys):
    assert doctor.main(["--set", "mesh.fsdp=64", "output_dir=/proc/none"]) == 1
    printed = capsys.readouterr().out.splitlines()
    faults = [line.split(maxsplit=2)[1:] for line in printed if line.startswith("fault")]
    assert [name for name, _ in faults] == ["output", "mesh"]
    assert "(mend: choose another output_dir" in faults[0][1]
    assert "64 devices, and there are 8 (mend: lower it, or add devices)" in faults[1][1]
    assert printed[-1].startswith("2 faults, ")


def test_the_gpus_of_a_machine_where_jax_has_none(small, tmp_path, monkeypatch, capsys):
    install(tmp_path, monkeypatch, TWO_H100)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert doctor.main(["--json", "--set", f"output_dir={tmp_path}", "mesh.data=1"]) == 1
    faults = [each for each in json.loads(capsys.readouterr().out)["findings"] if each["level"] == "fault"]
    assert [each["check"] for each in faults] == ["devices"] and "jax[cuda12]" in faults[0]["mend"]


@pytest.mark.parametrize(
    ("words", "what", "mend"),
    [
        (
            ["mesh.fsdp=2", "global_batch_size=7"],
            "global_batch_size=7 does not divide by 8",
            "set a multiple of 8",
        ),
        (
            ["mesh.tensor=8", "model.num_attention_heads=6", "model.hidden_size=96"],
            "cuts model.num_attention_heads=6",
            "set mesh.tensor=2",
        ),
        (
            ["mesh.data=1", "mesh.tensor=6", *THREE_FOR_EACH_KEY],
            "mesh.tensor=6 and model.num_key_value_heads=4, of which one must divide the other",
            "set mesh.tensor=2",
        ),
        (
            ["mesh.expert=2"],
            "cuts experts, and the model has none",
            "set model.moe.num_experts, or mesh.fsdp=2 mesh.expert=1",
        ),
    ],
)
def test_a_mesh_that_training_refuses_is_a_fault(words, what, mend, small, tmp_path, capsys):
    assert doctor.main(["--json", "--set", f"output_dir={tmp_path}", *words]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    (fault,) = [each for each in findings if each["level"] == "fault"]
    assert fault["check"] == "mesh" and what in fault["what"] and fault["mend"] == mend
    assert any(each["check"] == "products" for each in findings), "what there is, is measured"


def test_the_mesh_is_that_of_all_machines(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch_doctor, "check_peers", lambda peers: [])
    words = ["--coordinator", "here:1", "--processes", "2", "--process", "0", "--json", "--set"]
    assert doctor.main([*words, "mesh.fsdp=16", "global_batch_size=16", f"output_dir={tmp_path}"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [each["what"] for each in findings if each["check"] == "mesh"] == ["mesh.fsdp=16 on 16 devices"]
    assert {each["facts"]["devices"] for each in findings if each["check"] == "collectives"} == {8}


def test_jax_that_cannot_start_is_a_fault(small, tmp_path, monkeypatch, capsys):
    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "devices", fail)
    assert doctor.main(["--json", "--set", f"output_dir={tmp_path}"]) == 1
    faults = [each for each in json.loads(capsys.readouterr().out)["findings"] if each["level"] == "fault"]
    assert [each["what"] for each in faults] == ["JAX could not start: Unable to initialize backend 'cuda'"]


def test_devices_that_hang_do_not_keep_the_program(small, tmp_path, monkeypatch, capsys):
    """Python would wait at its end for a thread of JAX that never comes back."""
    left, ends = [], threading.Event()
    jax.devices()  # started, which takes longer than what follows waits
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(measure, "PATIENCE", 0.5)
    monkeypatch.setattr(measure, "time_collective", lambda *_: ends.wait())
    monkeypatch.setattr(measure, "time_product", lambda *_: 1e12)
    assert doctor.main(["--json", "--set", f"output_dir={tmp_path}"]) == 1 and left == [1]
    ends.set()
    report = json.loads(capsys.readouterr().out)
    faults = [each["what"] for each in report["findings"] if each["level"] == "fault"]
    assert faults == ["all_reduce over data did not end within 0.5 s: the devices hang"]
    assert not any(each["check"] == "products" for each in report["findings"])


def test_unknown_flags_keep_devices_from_being_started(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", "--xla_no_such_flag=1")
    monkeypatch.setattr(jax, "devices", lambda: 1 / 0)
    assert doctor.main(["--set", f"output_dir={tmp_path}"]) == 1
    assert "does not know --xla_no_such_flag=1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "status", "part"),
    [
        (["--set", "mesh.fdsp=2"], 2, "mesh.fdsp"),
        (["--processes", "2", "--process", "0"], 1, "need --coordinator"),
        (["--coordinator", "here"], 1, "write HOST:PORT"),
        (["--config", "none.py"], 2, "none.py"),
    ],
)
def test_what_cannot_be_is_one_line(small, words, status, part, capsys):
    assert doctor.main(words) == status
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and part in printed


def test_variables_name_the_processes(small, monkeypatch):
    monkeypatch.setenv("STELLARBYTE_COORDINATOR", "node0:7777")
    monkeypatch.setenv("STELLARBYTE_PROCESSES", "4")
    monkeypatch.setenv("STELLARBYTE_PROCESS", "3")
    options = doctor._parse([])
    assert (options.coordinator, options.processes, options.process) == ("node0:7777", 4, 3)
    monkeypatch.setenv("STELLARBYTE_PROCESS", "first")
    with pytest.raises(SystemExit):
        doctor._parse([])


def test_what_is_typed_of_the_processes_is_looked_for(small, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(launch_doctor, "examine", lambda config, peers, tell: seen.append(peers) or [])
    words = "--json --coordinator node0:7777 --processes 4 --process 3 --wait 7"
    assert doctor.main([*words.split(), "--set", f"output_dir={tmp_path}"]) == 0
    assert seen == [launch_doctor.Peers("node0", 7777, 4, 3, 7)]


def test_the_module_runs_it():
    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "stellarbyte_jax.launch", *words], capture_output=True, text=True, cwd=ROOT
        )

    helped, wrong = run("doctor", "--help"), run("nurse")
    assert helped.returncode == 0 and "--coordinator HOST:PORT" in helped.stdout
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1


def test_ctrl_c_ends_it_while_it_waits():
    words = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process", "0"]
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += f"from stellarbyte_jax.cli.doctor import main; sys.exit(main({words!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("... waiting for 127.0.0.1:")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1].endswith("\ninterrupted\n") and process.returncode == 130


def test_lines_hold_no_control_characters(capsys):
    doctor._print([Finding("ok", "x", "a\x1b[2Jb\nc [red]", "d")])
    assert "a\\x1b[2Jb c [red] (mend: d)" in capsys.readouterr().out
