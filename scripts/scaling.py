"""Weak scaling to 4,096 GPUs on paper: tokens a second from the planner's roofline and a few measured figures.

    python scripts/scaling.py                                  # the tables of docs/scaling.md
    python scripts/scaling.py --write docs/scaling.md          # puts them there
    python scripts/scaling.py --mesh benchmarks/mesh.json --doctor doctor.json   # takes over new measurements first

Measured figures: ``benchmarks/scaling.json``. Bytes, operations and memory are the planner's. docs/scaling.md tells
what each figure rests on. Nothing is run on a GPU.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stellarbyte_jax.cli.mesh_speed import ROWS, Row
from stellarbyte_jax.cli.parser import Parser
from stellarbyte_jax.cli.program import local_path
from stellarbyte_jax.command import command, imports
from stellarbyte_jax.config import ConfigError, MeshConfig, TrainConfig, load

with imports():
    import jax

    from stellarbyte_jax.launch import quiet_libraries
    from stellarbyte_jax.training.plan import Plan, Planner
    from stellarbyte_jax.training.plan_devices import ASSUMED, KINDS, device_of
    from stellarbyte_jax.training.plan_network import Links, cost

MEASURED = Path("benchmarks/scaling.json")
COUNTS = (8, 64, 256, 1024, 4096)
BEGIN, END = "<!-- tables: python scripts/scaling.py --write docs/scaling.md -->", "<!-- end of tables -->"
_HIDEABLE = ("weights", "gradients")  # that products may hide, as in training/plan.py


@dataclass(frozen=True)
class Guess:
    """What is assumed, beside what the planner assumes.

    Attributes:
      network: share of a network adapter's rate that collectives reach.
      nvlink: times the measured bandwidth of collectives within a machine.
      latency: times NCCL's figures.
      overlap: seconds that a second of exchanges of weights and gradients costs; None: as measured.
    """

    network: float = ASSUMED.links
    nvlink: float = 1.0
    latency: float = 1.0
    overlap: float | None = None


ASSUMED_HERE = Guess()
VARIANTS: dict[str, Guess] = {
    "as assumed": ASSUMED_HERE,
    "network at half": Guess(network=ASSUMED.links / 2),
    "network at its peak": Guess(network=1.0),
    "latency twice": Guess(latency=2.0),
    "no latency": Guess(latency=0.0),
    "NVLink twice": Guess(nvlink=2.0),
    "all hidden": Guess(overlap=0.0),
    "nothing hidden": Guess(overlap=1.0),
}


@dataclass(frozen=True)
class Case:
    """A model and how it is spread.

    Attributes:
      name: of the table.
      config: name of a config that comes with the package.
      settings: that change it.
      rows: of a batch, for each GPU.
      meshes: axes as settings, one of them -1; each is a part of the table.
      rate: measured row (of ``benchmark mesh``) that its computing is scaled by.
    """

    name: str
    config: str
    settings: tuple[str, ...]
    rows: int
    meshes: tuple[Mapping[str, int], ...]
    rate: str

    def at(self, devices: int, axes: Mapping[str, int]) -> tuple[TrainConfig, dict[str, int]]:
        """The run on so many GPUs, and the sizes of its mesh."""
        mesh = MeshConfig(**axes)
        typed = [*self.settings, f"global_batch_size={self.rows * devices}"]
        return load(self.config, typed), mesh.sizes(devices)


_WITHIN, _ALL, _EXPERTS = {"data": -1, "fsdp": 8}, {"data": 1, "fsdp": -1}, {"data": -1, "expert": 8}
_CAPACITY = ("model.moe.dispatch=capacity",)
_BLOCKS = ("model.moe.implementation=xla",)  # as they were measured
# Llama 2 70B: Touvron et al. 2023, https://arxiv.org/abs/2307.09288.
_LARGEST = (
    "model.hidden_size=8192",
    "model.num_hidden_layers=80",
    "model.num_attention_heads=64",
    "model.num_key_value_heads=8",
    "model.intermediate_size=28672",
    "model.max_position_embeddings=4096",
    "data.sequence_length=4096",
    "model.remat=full",
    "model.scan_unroll=1",
)


def measured_row(name: str, model: str | None = None) -> Row:
    """The row of ``benchmark mesh`` with this model; None: its first."""
    models = ROWS[name]
    return next(iter(models.values())) if model is None else models[model]


_FSDP, _LARGE, _EXPERT = (measured_row(name) for name in ("fsdp", "large", "expert"))
CASES = (
    Case("1.10B", _FSDP.config, _FSDP.settings, 8, (_WITHIN, _ALL), "fsdp"),
    Case("6.74B", _LARGE.config, _LARGE.settings, 4, (_WITHIN, _ALL), "large"),
    Case(
        "69B",
        "pretrain",
        _LARGEST,
        2,
        ({"data": 1, "fsdp": -1, "tensor": 8}, {"data": -1, "fsdp": 8, "tensor": 8}, {"data": -1, "fsdp": 64}, _ALL),
        "large",
    ),
    Case("1.31B with experts", _EXPERT.config, _BLOCKS, 8, (_EXPERTS, _WITHIN), "expert"),
    Case("1.31B with experts of a capacity", _EXPERT.config, _CAPACITY, 8, (_EXPERTS,), "expert, capacity"),
)


@dataclass(frozen=True)
class Step:
    """A step on paper.

    Attributes:
      plan: the planner's.
      computing: seconds of products and memory.
      waits: seconds that each cause adds to it, by what it is.
    """

    plan: Plan
    computing: float
    waits: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.computing + sum(self.waits.values())

    @property
    def rate(self) -> float:
        """Tokens a second of a GPU."""
        return self.tokens / self.seconds / self.plan.devices

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.plan.config.global_batch_size * self.plan.config.data.sequence_length


class Model:
    """Steps on paper, from figures that were measured."""

    def __init__(self, measured: Mapping[str, Any]):
        """Takes the figures of ``benchmarks/scaling.json``."""
        self.measured, self.device = measured, KINDS[measured["device"]]
        o = measured["overlap"]
        self.overlap = (o["alone"] + o["slowed"]) / o["collectives"]
        self._factors: dict[tuple[str, Guess], float] = {}
        self._measured_plans: dict[tuple[str, int], Plan] = {}

    def plan(self, case: Case, devices: int, axes: Mapping[str, int]) -> Plan:
        """What the planner says of a case.

        Raises:
          ConfigError: the mesh does not divide the run.
        """
        config, sizes = case.at(devices, axes)
        return Planner(config, self.device).plan(sizes)

    def step(self, plan: Plan, factor: float, guess: Guess = ASSUMED_HERE) -> Step:
        """A step whose computing takes ``factor`` times what the planner says."""
        computing = factor * (plan.times.products + plan.times.memory)
        rates = self.measured["bus"]["gigabytes_per_second"].items()
        bus = {kind: 1e9 * guess.nvlink * rate for kind, rate in rates}
        links = Links(bus, guess.network * self.device.network, guess.latency)
        costs = [(each, cost(each, plan, links)) for each in plan.exchanges]
        hideable = sum(found.seconds for each, found in costs if each.what in _HIDEABLE)
        room = ASSUMED.hidden * factor * plan.times.products
        share = self.overlap if guess.overlap is None else guess.overlap
        open_ = share * min(hideable, room) + max(0.0, hideable - room)
        waits: dict[str, float] = {}
        for each, found in costs:
            times = open_ / hideable if each.what in _HIDEABLE else 1.0
            for cause, seconds in ((found.link, found.bytes), ("latency", found.latency)):
                key = f"{each.what} over {each.axis.replace('+', ' and ')}, {cause}"
                waits[key] = waits.get(key, 0.0) + times * seconds
        return Step(plan, computing, waits)

    def factor(self, row: str, guess: Guess = ASSUMED_HERE) -> float:
        """By how much the smallest measured run of a row computes longer than the planner says.

        Where one device was measured no guess counts; else the exchanges between those of the run are taken off.
        """
        if (row, guess) not in self._factors:
            found = self.measured["rates"][row]
            devices = 1 if "single" in found else found["devices"]
            rate = found["single"] if devices == 1 else found["tokens_per_second"]
            planned = self.step(self._measured_plan(row, devices), 1.0, guess)
            waits = planned.seconds - planned.computing
            self._factors[row, guess] = (planned.tokens / rate - waits) / planned.computing
        return self._factors[row, guess]

    def single(self, row: str) -> float | None:
        """Tokens a second that one such GPU was measured to make; None: it was not, or another kind was."""
        found = self.measured["rates"][row]
        return found.get("single") if found.get("device") in (None, self.measured["device"]) else None

    def _measured_plan(self, row: str, devices: int) -> Plan:
        if (row, devices) in self._measured_plans:
            return self._measured_plans[row, devices]
        found = self.measured["rates"][row]
        run = measured_row(found.get("row", row), found.get("model"))
        config = load(run.config, [*run.typed(devices), *found.get("settings", ())])
        planner = Planner(config, KINDS[found.get("device", self.measured["device"])])
        self._measured_plans[row, devices] = planner.plan(config.mesh.sizes(devices))
        return self._measured_plans[row, devices]

    def checks(self) -> Iterator[tuple[str, float, float]]:
        """Rows that were measured on one device and on several: name, measured and computed tokens a second."""
        for row, found in self.measured["rates"].items():
            if "single" in found and "tokens_per_second" in found:
                plan = self._measured_plan(row, found["devices"])
                step = self.step(plan, self.factor(row))
                yield f"`{row}`, {mesh_name(plan.sizes)}", found["tokens_per_second"], step.rate * plan.devices


def mesh_name(sizes: Mapping[str, int]) -> str:
    """``data=8 fsdp=8``."""
    return " ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)


def tables(measured: Mapping[str, Any]) -> str:
    """All tables in Markdown."""
    model = Model(measured)
    parts = [_figures(model), _checks(model)]
    steps = []
    for case in CASES:
        text, found = _table(model, case)
        parts.append(text)
        steps += found
    return "\n\n".join([*parts, _sensitivity(model, steps)])


def _figures(model: Model) -> str:
    m, bus, o = model.measured, model.measured["bus"], model.measured["overlap"]
    rates = ", ".join(f"{kind} {rate:g}" for kind, rate in bus["gigabytes_per_second"].items())
    return "\n".join(
        [
            f"Measured ({m['date']}, {m['device']}, {m['on']}):",
            "",
            f"- Bus bandwidth of {bus['devices']} GPUs of a machine{_other(bus)} at {bus['mebibytes']} MiB, GB/s: "
            f"{rates}.",
            f"- `fsdp` on two GPUs{_other(o)}: collectives run {_percent(o['collectives'])} of the time, "
            f"{_percent(o['alone'])} alone, and slow what runs beside them by {_percent(o['slowed'])} of the step: "
            f"a second of them costs {model.overlap:.2f} s.",
        ]
    )


def _other(part: Mapping[str, Any]) -> str:
    """Says which kind of GPU a figure is of, where it is another one."""
    return f" ({part['device']})" if "device" in part else ""


def _checks(model: Model) -> str:
    lines = ["### Beside what was measured", "", "| run | measured, tokens/s | on paper | |", "|---|---:|---:|---:|"]
    for name, measured, paper in model.checks():
        lines.append(f"| {name} | {measured:,.0f} | {paper:,.0f} | {100 * (paper / measured - 1):+.1f} % |")
    return "\n".join(lines)


def _table(model: Model, case: Case) -> tuple[str, list[tuple[Case, Step]]]:
    """A table, and its steps on 1,024 GPUs."""
    factor = model.factor(case.rate)
    lines: list[str] = []
    shown: dict[str, Step] = {}
    least: int | None = None
    for axes in case.meshes:
        first: float | None = None
        for count in (n for n in COUNTS if n >= math.prod(size for size in axes.values() if size > 0)):
            try:
                plan = model.plan(case, count, axes)
            except ConfigError as error:
                lines.append(_row([f"{count:,}", f"refused: {str(error).partition(':')[0]}", *8 * [""]]))
                continue
            name = mesh_name(plan.sizes)
            if not plan.fits:
                lines.append(_row([f"{count:,}", f"{name}: does not fit", *8 * [""]]))
                continue
            step = model.step(plan, factor)
            first, least = first or step.rate, least or count
            if name not in shown:
                lines.append(_line(step, model.single(case.rate), first))
                shown[name] = step
    some = next(iter(shown.values()))
    told = f"{some.tokens // some.plan.devices:,} tokens a GPU, {factor:.3f} of the planner's computing time"
    head = ["GPUs", "mesh", "tokens a step", "step", "waits", "tokens/s", "tokens/s/GPU"]
    head += ["of 1 GPU", f"of {least}", "largest loss"]
    kept = [(case, step) for step in shown.values() if step.plan.devices == 1024]
    return "\n".join([f"### {case.name}: {told}", "", _row(head), f"|---:|---|{7 * '---:|'}---|", *lines]), kept


def _line(step: Step, one: float | None, many: float) -> str:
    cause, most = max(step.waits.items(), key=lambda each: each[1])
    return _row(
        [
            f"{step.plan.devices:,}",
            mesh_name(step.plan.sizes),
            f"{step.tokens:,}",
            f"{1000 * step.seconds:,.0f} ms",
            _percent(1 - step.computing / step.seconds),
            f"{step.rate * step.plan.devices:,.0f}",
            f"{step.rate:,.0f}",
            "-" if one is None else _percent(step.rate / one),
            _percent(step.rate / many),
            f"{cause}: {1000 * most:,.0f} ms",
        ]
    )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _sensitivity(model: Model, steps: list[tuple[Case, Step]]) -> str:
    lines = ["### Tokens/s/GPU on 1,024 GPUs with one assumption changed", "", _row(["run", *VARIANTS])]
    lines.append(f"|---|{'---:|' * len(VARIANTS)}")
    for case, step in steps:
        rates = [model.step(step.plan, model.factor(case.rate, guess), guess).rate for guess in VARIANTS.values()]
        lines.append(_row([f"{case.name}, {mesh_name(step.plan.sizes)}", *(f"{rate:,.0f}" for rate in rates)]))
    return "\n".join(lines)


def renewed(measured: dict[str, Any], mesh: Path | None, doctor: Path | None) -> dict[str, Any]:
    """The figures with those of ``benchmark mesh`` and of ``doctor --json`` in their place."""
    if mesh is not None:
        report = json.loads(mesh.read_text(encoding="utf-8"))
        measured["date"] = report["date"]
        if (kind := device_of(report["gpus"][0]).name) != (old := measured["device"]):
            measured["device"] = kind
            for part in (measured["bus"], measured["overlap"], *measured["rates"].values()):
                part.setdefault("device", old)
        for row, found in report["results"].items():
            if "error" in found or "tokens_per_second" not in found:
                continue
            single = found.get("single", {}).get("tokens_per_second")
            kept = {name: found[name] for name in ("devices", "tokens_per_second", "model") if name in found}
            measured["rates"][row] = kept | ({} if single is None else {"single": single})
            if row == "fsdp" and "collectives" in found:
                measured["overlap"] |= {"collectives": found["collectives"], "alone": found["collectives_alone"]}
                measured["overlap"].pop("device", None)
    if doctor is not None:
        names = {"all_reduce": "all-reduce", "all_gather": "all-gather", "reduce_scatter": "reduce-scatter"}
        names |= {"all_to_all": "all-to-all", "ppermute": "collective-permute"}
        for finding in json.loads(doctor.read_text(encoding="utf-8"))["findings"]:
            if (name := finding.get("facts", {}).get("collective")) in names:
                largest = finding["facts"]["measured"][-1]
                measured["bus"]["gigabytes_per_second"][names[name]] = round(largest["bus_bytes_per_second"] / 1e9, 1)
                measured["bus"].pop("device", None)
                measured["bus"]["devices"] = finding["facts"]["devices"]
                measured["bus"]["mebibytes"] = round(largest["bytes"] / 2**20)
    return measured


def written(document: str, text: str) -> str:
    """The document with the tables between its marks.

    Raises:
      ValueError: a mark is missing.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the tables belong between the lines {BEGIN} and {END}: write both into the file")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


@command
def main() -> int:
    """Parses the command line and prints the tables."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=local_path, default=MEASURED, metavar="FILE", help="default: %(default)s")
    parser.add_argument(
        "--mesh", type=local_path, metavar="FILE", help="of benchmark mesh, whose figures are taken over"
    )
    parser.add_argument("--doctor", type=local_path, metavar="FILE", help="of doctor --json, likewise")
    parser.add_argument("--write", type=local_path, metavar="FILE", help="document that the tables are put into")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    quiet_libraries()
    measured = json.loads(arguments.measured.read_text(encoding="utf-8"))
    if arguments.mesh or arguments.doctor:
        measured = renewed(measured, arguments.mesh, arguments.doctor)
        arguments.measured.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    text = tables(measured)
    if arguments.write is None:
        print(text)
    else:
        arguments.write.write_text(written(arguments.write.read_text(encoding="utf-8"), text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
