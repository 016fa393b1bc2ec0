"""Machines that the doctor looks at, faked, and what it says of them."""

import socket
import sys

from stellarbyte_jax.launch.doctor import gpus
from stellarbyte_jax.launch.doctor.finding import Finding

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

TWO = gpus.Gpus(("NVIDIA H100 80GB HBM3",) * 2, "570.124.06")
H100 = "NVIDIA H100 80GB HBM3"


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
    return [(each.level, each.line()) for each in map(mendable, findings)]


def only(findings) -> Finding:
    (found,) = findings
    return mendable(found)


def mendable(found: Finding) -> Finding:
    assert found.level == "ok" or found.mend, found
    return found


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
