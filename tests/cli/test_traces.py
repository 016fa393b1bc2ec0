"""The share of collectives in a trace, from one that is written by hand."""

import pytest
from jax.profiler import ProfileData

from stellarbyte_jax.cli import traces


def profile(**planes):
    """Planes by name, of lines by name, of events: name, start and length in ns."""
    text = ""
    for number, (plane, lines) in enumerate(planes.items(), 1):
        names = sorted({event[0] for events in lines.values() for event in events})
        text += f'planes {{ id: {number} name: "{plane}" '
        for line, events in lines.items():
            text += f'lines {{ name: "{line}" '
            for name, start, length in events:
                at = f"metadata_id: {names.index(name) + 1} offset_ps: {start}000 duration_ps: {length}000"
                text += f"events {{ {at} }} "
            text += "} "
        for index, name in enumerate(names, 1):
            text += f'event_metadata {{ key: {index} value {{ id: {index} name: "{name}" }} }} '
        text += "} "
    return ProfileData.text_proto_to_serialized_xspace(text)


# Of 100 ns: NCCL 10 to 40 and 30 to 50, beside products 20 to 45; so alone from 10 to 20 and from 45 to 50.
BUSY = {
    "Stream #1(Compute)": [("gemm", 0, 10), ("gemm", 20, 25), ("fusion", 60, 40)],
    "Stream #2(Compute)": [("ncclDevKernel_AllGather_RING_LL", 10, 30), ("ncclDevKernel_ReduceScatter", 30, 20)],
    "XLA Ops": [("all-gather", 0, 100)],
}
QUIET = {"Stream #1(Compute)": [("gemm", 0, 100)]}


@pytest.mark.parametrize(
    ("planes", "expected"),
    [
        ({"/device:GPU:0": BUSY}, {"collectives": 0.4, "collectives_alone": 0.15}),
        ({"/device:GPU:0": BUSY, "/device:GPU:1": QUIET}, {"collectives": 0.2, "collectives_alone": 0.075}),
        ({"/host:CPU": BUSY}, {}),
        ({"/device:GPU:0": {}}, {}),
    ],
)
def test_collectives_are_counted_by_the_time_that_they_cover(planes, expected, tmp_path):
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "vm.xplane.pb").write_bytes(profile(**planes))
    assert traces.collective_shares(tmp_path) == pytest.approx(expected)


def test_without_a_trace_there_is_no_share(tmp_path):
    assert traces.collective_shares(tmp_path) == {}
