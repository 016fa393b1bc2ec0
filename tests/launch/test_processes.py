"""Who belongs to a run: options, environment and launchers; and processes that do not find each other."""

import contextlib
import signal
import socket
import threading
from types import SimpleNamespace

import pytest
from helpers.runs import write_config
from helpers.several import run

from stellarbyte_jax.command import MendableError
from stellarbyte_jax.config import ConfigError
from stellarbyte_jax.launch import group, processes
from stellarbyte_jax.launch.processes import Given, given_by, launcher_of

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
MPI = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:9", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (SLURM, "Slurm"),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),  # srun -n 1 within a larger job
        ({name: value for name, value in SLURM.items() if "STEP" not in name}, None),  # sbatch without srun
        (MPI, "Open MPI"),
        ({**MPI, "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_a_launcher_of_several_processes_is_known_and_one_task_stays_alone(environment, expected):
    assert launcher_of(environment) == expected


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "4"}, [0, 1, 2, 3]),
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "2"}, [0, 1]),
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "2,3"}, [0, 1]),
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "2"}, [0]),
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "4", "JAX_LOCAL_DEVICE_IDS": "1"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_GPUS_ON_NODE": "4"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,2", "SLURM_GPUS_ON_NODE": "4"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "3"}, [0]),
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_GPUS_PER_TASK": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, [0, 1]),
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_GPUS_PER_TASK": "a100:2", "CUDA_VISIBLE_DEVICES": "0,1"}, [0, 1]),
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_GPUS_PER_TASK": "1", "CUDA_VISIBLE_DEVICES": "0,1"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_GPUS_PER_TASK": "2", "SLURM_GPUS_ON_NODE": "2"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, None),
        ({"SLURM_GPUS_ON_NODE": "4"}, None),
    ],
)
def test_a_task_takes_all_gpus_that_are_its_own(environment, gpus, monkeypatch):
    """Of a machine that it has to itself, of --gpus-per-task, or the one that it sees.

    JAX alone would take the one of the task's number: others would be idle, or there would be none of that number.
    """
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in {**SLURM, **environment}.items():
        monkeypatch.setenv(name, value)
    asked = []

    def initialize(**settings):
        asked.append(settings.get("local_device_ids"))
        raise RuntimeError("as far as this")

    monkeypatch.setattr(processes.jax.distributed, "initialize", initialize)
    monkeypatch.setattr(processes.jax.config, "update", lambda *_: None)
    with pytest.raises(MendableError, match="as far as this"):
        processes.join()
    assert asked == [gpus]


def test_under_open_mpi_too_a_process_takes_the_one_gpu_that_it_sees():
    """As where a wrapper of each process chose it; the variables of a batch job of Slurm say nothing of it."""
    batch = {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_GPUS_PER_TASK": "2"}
    assert processes.gpus_of("Open MPI", {**batch, "CUDA_VISIBLE_DEVICES": "3"}) == [0]
    assert processes.gpus_of("Open MPI", {**batch, "CUDA_VISIBLE_DEVICES": "0,1"}) is None
    assert processes.gpus_of("Kubernetes", {"CUDA_VISIBLE_DEVICES": "3"}) is None
    assert processes.gpus_of("Open MPI", {"CUDA_VISIBLE_DEVICES": ""}) is None
    assert processes.gpus_of("Slurm", {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}) is None


def test_kubernetes_needs_its_package(monkeypatch):
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pod 1 of an indexed job.*pip install kubernetes.*--processes 1"):
        launcher_of(POD)
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: object())
    assert launcher_of(POD) == "Kubernetes"


ENVIRONMENT = {
    "STELLARBYTE_COORDINATOR": "a:1",
    "STELLARBYTE_PROCESSES": "2",
    "STELLARBYTE_PROCESS": "1",
}


