"""What does the doctor say of a machine that lacks something? Machines are faked: a tool on PATH, files, variables."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from packaging.requirements import Requirement

from stellarbyte_jax.cli import doctor
from stellarbyte_jax.cli.main import main as stellarbyte
from stellarbyte_jax.launch import doctor as launch_doctor
from stellarbyte_jax.launch.doctor import gpus, limits, measure, peers, places, versions
from stellarbyte_jax.launch.doctor.finding import Finding, guarded
from stellarbyte_jax.launch.hardware import hardware_of
from stellarbyte_jax.sharding import make_mesh

ROOT = Path(__file__).parents[2]

# As nvidia-smi 570 prints them (--format=csv,noheader,nounits) on a host of two H100s, the second one hot and in use.
TWO_H100 = {
    "index,name,driver_version": "0, NVIDIA H100 80GB HBM3, 570.124.06\n1, NVIDIA H100 80GB HBM3, 570.124.06\n",
    "memory.total,memory.free,memory.used": "81559, 81004, 4\n81559, 20551, 60457\n",
    "clocks.sm,clocks.max.sm,temperature.gpu": "1980, 1980, 31\n345, 1980, 89\n",
    "persistence_mode,ecc.mode.current,mig.mode.current": "Enabled, Enabled, Disabled\nDisabled, Disabled, Enabled\n",
    "ecc.errors.uncorrected.volatile.total": "0\n[N/A]\n",
    "clocks_event_reasons.active": "0x0000000000000001\n0x0000000000000060\n",
    "pid,process_name,used_memory": "4242, /usr/bin/python3, 60440\n",
}


def install(tmp_path, monkeypatch, answers, status=2):
    """An nvidia-smi on PATH which answers these queries, and refuses the others as the real one does."""
    folder = tmp_path / "bin"
    folder.mkdir()
    tool = folder / "nvidia-smi"
    program = (
        f"#!{sys.executable}\nimport sys\n"
        f"answers = {answers!r}\n"
        "fields = sys.argv[1].partition('=')[2]\n"
        "if fields in answers: print(answers[fields], end='')\n"
        f"else: print(f'Field \"{{fields}}\" is not a valid field to query.'); sys.exit({status})\n"
    )
    tool.write_text(program)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def lines(findings):
    return [(each.level, each.line()) for each in findings]


def only(findings) -> Finding:
    (found,) = findings
    return found


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


TWO = gpus.Gpus(("NVIDIA H100 80GB HBM3",) * 2, "570.124.06")
H100 = "NVIDIA H100 80GB HBM3"


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
    assert [limits.memory_limit(root) for root in (second, first, free)] == [2**32, 2**33, None]
    assert limits.machine_memory(free) == 2**35
    told = only(limits.check_memory_limit(second, devices=2**33))
    assert told.level == "warning" and "less than the 8.0 GiB" in told.what
    assert only(limits.check_memory_limit(free, devices=2**33)).level == "ok"


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


def test_an_error_in_a_check_is_a_line():
    def check():
        yield Finding("ok", "x", "first")
        raise PermissionError(13, "Permission denied", "/x")

    first, second = guarded("x", check)
    assert first.what == "first" and second.level == "fault" and "Permission denied: '/x'" in second.what


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.mark.parametrize(("skew", "level"), [(0.0, "ok"), (5.0, "warning")])
def test_processes_meet_and_compare_clocks(skew, level, monkeypatch):
    port, found = free_port(), []
    real = time.time
    serving = threading.Thread(target=lambda: found.extend(peers.check_peers(peers.Peers("localhost", port, 3, 0, 60))))
    ahead = {serving}
    monkeypatch.setattr(peers.time, "time", lambda: real() + (skew if threading.current_thread() in ahead else 0))
    serving.start()
    told = [list(peers.check_peers(peers.Peers("localhost", port, 3, index, 60)))[-1] for index in (1, 2)]
    serving.join(60)
    assert [each.level for each in told] == [level, level]
    assert all(abs(each.facts["skew_seconds"] - skew) < 1 for each in told)
    assert found[0].check == "dns" and found[-1].what == f"all 2 peers reached localhost:{port}"


def test_peers_that_do_not_come(monkeypatch):
    port = free_port()
    assert "1 of 1 peers did not reach" in list(peers.check_peers(peers.Peers("127.0.0.1", port, 2, 0, 0.2)))[-1].what
    lost = list(peers.check_peers(peers.Peers("127.0.0.1", port, 2, 1, 0.1)))[-1]
    assert lost.level == "fault" and "refused" in lost.what and "start process 0" in lost.mend
    unknown = only(peers.check_peers(peers.Peers("no-such-host.invalid", port)))
    assert unknown.level == "fault" and "has no address" in unknown.what
    with socket.create_server(("", port)):
        assert list(peers.check_peers(peers.Peers("127.0.0.1", port)))[-1].level == "ok"
        taken = list(peers.check_peers(peers.Peers("127.0.0.1", port, 2, 0, 0.2)))[-1]
        assert "cannot be opened" in taken.what and "another port" in taken.mend


@pytest.mark.parametrize("answer", [b"nan\n", b"HTTP/1.1 400 Bad Request\r\n", b""])
def test_another_program_at_the_address_is_told(answer):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            connection, _ = listener.accept()
            with connection:
                connection.recv(64)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        found = list(peers.check_peers(peers.Peers("127.0.0.1", listener.getsockname()[1], 2, 1, 60)))[-1]
        thread.join(60)
    assert found.level == "fault" and "another program" in found.mend


@pytest.mark.parametrize(
    ("address", "processes", "process"), [("x", None, None), ("x:0", None, None), ("x:1", 2, None), ("x:1", 2, 2)]
)
def test_addresses_and_numbers_that_cannot_be(address, processes, process):
    with pytest.raises(ValueError, match="--"):
        peers.Peers.parse(address, processes, process)
    assert peers.Peers.parse("[::1]:7777", None, None) == peers.Peers("::1", 7777)


def test_collectives_are_those_that_they_are_called():
    """Against NumPy: four devices of an axis, and two of another that must not mix."""
    mesh = make_mesh({"fsdp": 4, "tensor": 2}, jax.devices()[:8])
    x = np.arange(64, dtype=np.float32)
    parts = x.reshape(4, 2, 8)  # fsdp, tensor, a device's own numbers
    expected = {
        "all_reduce": np.broadcast_to(parts.sum(0), (4, 2, 8)),
        "all_gather": np.broadcast_to(parts.transpose(1, 0, 2).reshape(1, 2, 32), (4, 2, 32)),
        "reduce_scatter": parts.sum(0).reshape(2, 4, 2).transpose(1, 0, 2),
        "all_to_all": parts.reshape(4, 2, 4, 2).transpose(2, 1, 0, 3).reshape(4, 2, 8),
        "ppermute": np.roll(parts, 1, 0),
    }
    assert set(expected) == set(measure.COLLECTIVES)
    for name, numbers in expected.items():
        made = np.asarray(measure.collective_program(mesh, "fsdp", name)(jax.numpy.asarray(x)))
        np.testing.assert_array_equal(made, numbers.ravel(), err_msg=name)


def test_the_bus_is_counted_as_nccl_tests_count():
    """Their PERFORMANCE.md: all-reduce 2(n-1)/n, gather, scatter and all-to-all (n-1)/n, send and receive 1."""
    shares = {name: each.bus(4) for name, each in measure.COLLECTIVES.items()}
    others = dict.fromkeys(("all_gather", "reduce_scatter", "all_to_all"), 0.75)
    assert shares == {"all_reduce": 1.5, **others, "ppermute": 1.0}


def test_a_slow_link_is_a_warning():
    link = hardware_of(H100)
    assert link is not None and link.link_bytes == 450e9
    told = {
        seconds: measure.judge_collective("all_reduce", "data", 4, {2**16: 1e-5, 2**28: seconds}, link)
        for seconds in (1e-3, 2e-3)
    }
    assert told[1e-3].level == "ok" and "402.7 GB/s of the bus at 256 MiB" in told[1e-3].what
    assert told[2e-3].level == "warning" and "NVLink 4 gives 450 GB/s" in told[2e-3].what
    assert told[2e-3].facts["measured"][1]["bus_bytes_per_second"] == pytest.approx(1.5 * 2**28 / 2e-3)
    assert measure.judge_collective("all_reduce", "data", 4, {2**16: 1.0}, None).level == "ok"


def test_a_slow_gpu_among_others_is_a_warning():
    rates = [700e12, 700e12, 500e12, 710e12]
    levels = [each.level for each in measure.judge_products(range(4), [H100] * 4, rates)]
    assert levels == ["ok", "ok", "warning", "ok"]
    assert only(measure.judge_products([0], [H100], [400e12])).level == "warning"  # below half of its peak
    assert {each.level for each in measure.judge_products(range(2), ["cpu"] * 2, [1e9, 1e8], False)} == {"ok"}


@pytest.mark.parametrize(
    ("kind", "link"),
    [
        ("NVIDIA H200", 450e9),
        ("NVIDIA H100 PCIe", 64e9),
        ("NVIDIA A100-SXM4-80GB", 300e9),
        ("NVIDIA A100 80GB PCIe", 32e9),
        ("NVIDIA B200", 900e9),
    ],
)
def test_links_by_kind(kind, link):
    known = hardware_of(kind)
    assert known is not None and known.link_bytes == link


def test_what_hangs_is_told_and_ends_the_measurements(monkeypatch):
    ends = threading.Event()
    with pytest.raises(measure.HungError, match=r"did not end within 0\.05 s"):
        measure.within(0.05, ends.wait)
    ends.set()
    assert measure.within(60, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        measure.within(60, lambda: 1 // 0)

    def hang(*_):
        raise measure.HungError("did not end within 9 s")

    monkeypatch.setattr(measure, "within", hang)
    told = list(measure.measure_collectives(make_mesh({"data": 8}), lambda text: None))
    assert only(told).level == "fault" and only(told).facts["hung"]


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


def test_devices_of_another_process_are_not_measured(monkeypatch):
    """Products are measured on this process's devices alone."""
    seen = []
    monkeypatch.setattr(measure, "time_product", lambda device, size: seen.append(device.id) or 1e12)
    devices = [SimpleNamespace(id=4, platform="cpu", device_kind="cpu")]
    assert only(measure.measure_products(devices, lambda text: None)).facts["device"] == 4 and seen == [4]
