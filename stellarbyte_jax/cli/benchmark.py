"""Measures throughput, beside a peer in the same run, and writes JSON to ``benchmarks/``."""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from stellarbyte_jax.cli.attention_peers import WORKERS as ATTENTION_PEERS
from stellarbyte_jax.cli.attention_speed import WORKERS as ATTENTION
from stellarbyte_jax.cli.benchmark_parser import NAMES, SMALL, SMALL_NAMES, TRAINED
from stellarbyte_jax.cli.benchmark_parser import parse as _parse
from stellarbyte_jax.cli.decode_speed import WORKERS as DECODING
from stellarbyte_jax.cli.evaluation_speed import WORKERS as EVALUATION
from stellarbyte_jax.cli.generation_speed import WORKERS as GENERATION
from stellarbyte_jax.cli.grouped_peers import WORKERS as GROUPED_PEERS
from stellarbyte_jax.cli.grouped_speed import WORKERS as OF_GROUPED
from stellarbyte_jax.cli.grouped_speed import measure as measure_grouped
from stellarbyte_jax.cli.grouped_table import table
from stellarbyte_jax.cli.layer_peers import WORKERS as LAYER_PEERS
from stellarbyte_jax.cli.layer_speed import WORKERS as LAYERS
from stellarbyte_jax.cli.lora_speed import PEERS as BESIDE_LORA
from stellarbyte_jax.cli.lora_speed import WORKERS as LORA
from stellarbyte_jax.cli.lora_speed import settings as lora_settings
from stellarbyte_jax.cli.loss_speed import LOSS_PEERS
from stellarbyte_jax.cli.loss_speed import WORKERS as LOSSES
from stellarbyte_jax.cli.machine import facts
from stellarbyte_jax.cli.measurements import WORKERS as OTHERS
from stellarbyte_jax.cli.measurements import compared
from stellarbyte_jax.cli.mesh_speed import COMPARED, Row, has_failed, least_devices, measure, rows
from stellarbyte_jax.cli.moe_speed import PEERS as BESIDE_EXPERTS
from stellarbyte_jax.cli.moe_speed import WORKERS as EXPERTS
from stellarbyte_jax.cli.peft_peers import WORKERS as LORA_PEERS
from stellarbyte_jax.cli.program import load_settings
from stellarbyte_jax.cli.torch_peers import PEERS as BESIDE_TRAINING
from stellarbyte_jax.cli.torch_peers import WORKERS as PEERS
from stellarbyte_jax.cli.workers import OUT_OF_MEMORY, run_worker
from stellarbyte_jax.command import MendableError, command, imports, make_directory, print_error

WORKERS = (
    OTHERS
    | GENERATION
    | EVALUATION
    | EXPERTS
    | PEERS
    | LORA
    | LORA_PEERS
    | OF_GROUPED
    | GROUPED_PEERS
    | LAYERS
    | LAYER_PEERS
    | ATTENTION
    | ATTENTION_PEERS
    | DECODING
    | LOSSES
    | LOSS_PEERS
)
_ON_TORCH = ("huggingface", "huggingface_bfloat16", "eval_huggingface", "huggingface_moe", "huggingface_moe_bfloat16")
_PEERS = {  # with the packages that they need, as pip calls them
    **dict.fromkeys(_ON_TORCH, ("torch",)),
    **dict.fromkeys((*LAYER_PEERS, *ATTENTION_PEERS, *LOSS_PEERS), ("torch",)),
    "huggingface_liger": ("torch", "liger-kernel"),
    **{name: ("torch", "accelerate" if name == "sft_chats_trainer" else "peft") for name in LORA_PEERS},
}
_ON_GPU = ("huggingface_liger", *NAMES["grouped_matmul"])  # whose kernels run nowhere else, or only slowly
_COMPARED = {"train": BESIDE_TRAINING, "lora": BESIDE_LORA, "moe": BESIDE_EXPERTS}
_CONFIGS = dict.fromkeys(("moe", "moe_layer"), ("pretrain_moe", "quickstart_moe"))  # on a GPU, and without
_BY_SHAPE = ("grouped_ours", "grouped_torch")
_FLOPS = "6 (active parameters - embedding) + 6 L T D a token, causal attention counted half"
_FLOPS_OF = {
    "grouped_matmul": "2 rows D F",
    "moe_layer": "6 tokens choices D n forward, 12 backward",
    "attention": "4 H a head and pair that is seen, backward 2.5 times",
    "cross_entropy": "6 tokens D V",
}
_FROZEN = "; of a weight that is frozen beside adapters 4 for 6: its gradient is not computed"
# More than JAX's three quarters, and room for NCCL; devices of a CPU, which a GPU's machine leaves alone.
_VARIABLES = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9", "JAX_NUM_CPU_DEVICES": "2"}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line; each measurement runs this command again with ``--worker``."""
    options = _parse(arguments)
    if options.worker:
        return _work(options)
    found: dict[str, Any] = {"platform": None} if options.what == "data" else _machine(options)
    small = found["platform"] == "cpu"
    if options.what == "mesh":
        measured = _measured_on_mesh(options, found["devices"], small)
    elif options.what == "grouped_matmul":
        measured = _measured_products(options, found, small)
    else:
        measured = _measured(options, small)
    output = Path(options.output or f"benchmarks/{options.what}{'-cpu' if small else ''}.json")
    part = output.with_name(f"{output.name}.part")
    make_directory(output.parent, "--output")
    report = _report(options)
    for name, result in measured:
        report["results"][name] = result
        _write(part, {**report, "incomplete": True})
    if options.what in _COMPARED:
        report["compared"] = compared(report["results"], _COMPARED[options.what])
        _write(part, {**report, "incomplete": True})
        for name, result in report["compared"].items():
            _tell(name, result)
    if options.what == "grouped_matmul":
        print(table(report["results"]), flush=True)
    if any(has_failed(result) for result in report["results"].values()):
        return _kept(output, part, "a measurement failed", 1)
    if options.only and not options.output:
        return _kept(output, part, "--only measures some; --output FILE writes them", 0)
    _write(part, report)
    part.replace(output)
    print(f"wrote {output}")
    return 0


