"""What does the doctor say of a machine that lacks something? Machines are faked: a tool on PATH, files, variables."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.doctor import H100, TWO, TWO_H100, install, lines, only
from packaging.requirements import Requirement

from stellarbyte_jax.launch import doctor
from stellarbyte_jax.launch.doctor import gpus, limits, places, versions
from stellarbyte_jax.launch.doctor.finding import Finding, guarded

ROOT = Path(__file__).parents[2]


def test_two_gpus_as_their_tool_lists_them(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, TWO_H100)
    found = gpus.find_gpus()
    assert found.names == ("NVIDIA H100 80GB HBM3",) * 2 and found.driver == "570.124.06" and found.tool
    assert list(gpus.check_tool(found)) == []
    first, second, others = gpus.check_memory(found, own=1)
    assert (first.level, first.what) == ("ok", "GPU 0: 79.1 of 79.6 GiB free")
    assert (second.level, second.facts["free_mib"]) == ("warning", 20551)
    assert others.what == "other processes: 4242 python3 (60440 MiB)" and others.level == "warning"
    assert [each.level for each in gpus.check_memory(found, own=4242)] == ["ok", "warning"]
    state = lines(gpus.check_state(found))
    assert state[0] == ("ok", "GPU 0: 1980 of 1980 MHz, 31 °C")
    assert [level for level, _ in state[1:]] == ["warning"] * 4
    for (_, line), part in zip(
        state[1:], ("too hot (software limit), too hot (hardware", "persistence", "MIG", "ECC is off"), strict=True
    ):
        assert line.startswith("GPU 1") and part in line


def test_of_many_processes_five_are_named_and_the_others_counted():
    found = gpus.Gpus(processes=tuple((str(n), f"/usr/bin/p{n}", "10") for n in range(8)))
    told = only(gpus.check_memory(found, own=0))
    assert told.what == "other processes: " + ", ".join(f"{n} p{n} (10 MiB)" for n in range(1, 6)) + " and 2 more"


def test_without_the_tool_jax_tells_of_memory():
    stats = {"bytes_limit": 3 * 2**30, "bytes_in_use": 2**30}
    devices = [SimpleNamespace(id=1, memory_stats=lambda: stats), SimpleNamespace(id=2, memory_stats=lambda: None)]
    told = only(gpus.check_jax_memory(devices))
    assert told.what == "device 1: 2.0 of 3.0 GiB that JAX may take are free" and told.facts["free_mib"] == 2048


def test_memory_errors_are_a_fault_and_older_tools_have_another_name_for_throttling(tmp_path, monkeypatch):
    old = {name: text for name, text in TWO_H100.items() if "event" not in name}
    old["clocks_throttle_reasons.active"] = "0x0000000000000088\n0x0\n"
    old["ecc.errors.uncorrected.volatile.total"] = "3\n0\n"
    install(tmp_path, monkeypatch, old)
    state = list(gpus.check_state(gpus.find_gpus()))
    assert state[0].level == "warning" and "hardware, power brake" in state[0].what
    assert (state[1].level, "3 memory errors" in state[1].what, "nvidia-smi -r" in state[1].mend) == (
        "fault",
        True,
        True,
    )


def test_a_tool_that_fails_is_told_in_its_own_words(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, {}, status=9)
    found = only(gpus.check_tool(gpus.find_gpus(tmp_path)))
    assert found.level == "fault" and "is not a valid field" in found.what and "restart" in found.mend


def test_a_tool_that_hangs_is_told(tmp_path, monkeypatch):
    """As nvidia-smi does where a GPU has fallen off the bus."""
    install(tmp_path, monkeypatch, {})
    (tmp_path / "bin" / "nvidia-smi").write_text(f"#!{sys.executable}\nimport time\ntime.sleep(2)\n")
    monkeypatch.setattr(gpus, "_SECONDS", 0.2)
    found = only(gpus.check_tool(gpus.find_gpus(tmp_path)))
    assert (found.level, found.what) == ("fault", "nvidia-smi failed: nvidia-smi did not answer within 0.2 s")


def test_a_tool_that_lists_nothing(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, {"index,name,driver_version": ""})
    found = gpus.find_gpus()
    assert only(gpus.check_tool(found)).level == "warning" and found.driver is None


def test_without_the_tool_proc_tells(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.find_gpus(tmp_path) == gpus.Gpus()
    for number in (0, 1):
        folder = tmp_path / "gpus" / f"0000:0{number}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text("Model: \t\t NVIDIA A100-SXM4-80GB\nIRQ:   \t\t 186\n")
    kernel = (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12\n"
    )
    (tmp_path / "version").write_text(kernel)
    found = gpus.find_gpus(tmp_path)
    assert (found.names, found.driver) == (("NVIDIA A100-SXM4-80GB",) * 2, "535.104.05")
    assert "/proc lists 2 GPUs" in only(gpus.check_tool(found)).what
    (tmp_path / "version").write_text(kernel.replace("NVIDIA UNIX x86_64", "NVIDIA UNIX Open") + "x")
    assert gpus.find_gpus(tmp_path).driver == "535.104.05"


@pytest.mark.parametrize(
    ("found", "platform", "kinds", "environment", "level", "mend"),
    [
        (TWO, "cpu", ["cpu"], {}, "fault", "pip install -U 'jax[cuda12]>="),
        (gpus.Gpus(TWO.names, "580.82.07"), "cpu", ["cpu"], {}, "fault", "pip install -U 'jax[cuda13]>="),
        (TWO, "cpu", ["cpu"], {"JAX_PLATFORMS": "cpu"}, "warning", "unset JAX_PLATFORMS"),
        (TWO, "gpu", [H100] * 2, {}, "ok", ""),
        (TWO, "gpu", [H100], {"CUDA_VISIBLE_DEVICES": "1"}, "ok", ""),
        (TWO, "gpu", [H100], {}, "fault", "nvidia-smi -L"),
        (gpus.Gpus(), "cpu", ["cpu"] * 8, {}, "ok", ""),
    ],
)
def test_devices_against_gpus(found, platform, kinds, environment, level, mend):
    told = only(gpus.check_devices(found, platform, kinds, len(kinds), environment))
    assert told.level == level and told.mend.startswith(mend) and bool(told.mend) == bool(mend)


def test_devices_of_other_machines_do_not_stand_for_a_lost_gpu():
    told = only(gpus.check_devices(TWO, "gpu", [H100] * 4, 1, {}))
    assert told.level == "fault" and told.mend.startswith("nvidia-smi -L")


@pytest.mark.parametrize(
    ("driver", "cuda", "level"),
    [
        ("580.82.07", 13, "ok"),
        ("570.124.06", 13, "fault"),
        ("525.60.13", 12, "ok"),
        ("470.57.02", 12, "fault"),
        (None, 12, "fault"),
        ("570.124.06", None, "ok"),
    ],
)
def test_the_driver_against_the_cuda_of_jax(driver, cuda, level):
    told = only(versions.check_driver(driver, cuda))
    assert told.level == level and bool(told.mend) == (level == "fault")
    assert list(versions.check_driver(None, None)) == []


def test_versions_against_the_bounds_of_the_project(monkeypatch):
    python, required = versions.bounds()
    assert python == ">=3.11,<3.14" and {"jax", "flax", "packaging"} <= {each.name for each in required}
    assert {each.level for each in [*versions.check_python(python), *versions.check_packages(required)]} == {"ok"}
    assert only(versions.check_python(">=3.99")).mend == "make an environment of a Python >=3.99"
    asked = [Requirement("jax>=99"), Requirement("no-such-package>=1"), Requirement("numpy>=2")]
    told = [each for each in versions.check_packages(asked) if each.level == "fault"]
    assert [each.mend for each in told] == ["pip install -U 'jax>=99'", "pip install -U 'no-such-package>=1'"]
    present = {"jaxlib": "0.11.0", "jax-cuda12-plugin": "0.10.2"}
    monkeypatch.setattr(versions, "installed", present.get)
    needs = ["jaxlib<=0.11.0,>=0.11.0", 'jax-cuda12-plugin[with-cuda]<=0.11.0,>=0.11.0; extra == "cuda12"', "numpy>=2"]
    jaxlib, plugin = versions.check_companions(needs)
    assert (jaxlib.level, plugin.level) == ("ok", "fault") and "jax-cuda12-plugin" in plugin.mend


def test_bounds_of_what_was_installed_are_without_extras(tmp_path, monkeypatch):
    """There is no pyproject.toml beside an installed package."""
    metadata = versions.importlib.metadata
    asked = ["jax<0.13,>=0.10", 'torch==2.13.0; extra == "torch"', 'tomli; python_version < "3"']
    monkeypatch.setattr(metadata, "metadata", lambda name: {"Requires-Python": ">=3.11"})
    monkeypatch.setattr(metadata, "requires", lambda name: asked)
    assert versions.bounds(tmp_path) == (">=3.11", [Requirement("jax<0.13,>=0.10")])


def test_numbers_of_versions_become_versions():
    assert [versions._dotted(12090), versions._dotted(91002, 10000), versions._dotted(22703, 10000)] == [
        "12.9",
        "9.10.2",
        "2.27.3",
    ]
    assert versions.loaded_nccl() is None and "loaded: none" in only(versions.check_cuda()).what


def test_a_directory_that_is_writable_is_not_made(tmp_path):
    told = only(places.check_directory("output", tmp_path / "a" / "b", "output_dir", 0))
    assert told.level == "ok" and f"(to be made in {tmp_path})" in told.what and not any(tmp_path.iterdir())
    assert told.facts["free_bytes"] > 0
    little = only(places.check_directory("output", tmp_path, "output_dir", 1e12))
    assert little.level == "warning" and little.mend == "free space, or choose another output_dir"


def test_directories_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "run", Path("/proc/none")):
        told = only(places.check_directory("output", path, "output_dir", 0))
        assert told.level == "fault" and str(path) in told.what and "choose another output_dir" in told.mend
        assert "during the run" not in told.mend, "there is none yet"
    assert list(places.check_locks(tmp_path / "file" / "run")) == []


def test_locks_that_do_not_hold(tmp_path, monkeypatch):
    assert only(places.check_locks(tmp_path / "new")).level == "ok" and not any(tmp_path.iterdir())
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    both = only(places.check_locks(tmp_path))
    assert both.level == "fault" and "two processes could lock" in both.what

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    told = only(places.check_locks(tmp_path))
    assert told.level == "fault" and "No locks available" in told.what and "Lustre: -o flock" in told.mend


def test_the_size_of_the_compile_cache(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    for name in ("x", "a/y"):
        (tmp_path / name).write_bytes(b"0" * 1000)
    assert places.size_of(tmp_path) == (2000, 2)
    _, told = places.check_compile_cache(tmp_path)
    assert told.level == "ok" and told.facts == {"bytes": 2000}
    with monkeypatch.context() as patch:  # as where another run cleans up meanwhile
        patch.setattr(os, "walk", lambda path: [(str(path), [], ["x", "gone"])])
        assert places.size_of(tmp_path) == (1000, 1)
    monkeypatch.setattr(places, "size_of", lambda path: (21 * 2**30, 5))
    assert [each.level for each in places.check_compile_cache(tmp_path)][1] == "warning"


def test_limits_on_open_files():
    assert only(limits.check_open_files((1024, 65536))).mend == "ulimit -n 65536"
    assert only(limits.check_open_files((1024, 1024))).mend.startswith("raise the hard limit")
    assert {only(limits.check_open_files(few)).level for few in ((4096, 4096), (-1, -1))} == {"ok"}


def machine(tmp_path, group, files):
    for name, text in {"proc/meminfo": "MemTotal:       33554432 kB\n", "proc/self/cgroup": group, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_memory_of_the_cgroup(tmp_path):
    """The least limit of the groups that the process is in counts, in either version of cgroups."""
    second = machine(
        tmp_path / "2",
        "0::/job/step\n",
        {
            "sys/fs/cgroup/job/memory.max": f"{2**32}\n",
            "sys/fs/cgroup/job/step/memory.max": f"{2**34}\n",
            "sys/fs/cgroup/memory.max": "max\n",
        },
    )
    first = machine(
        tmp_path / "1",
        "5:cpu:/x\n4:memory:/job\n",
        {"sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{2**33}", "sys/fs/cgroup/memory.max": "1"},
    )
    free = machine(tmp_path / "0", "0::/\n", {})
    # No limit, as the first version writes it: the largest number of whole pages.
    endless = machine(
        tmp_path / "3", "4:memory:/job\n", {"sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{2**63 - 4096}\n"}
    )
    assert [limits.memory_limit(root) for root in (second, first, free, endless)] == [2**32, 2**33, None, None]
    assert limits.machine_memory(free) == 2**35
    told = only(limits.check_memory_limit(second, devices=2**33))
    assert told.level == "warning" and "less than the 8.0 GiB" in told.what
    assert only(limits.check_memory_limit(free, devices=2**33)).level == "ok"
    rows = ({"memory.total": "81559"}, {"memory.total": "[N/A]"}, {"memory.total": "81559"}, {})
    assert doctor._device_memory(gpus.Gpus(rows=rows)) == 2 * 81559 * 2**20, "the tool tells MiB"


def test_cores_against_workers(tmp_path):
    root = machine(tmp_path, "", {"sys/fs/cgroup/cpu.max": "250000 100000\n"})
    told = only(limits.check_cores(4, root, cores=16))
    assert told.facts == {"cores": 2.5, "workers": 4} and told.mend.startswith("--set data.workers=1,")
    assert only(limits.check_cores(4, tmp_path / "none", cores=16)).level == "ok"
    assert only(limits.check_cores(16, tmp_path / "none", cores=16)).level == "warning"


def test_variables_of_nccl():
    told = list(limits.check_nccl({"NCCL_P2P_DISABLE": "1", "NCCL_DEBUG": "WARN", "X": "1"}, 2))
    assert told[0].level == "warning" and told[0].mend == "unset NCCL_P2P_DISABLE"
    assert "NCCL_NVLS_ENABLE=0" in told[1].what and told[2].what == "NCCL_DEBUG=WARN"
    forced = list(limits.check_nccl({"NCCL_NVLS_ENABLE": "1", "NCCL_IB_DISABLE": "1"}, 2))
    assert [each.level for each in forced] == ["warning", "warning"]
    off = only(limits.check_nccl({"NCCL_NVLS_ENABLE": "0", "NCCL_IB_DISABLE": "0"}, 2))
    assert off.level == "ok"
    assert only(limits.check_nccl({}, 1)).what == "no variable of NCCL is set", "one GPU exchanges nothing"


def test_variables_of_the_client():
    assert "75 %" in only(limits.check_client({})).what
    for name, value in (("XLA_PYTHON_CLIENT_PREALLOCATE", "false"), ("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")):
        told = only(limits.check_client({name: value}))
        assert told.level == "warning" and f"unset {name}" in told.mend
    assert only(limits.check_client({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".9"})).level == "ok"


def test_flags_that_xla_does_not_know():
    """XLA ends a process at an unknown flag, so that another one must try."""
    environment = dict(os.environ)
    told = only(limits.check_xla_flags(environment | {"XLA_FLAGS": "--xla_no_such_flag=1"}))
    assert told.level == "fault" and told.what == "this jaxlib does not know --xla_no_such_flag=1"
    assert only(limits.check_xla_flags(environment | {"XLA_FLAGS": "--xla_dump_hlo_as_text=false"})).level == "ok"
    assert only(limits.check_xla_flags({})).what == "XLA_FLAGS is not set"


def test_flags_under_which_jax_cannot_start(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: no such value\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **settings: failed)
    told = only(limits.check_xla_flags({"XLA_FLAGS": "--a=b"}))
    assert told.level == "fault" and told.what.endswith("under XLA_FLAGS=--a=b: RuntimeError: no such value")


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (PermissionError(13, "Permission denied", "/x"), "Permission denied: '/x'"),
        (RuntimeError("INTERNAL: no device"), "INTERNAL: no device"),  # as jax's own are
        (ValueError("no number"), "no number"),
    ],
)
def test_an_error_in_a_check_is_a_line(error, part):
    def check():
        yield Finding("ok", "x", "first")
        raise error

    first, second = guarded("x", check)
    assert first.what == "first" and second.level == "fault" and part in second.what
