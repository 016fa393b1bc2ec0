"""Does the doctor measure what it says, and does it tell of what is slow, hangs or is not there?"""

import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers.doctor import H100, free_port, only

from stellarbyte_jax.launch.doctor import measure, peers
from stellarbyte_jax.launch.hardware import hardware_of
from stellarbyte_jax.sharding import make_mesh

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("skew", "level"), [(0.0, "ok"), (5.0, "warning"), (-5.0, "warning")])
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


def test_a_peer_that_says_nothing_does_not_hold_the_others(monkeypatch):
    monkeypatch.setattr(peers, "_PATIENCE", 0.5)
    port, found = free_port(), []
    serving = threading.Thread(
        target=lambda: found.extend(peers.check_peers(peers.Peers("127.0.0.1", port, 2, 0, 60))), daemon=True
    )
    serving.start()
    end = time.monotonic() + 60
    while True:
        try:
            silent = socket.create_connection(("127.0.0.1", port))
            break
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.01)
    with silent:
        told = list(peers.check_peers(peers.Peers("127.0.0.1", port, 2, 1, 8)))[-1]
    serving.join(60)
    assert told.level == "ok" and found[-1].what == f"all 1 peers reached 127.0.0.1:{port}"


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


@pytest.mark.parametrize("name", list(measure.COLLECTIVES))
def test_sizes_are_those_of_the_larger_side(name, monkeypatch):
    """As nccl-tests count them: of an all-gather, the result, of which a device gives its part."""
    mesh, given = make_mesh({"fsdp": 4, "tensor": 2}, jax.devices()[:8]), []

    def program(mesh, axis, name):
        return lambda x: given.append(x.nbytes // 8) or x

    monkeypatch.setattr(measure, "collective_program", program)
    assert measure.time_collective(mesh, "fsdp", name, 2**12) > 0
    assert set(given) == {2**10 if name == "all_gather" else 2**12}


def test_the_time_is_that_of_one_collective_of_those_in_a_row(monkeypatch):
    """GPUs run several of them between two looks at the clock."""
    mesh = make_mesh({"fsdp": 2}, jax.devices()[:2])
    fake = SimpleNamespace(
        shape=mesh.shape, size=2, axis_names=mesh.axis_names, devices=np.array([SimpleNamespace(platform="gpu")])
    )
    calls = []
    monkeypatch.setattr(measure, "NamedSharding", lambda _, spec: jax.NamedSharding(mesh, spec))
    monkeypatch.setattr(measure, "collective_program", lambda *_: lambda x: calls.append(x.shape) or x)
    monkeypatch.setattr(measure, "_median", lambda work: work() or 20.0)
    assert measure.time_collective(fake, "fsdp", "all_reduce", 2**12) == 20.0 / len(calls)
    assert len(calls) > 1


def test_every_product_is_counted(monkeypatch):
    made = []
    monkeypatch.setattr(jax, "jit", lambda function: lambda a, b: made.append(a.shape) or a)
    monkeypatch.setattr(measure, "_median", lambda work: work() or 2.0)
    assert measure.time_product(jax.devices()[0], 16) == len(made) * 2 * 16**3 / 2.0
    assert set(made) == {(16, 16)}


def test_a_slow_link_is_a_warning():
    link = hardware_of(H100)
    assert link is not None and link.link_bytes == 450e9
    told = {
        seconds: measure.judge_collective("all_reduce", "data", 4, {2**16: 1e-5, 2**28: seconds}, link)
        for seconds in (1e-3, 2e-3, 2.4e-3)
    }
    assert told[1e-3].level == "ok" and "402.7 GB/s of the bus at 256 MiB" in told[1e-3].what
    assert told[2e-3].level == "ok", "two H200 reach no more in some collectives"
    assert told[2.4e-3].level == "warning" and "NVLink 4 gives 450 GB/s" in told[2.4e-3].what
    assert told[2.4e-3].facts["measured"][1]["bus_bytes_per_second"] == pytest.approx(1.5 * 2**28 / 2.4e-3)
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


def test_devices_of_another_process_are_not_measured(monkeypatch):
    """Products are measured on this process's devices alone."""
    seen = []
    monkeypatch.setattr(measure, "time_product", lambda device, size: seen.append(device.id) or 1e12)
    devices = [SimpleNamespace(id=4, platform="cpu", device_kind="cpu")]
    assert only(measure.measure_products(devices, lambda text: None)).facts["device"] == 4 and seen == [4]