def _work(options: argparse.Namespace) -> int:
    """Measures in this process, and prints the result for the one that waits."""
    with imports():
        from stellarbyte_jax.training import begin

    config = begin.find_tokenizer(load_settings(options.config, options.set)).used
    more = {"profile": options.profile} if options.profile else {}
    more |= {"names": options.only} if options.worker in _BY_SHAPE else {}
    try:
        result = WORKERS[options.worker](config, options.steps, **more)
    except RuntimeError as error:  # of JAX
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print_error(error)
        result = {"error": OUT_OF_MEMORY}
    print("RESULT " + json.dumps(result))
    return 0


def _names(options: argparse.Namespace, small: bool) -> list[str]:
    """What is measured, without peers that are not wanted or cannot be; says so.

    Raises:
      MendableError: a peer that ``--only`` names cannot be measured.
    """
    if options.only:
        names = list(dict.fromkeys(options.only))
        for name in names:
            if small and name in _ON_GPU:
                raise MendableError(f"--only {name} needs a GPU, and JAX finds none: leave it out")
            if lacking := _lacking(_PEERS.get(name, ())):
                raise MendableError(f"--only {name} needs {' and '.join(lacking)}: pip install {' '.join(lacking)}")
        return names
    names = {**NAMES, **(SMALL_NAMES if small else {})}[options.what]
    if options.no_peer:
        return [name for name in names if name not in _PEERS]
    alone = [name for name in names if small and name in _ON_GPU]
    for name in alone:
        print(f"no peer: {name} needs a GPU")
    names = [name for name in names if name not in alone]
    lacking = _lacking([package for name in names for package in _PEERS.get(name, ())])
    for package in lacking:
        _tell_lacking(package)
    return [name for name in names if not set(lacking).intersection(_PEERS.get(name, ()))]


def _lacking(packages: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys(packages) if importlib.util.find_spec(name.replace("-", "_")) is None]


def _tell_lacking(package: str) -> None:
    print(f"no peer: {package} is not installed (pip install {package})")


def _peers(options: argparse.Namespace, asked: bool) -> bool:
    """Whether peers on torch can be measured; a line where it is missing for one."""
    missing = asked and not options.no_peer and bool(_lacking(["torch"]))
    if missing:
        _tell_lacking("torch")
    return not (options.no_peer or missing)


