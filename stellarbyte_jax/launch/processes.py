"""Several processes that train together: how they find each other, and how one tells the others.

Without :func:`join` there is one process, and all functions here do nothing.
"""

import importlib.util
import os
import platform
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax

from stellarbyte_jax.command import MendableError, name_process, one_line
from stellarbyte_jax.config import ConfigError
from stellarbyte_jax.launch import group as groups

Value = TypeVar("Value")

COORDINATOR, PROCESSES, PROCESS = "STELLARBYTE_COORDINATOR", "STELLARBYTE_PROCESSES", "STELLARBYTE_PROCESS"
_START_SECONDS = 300  # that processes wait for each other


@dataclass(frozen=True)
class Given:
    """What was said of the processes: ``coordinator`` is HOST:PORT of process 0."""

    coordinator: str | None
    processes: int
    process: int


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Makes this process one of several, where it is; before anything touches a device.

    Arguments go before the environment (``STELLARBYTE_COORDINATOR``, ``STELLARBYTE_PROCESSES``,
    ``STELLARBYTE_PROCESS``), and that before Slurm, Open MPI and Kubernetes. One process stays alone.

    Args:
      coordinator: ``HOST:PORT`` of process 0, on which it listens.
      processes: how many there are.
      process: which one this is, from 0.

    Raises:
      ConfigError: a part of what is needed is missing, or is no number.
      MendableError: the others were not reached.
    """
    given = given_by(coordinator, processes, process, os.environ)
    launcher = None if given is not None else launcher_of(os.environ)
    if (given is None and launcher is None) or (given is not None and given.processes == 1):
        return
    if "jax_enable_preemption_service" in jax.config.values:
        jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM away from the program
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if given is not None and given.process > 0:
        _wait_for(given)
    name = f"a process that {launcher} started" if given is None else f"process {given.process} of {given.processes}"
    last_words = groups.LastWords(name, _START_SECONDS)
    try:
        _connect(name, given, gpus_of(launcher, os.environ))
    except BaseException:
        last_words.none()
        raise
    groups.current = groups.Group.of_jax(last_words)
    if groups.current is not None:
        if groups.current.rank > 0:
            name_process(groups.current.name)
        groups.current.watch()
        groups.current.leave_at_signals()


def given_by(
    coordinator: str | None, processes: int | None, process: int | None, environment: Mapping[str, str]
) -> Given | None:
    """What options and, where these are left out, the environment say; None where neither says anything.

    Raises:
      ConfigError: a part is missing, or is no number.
    """
    coordinator = coordinator or environment.get(COORDINATOR)
    processes = _number(PROCESSES, environment) if processes is None else processes
    process = _number(PROCESS, environment) if process is None else process
    if processes == 1 and process in (None, 0):
        return Given(coordinator, 1, 0)
    parts = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in parts.items() if value is None]
    if len(missing) == len(parts):
        return None
    if missing:
        raise ConfigError(
            f"{', '.join(parts)} belong together, and {' and '.join(missing)} is missing: name it, or set "
            f"{COORDINATOR}, {PROCESSES} and {PROCESS}"
        )
    assert coordinator is not None and processes is not None and process is not None
    if not 0 <= process < processes:
        raise ConfigError(f"--process {process} is none of --processes {processes}: they are 0 to {processes - 1}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--coordinator {coordinator} is no HOST:PORT, such as 10.0.0.1:8476 (ports: 1 to 65535)")
    return Given(coordinator, processes, process)


def _number(name: str, environment: Mapping[str, str]) -> int | None:
    text = environment.get(name)
    if text is not None and not text.isdecimal():
        raise ConfigError(f"{name}={text} must be an integer")
    return None if text is None else int(text)


def launcher_of(environment: Mapping[str, str]) -> str | None:
    """The launcher that started several processes, of which this is one; None where it started one, or there is none.

    Raises:
      ConfigError: Kubernetes gave this process a number, and what asks it for the others is not installed.
    """
    alone = "or name them: --coordinator, --processes, --process (--processes 1: this one is alone)"
    if "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment:
        tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
        if tasks.isdecimal() and int(tasks) > 1:
            return "Slurm"
    if "OMPI_MCA_orte_hnp_uri" in environment and int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        if importlib.util.find_spec("kubernetes") is None:
            raise ConfigError(
                f"this is pod {environment['JOB_COMPLETION_INDEX']} of an indexed job of Kubernetes, and the package "
                f"that asks it for the others is not installed: pip install kubernetes, {alone}"
            )
        return "Kubernetes"
    return None


def _wait_for(given: Given) -> None:
    """Waits until process 0 listens: jax's own message of one that does not is a page long."""
    host, _, port = str(given.coordinator).rpartition(":")
    end, reason = time.monotonic() + _START_SECONDS, "no answer"
    while time.monotonic() < end:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
                return
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.2)
    raise MendableError(
        f"process {given.process} of {given.processes} on {platform.node()} did not reach the coordinator "
        f"{given.coordinator} in {_START_SECONDS} s ({reason}): start process 0 on that host, with the same "
        "--coordinator, and let its port through the firewall"
    )


