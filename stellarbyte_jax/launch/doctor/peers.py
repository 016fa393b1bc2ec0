"""Whether processes on other machines are reached, and whether their clocks agree.

Process 0 listens at the coordinator's address and answers each line ``INDEX`` with its time; the others ask it. That is
the connection which a run makes, before it is made.
"""

import math
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

from stellarbyte_jax.config.foreign import clipped
from stellarbyte_jax.launch.doctor.finding import Finding

_LONGEST = 64  # bytes of a line
_SKEW = 1.0  # seconds, above which logs of machines cannot be laid beside each other
_PATIENCE = 2.0  # seconds for one connection


@dataclass(frozen=True)
class Peers:
    """The processes of a run.

    Attributes:
      host: of process 0.
      port: of process 0.
      processes: how many there are, 1 where only the address is to be tried.
      process: index of this one.
      seconds: to wait for the others.
    """

    host: str
    port: int
    processes: int = 1
    process: int = 0
    seconds: float = 60.0

    @classmethod
    def parse(cls, address: str, processes: int | None, process: int | None, seconds: float = 60.0) -> "Peers":
        """Reads ``HOST:PORT``.

        Raises:
          ValueError: it is of another form, or the numbers of processes do not fit.
        """
        host, colon, port = address.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(f"--coordinator {clipped(address)}: write HOST:PORT, such as node0:7777")
        if (processes is None) != (process is None):
            raise ValueError("--processes and --process go together: give both, or neither")
        if processes is not None and process is not None and not 0 <= process < processes:
            raise ValueError(f"--process {process} is none of --processes {processes}: they count from 0")
        return cls(host.strip("[]"), int(port), processes or 1, process or 0, seconds)


def check_peers(peers: Peers) -> Iterator[Finding]:
    """Name, connection and clock of the coordinator; of process 0, those of all others."""
    where = f"{peers.host}:{peers.port}"
    try:
        found = socket.getaddrinfo(peers.host, peers.port, type=socket.SOCK_STREAM)
    except OSError as error:
        mend = "give a name that this machine's DNS or /etc/hosts knows, or an address"
        yield Finding("fault", "dns", f"{peers.host} has no address: {error.strerror or error}", mend)
        return
    addresses = ", ".join(dict.fromkeys(str(each[4][0]) for each in found))
    yield Finding("ok", "dns", f"{peers.host} is {addresses}")
    if peers.processes > 1 and peers.process == 0:
        yield from _serve(peers, where)
    else:
        yield from _ask(peers, where)


def _serve(peers: Peers, where: str) -> Iterator[Finding]:
    """Answers until all others have asked, or the time is over."""
    missing = set(range(1, peers.processes))
    try:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        listener = socket.create_server(("", peers.port), family=family, dualstack_ipv6=family == socket.AF_INET6)
    except OSError as error:
        mend = "choose another port, or end what listens there (ss -ltnp)"
        yield Finding("fault", "peers", f"port {peers.port} cannot be opened: {error.strerror or error}", mend)
        return
    ends = time.monotonic() + peers.seconds
    with listener:
        while missing and (left := ends - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                break
            with connection:
                missing.discard(_answer(connection))
    if missing:
        listed = ", ".join(map(str, sorted(missing)[:10])) + (" ..." if len(missing) > 10 else "")
        mend = f"start the doctor on their machines too; open port {peers.port} between them"
        what = f"{len(missing)} of {peers.processes - 1} peers did not reach {where} in {peers.seconds:g} s: {listed}"
        yield Finding("fault", "peers", what, mend)
    else:
        yield Finding("ok", "peers", f"all {peers.processes - 1} peers reached {where}")


def _answer(connection: socket.socket) -> int | None:
    """The index of a peer, which is told the time; None for what is no peer, or hangs."""
    try:
        connection.settimeout(_PATIENCE)
        line = connection.recv(_LONGEST).strip()
        connection.sendall(f"{time.time():.6f}\n".encode())
    except OSError:
        return None
    return int(line) if line.isdigit() else None


def _ask(peers: Peers, where: str) -> Iterator[Finding]:
    """Connects until somebody listens, or the time is over; one try where no other process is expected."""
    ends = time.monotonic() + (peers.seconds if peers.processes > 1 else 0)
    while True:
        try:
            connection = socket.create_connection((peers.host, peers.port), timeout=_PATIENCE)
            break
        except OSError as error:
            if time.monotonic() >= ends:
                mend = f"start process 0 there; open port {peers.port} in the firewall; compare the address"
                yield Finding("fault", "peers", f"{where} was not reached: {error.strerror or error}", mend)
                return
            time.sleep(0.2)
    with connection:
        if peers.processes == 1:
            what = f"{where} was reached; clocks are compared where --processes and --process are given"
            yield Finding("ok", "peers", what)
            return
        yield from _compare(connection, peers, where)


def _compare(connection: socket.socket, peers: Peers, where: str) -> Iterator[Finding]:
    """The clock of process 0 against this one, taken at the middle of the question's way there and back."""
    connection.settimeout(peers.seconds)
    try:
        before = time.time()
        connection.sendall(f"{peers.process}\n".encode())
        told = connection.recv(_LONGEST)
        after = time.time()
        skew = float(told) - (before + after) / 2
        if not math.isfinite(skew):
            raise ValueError
    except (OSError, ValueError):
        mend = "choose another port: another program listens there"
        yield Finding("fault", "peers", f"{where} was reached, and did not answer as the doctor does", mend)
        return
    what = f"{where} was reached in {1000 * (after - before):.1f} ms, its clock is {skew:+.3f} s from this one"
    facts = {"skew_seconds": skew, "round_trip_seconds": after - before}
    if abs(skew) > _SKEW:
        yield Finding("warning", "peers", what, "start chrony or ntpd on both machines", facts)
    else:
        yield Finding("ok", "peers", what, facts=facts)