def test_options_go_before_the_environment():
    assert given_by(None, None, None, {}) is None
    assert given_by("b:9", 3, 0, {}) == Given("b:9", 3, 0)
    assert given_by(None, None, None, ENVIRONMENT) == Given("a:1", 2, 1)
    assert given_by("b:9", 3, 2, ENVIRONMENT) == Given("b:9", 3, 2)
    assert given_by(None, 1, None, {}) == Given(None, 1, 0)  # one, whatever the launcher says


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (("a:1", 2, None), {}, "belong together, and --process is missing"),
        ((None, 2, None), {}, "--coordinator and --process is missing"),
        (("a:1", 2, 2), {}, "--process 2 is none of --processes 2: they are 0 to 1"),
        (("a:1", 1, 1), {}, "--process 1 is none of --processes 1: they are 0 to 0"),
        (("a", 2, 1), {}, "--coordinator a is no HOST:PORT"),
        (("a:65536", 2, 1), {}, r"--coordinator a:65536 is no HOST:PORT, .* \(ports: 1 to 65535\)"),
        (("a:0", 2, 0), {}, "--coordinator a:0 is no HOST:PORT"),
        (("a:1", 2, None), {"STELLARBYTE_PROCESS": "x"}, "STELLARBYTE_PROCESS=x must be an integer"),
    ],
)
def test_what_is_missing_or_wrong_is_named(options, environment, message):
    with pytest.raises(ConfigError, match=message):
        given_by(*options, environment)


def test_one_process_does_nothing(monkeypatch):
    for name, value in {**SLURM, "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    processes.join()
    assert group.current is None
    assert processes.count() == 1 and processes.is_main() and processes.from_main(lambda: [1]) == [1]
    error = OSError("x")
    assert processes.first_error(error) is error and processes.first_error(None) is None
    processes.wait_for_all()
    with processes.together():
        pass


def test_a_process_that_is_named_alone_stays_alone_under_a_launcher(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "_connect", lambda *_: pytest.fail("it looks for others"))
    processes.join(processes=1)
    assert group.current is None


def test_an_address_of_ipv6_is_tried_without_its_brackets(monkeypatch):
    tried = []
    monkeypatch.setattr(
        socket, "create_connection", lambda address, timeout: tried.append(address) or contextlib.nullcontext()
    )
    processes._wait_for(Given("[::1]:8476", 2, 1))
    assert tried == [("::1", 8476)]


class Service:
    """jax's coordination service, as far as a group uses it; process 2 is alive."""

    def __init__(self):
        self.kept, self.beats = {"beat/1": "1", "beat/2": "1"}, 1

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.kept
        self.kept[key] = value

    def key_value_dir_get(self, folder):
        self.beats += 1
        self.kept["beat/2"] = str(self.beats)
        return [(key, value) for key, value in list(self.kept.items()) if key.startswith(folder)]

    def key_value_try_get(self, key):
        if key not in self.kept:
            raise RuntimeError(f"NOT_FOUND: {key}")
        return self.kept[key]


@pytest.fixture
def member(monkeypatch):
    """Makes a process of three; nothing happens when Python ends."""
    monkeypatch.setattr(group.atexit, "register", lambda function: None)
    service = Service()
    return lambda rank: group.Group(service, rank, 3, SimpleNamespace(none=lambda: None))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_an_error_of_one_process_comes_to_all(rank, member):
    """Twice, since each exchange has keys of its own; without an error there is none."""
    members, error = [member(each) for each in range(3)], OSError("params/a differs")
    found = [[], [], []]

    def exchange(one):
        found[one.rank].append(one.first_error(error if one.rank == rank else None))
        found[one.rank].append(one.first_error(None))

    threads = [threading.Thread(target=exchange, args=(one,), daemon=True) for one in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found[rank] == [error, None]
    for each in {0, 1, 2} - {rank}:
        assert str(found[each][0]) == f"process {rank}: params/a differs" and found[each][1] is None


def test_a_process_without_a_sign_of_life_ends_the_others(member, monkeypatch):
    monkeypatch.setattr(group, "_BEAT_SECONDS", 0.01)
    monkeypatch.setattr(group, "_SILENT_SECONDS", 1.0)
    one, told = member(0), []
    monkeypatch.setattr(one, "_end_with", lambda text: told.append(text) or one._watching.set())
    thread = threading.Thread(target=one._watch, daemon=True)
    thread.start()
    thread.join(8)
    one._watching.set()
    assert len(told) == 1 and str(told[0]).startswith("process 1 of 3 is gone (no sign of life for 1 s): it was killed")


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (RuntimeError("[external/gloo/transport/tcp/pair.cc] Connection closed by peer"), True),
        (RuntimeError("UNAVAILABLE: failed to connect"), True),
        (group.PeerError("process 2 of 3 failed: a barrier"), False),  # that is who
        (OSError("No space left on device"), False),
    ],
)
def test_what_libraries_say_of_a_lost_process_waits_until_it_is_known_who_it_is(error, waits, member, monkeypatch):
    one, seconds = member(1), []
    monkeypatch.setattr(one._watching, "wait", seconds.append)
    one.fail(error)
    assert seconds == ([50.0] if waits else [])  # longer than the watch takes
    assert one._client.kept["failed/1"] == str(error) and "gone/1" in one._client.kept


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (group.PeerError("process 2 of 3 left at SIGTERM", 143), 143),
        (SystemExit(3), 3),
        (ConfigError("steps=0"), 2),
        (OSError("No space left on device"), 1),
    ],
)
def test_a_process_that_told_the_others_of_its_error_ends_with_its_status(error, code, member, monkeypatch):
    one, left = member(1), []
    monkeypatch.setattr(group.os, "_exit", left.append)
    one.fail(error)
    one._leave()
    assert left == [code]