def gpus_of(launcher: str | None, environment: Mapping[str, str]) -> list[int] | None:
    """All GPUs that this process sees, where they are its own; None elsewhere: jax takes that of its number.

    They are where it sees one, and under Slurm where a task has a machine to itself or sees as many as
    ``--gpus-per-task`` gave it.
    """
    if launcher not in ("Slurm", "Open MPI") or "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "NoDevFiles"):  # as Slurm says that a step has none
        return None
    seen = environment.get("SLURM_GPUS_ON_NODE", "") if visible is None else str(len(visible.split(",")))
    own = visible is not None and seen == "1"
    if launcher == "Slurm":
        alone = re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
        given = environment.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2]  # after their type
        own = own or alone is not None or (visible is not None and seen == given)
    return list(range(int(seen))) if own and seen.isdecimal() else None


def _connect(name: str, given: Given | None, gpus: list[int] | None = None) -> None:
    settings: dict[str, Any] = {} if gpus is None else {"local_device_ids": gpus}
    if given is not None:
        settings = {
            "coordinator_address": given.coordinator,
            "num_processes": given.processes,
            "process_id": given.process,
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(initialization_timeout=_START_SECONDS, **settings)
    except Exception as error:  # of jax, of gRPC and of each launcher's own kind
        raise MendableError(
            f"the processes of this run did not find each other ({name}; {platform.node()}): "
            f"{one_line(str(error))[:300]}; start all of them within {_START_SECONDS} s, with one --coordinator "
            "whose port is free and open, and with the same --processes"
        ) from error


def count() -> int:
    """How many processes there are."""
    return 1 if groups.current is None else groups.current.count


def is_main() -> bool:
    """Whether this one writes and prints what is written and printed once."""
    return groups.current is None or groups.current.rank == 0


def name() -> str:
    """How messages call this process."""
    return "the process" if groups.current is None else groups.current.name


def leave(number: int, which: str = "") -> None:
    """Ends this process at once at a signal, with the status 128 + ``number``; the others learn of it, and end too.

    Args:
      number: of the signal.
      which: one of several it was: ``"a second "``.
    """
    if groups.current is not None:
        groups.current.leave(number, which)
    os._exit(128 + number)


def from_main(make: Callable[[], Value]) -> Value:
    """What ``make`` returns in the main process, in all of them; JSON values. All have to call it in the same order."""
    return make() if groups.current is None else groups.current.from_main(make)


def wait_for_all() -> None:
    """Returns when all processes have come here."""
    if groups.current is not None:
        groups.current.wait_for_all()


def first_error(error: Exception | None) -> Exception | None:
    """What went wrong in any process, in all of them; None where nothing did. All have to call it."""
    return error if groups.current is None else groups.current.first_error(error)


failing_together, together = groups.failing_together, groups.together