def _measured(options: argparse.Namespace, small: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Checks the settings; each measurement with its name, as they are made."""
    if options.what in ("attention", "decode_attention", "cross_entropy"):
        if small:
            print("no GPU: a tiny shape, without a peer; the figures say nothing of speed")
    elif options.config is None:
        options.config = _CONFIGS.get(options.what, ("pretrain", SMALL))[small]
        if small and options.what == "moe_layer":
            print("no GPU: a tiny shape, without a peer; the figures say nothing of speed")
        elif small:
            print(
                f"no GPU: measures the model of {options.config}, for generation one of 25M parameters; "
                "--config names another"
            )
    if options.what == "lora":
        options.set = [*lora_settings(small), *options.set]
    config = load_settings(options.config or SMALL, options.set)
    if options.what == "train" and config.model.moe.num_experts and not (options.no_peer or options.only):
        print("no peer: the Llama of transformers has no experts; benchmark moe measures a peer that has")
        options.no_peer = True
    names = _names(options, small)

    def each() -> Iterator[tuple[str, dict[str, Any]]]:
        for number, name in enumerate(names, 1):
            print(f"measuring {name} ({number} of {len(names)})", file=sys.stderr, flush=True)
            profile = None if name in _PEERS or not options.profile else options.profile / name
            result = _run_worker(name, _changed(options, profile=profile))
            _tell(name, result)
            yield name, result

    return each()


def _measured_on_mesh(options: argparse.Namespace, devices: int, small: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Checks the settings; each row with its name, again whenever a part of it was measured."""
    if devices < 2:
        raise MendableError("benchmark mesh needs at least two GPUs, and JAX finds one: benchmark train measures one")
    if small:
        print(f"no GPU: tiny models on {devices} simulated devices of the CPU; the figures say nothing of speed")
    names = []
    for name in _names(options, small):
        if devices >= (least := least_devices(name)):
            names.append(name)
        elif options.only:
            raise MendableError(f"--only {name}: that row is for {least} devices or more, and JAX finds {devices}")
        else:
            print(f"{name:14} is for {least} devices or more, and left out")
    chosen = [row for name in names for row in rows(name, small).values()]
    for row in chosen:
        load_settings(row.config, [*row.typed(devices), *options.set])
    peers = _peers(options, any(row.peer for row in chosen))

    def run(worker: str, part: str, row: Row, settings: Sequence[str], processes: int) -> dict[str, Any]:
        print(f"measuring {part}", file=sys.stderr, flush=True)
        profile = None if worker in PEERS or not options.profile else options.profile / part
        more = {"steps": options.steps or row.steps, "profile": profile}
        changed = _changed(options, config=row.config, set=[*settings, *options.set], **more)
        result = _run_worker(worker, changed, processes)
        _tell(part, result)
        return result

    def each() -> Iterator[tuple[str, dict[str, Any]]]:
        for name in names:
            result: dict[str, Any] = {}
            for result in measure(name, devices, small, peers, run):
                yield name, result
            if compared := {key: result[key] for key in COMPARED if key in result}:
                _tell(f"{name}, in all:", compared)

    return each()


def _measured_products(
    options: argparse.Namespace, found: dict[str, Any], small: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Checks the device; the rows of each shape with its name, again when the peer was measured."""
    if not small and found.get("compute_capability") != "9.0":
        raise MendableError(
            "benchmark grouped_matmul needs an NVIDIA Hopper GPU (compute capability 9.0), and JAX finds "
            f"{found.get('kind', found['platform'])}: run it on an H100 or H200; JAX_PLATFORMS=cpu tries it without one"
        )
    if small:
        print("no GPU: a tiny shape in JAX's interpreter, without a peer; the figures say nothing of speed")
    names = _names(options, small)
    peers = _peers(options, not small) and not small

    def run(worker: str, names: Sequence[str]) -> dict[str, Any]:
        print(f"measuring {worker}", file=sys.stderr, flush=True)
        result = _run_worker(worker, _changed(options, only=list(names)))
        told = {key: value for key, value in result.items() if key != "shapes"}
        _tell(worker, told)
        return result

    return measure_grouped(names, peers, run)


def _changed(options: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(options), **changes})


def _tell(name: str, result: dict[str, Any]) -> None:
    """A line of figures; slower ways in which the same was measured are in the file alone."""
    print(f"{name:14} " + "  ".join(f"{key} {value}" for key, value in result.items() if key != "others"), flush=True)


def _report(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "what": options.what,
        "date": date.today().isoformat(),
        **facts(_environment(options)),
        **({"flops": _FLOPS + (_FROZEN if options.what == "lora" else "")} if options.what in TRAINED else {}),
        **({"flops": _FLOPS_OF[options.what]} if options.what in _FLOPS_OF else {}),
        "config": {"file": options.config, "set": options.set},
        "results": {},
    }


def _write(path: Path, report: dict[str, Any]) -> None:
    """Writes a file, or leaves the one that is there as it was."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    new.replace(path)


def _kept(output: Path, part: Path, why: str, code: int) -> int:
    print(f"{output} is as it was: {why}; what was measured is in {part}", file=sys.stderr)
    return code


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    """What JAX finds on this machine, such as ``platform`` cpu, whatever the settings are."""
    print("looking for a GPU", file=sys.stderr, flush=True)
    found = _run_worker("device", _changed(options, config=None, set=[], profile=None, limit=None))
    if "platform" not in found:
        raise MendableError(f"JAX could not start ({found['error']}): its own message stands above")
    return found


def _environment(options: argparse.Namespace) -> dict[str, str]:
    """Variables of the processes that measure, where nobody has set them."""
    wanted = _VARIABLES if options.what == "mesh" else {}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def _run_worker(name: str, options: argparse.Namespace, processes: int = 1) -> dict[str, Any]:
    words = [options.what, "--worker", name, "--config", options.config or SMALL]
    words += ["--steps", str(options.steps)] if options.steps else []
    words += ["--set", *options.set] if options.set else []
    words += ["--profile", str(options.profile)] if options.profile else []
    words += [word for shape in options.only for word in ("--only", shape)] if name in _BY_SHAPE else []
    return run_worker(words, processes=processes, limit=options.limit, environment=_environment(options))