def test_signals_that_are_ignored_stay_so_in_a_group(member):
    """nohup: processes are to outlive their terminal."""
    one, before = member(1), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        one.leave_at_signals()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and signal.SIGTERM in one._handlers
    finally:
        one._signals.stop()
        for number, handler in one._handlers.items():
            signal.signal(number, handler)
        signal.signal(signal.SIGHUP, before)


def test_a_coordinator_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr(processes, "_START_SECONDS", 0.5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(MendableError, match=rf"process 1 of 2 .*{address} in 0.5 s .*refused.*start process 0"):
        processes.join(address, 2, 1)


def test_processes_with_other_directories_or_settings_are_refused(tmp_path):
    config = write_config(tmp_path)
    before = f"""
if rank == 1:
    from pathlib import Path
    import stellarbyte_jax.launch as launch
    launch._SEEN_SECONDS = 0.5
    launch.RunLock.see.__globals__["platform"].node = lambda: "elsewhere"
    see = launch.RunLock.see
    def elsewhere(self, owner):
        self._path = Path({str(tmp_path)!r}) / "local" / "run.lock"
        see(self, owner)
    launch.RunLock.see = elsewhere
"""
    main, other = run(config, 2, "steps=2", "schedule.warmup_steps=0", before=before)
    assert (main.code, other.code) == (1, 1)
    assert other.err.startswith("error: process 1 of 2: output_dir ") and "all processes share" in other.err
    assert "error: process 1 of 2 failed: output_dir" in main.err
    assert not (tmp_path / "run").exists()  # a start that failed leaves nothing
    before = 'if rank == 1: sys.argv[sys.argv.index("steps=2")] = "steps=3"'
    main, other = run(config, 2, "steps=2", "schedule.warmup_steps=0", before=before)
    assert other.code == 2 and "settings are not those of process 0: steps" in other.err
    assert main.code != 0


def test_processes_that_never_came_are_told_behind_what_jax_prints(tmp_path):
    config = write_config(tmp_path)
    before = """
from stellarbyte_jax.launch import processes
processes._START_SECONDS = 3
sys.argv[sys.argv.index("--processes") + 1] = "3"
"""
    ended = run(config, 2, "steps=2", "schedule.warmup_steps=0", before=before)
    for rank, each in enumerate(ended):
        last = each.err.splitlines()[-1]
        assert each.code != 0 and last.startswith("error: ") and f"process {rank} of 3" in last, each.err
        assert "did not find the other processes in 3 s" in last or "did not find each other" in last
