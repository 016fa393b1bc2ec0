"""Prints what a training run would take of its devices, and starts none."""

import argparse
import dataclasses
import json
import math
from typing import Any

from stellarbyte_jax.command import MendableError, imports
from stellarbyte_jax.config import ConfigError, TrainConfig
from stellarbyte_jax.config.mesh import REST

with imports():
    import jax
    from rich.console import Console
    from rich.table import Table

    from stellarbyte_jax.inspect.numbers import of_bytes, percent, short
    from stellarbyte_jax.launch import quiet_libraries
    from stellarbyte_jax.training import begin, messages
    from stellarbyte_jax.training.placement import devices
    from stellarbyte_jax.training.plan import Plan, Planner
    from stellarbyte_jax.training.plan_devices import ASSUMED, KINDS, device_of
    from stellarbyte_jax.training.plan_exchange import within_machine
    from stellarbyte_jax.training.plan_search import MOST_DEVICES, advice, search, settings, would_do

_TAKEN = 0.75  # of a GPU's memory by jax, where nothing else is said (jax's page "GPU memory allocation")
_WIDTH = 120  # of tables where no terminal says how wide it is


class DoesNotFitError(MendableError):
    """The run needs more memory than its devices have."""


def print_plan(config: TrainConfig, options: argparse.Namespace) -> int:
    """Prints the plan of a run on ``--devices`` devices of ``--device-kind``, as tables or with ``--json``.

    Raises:
      ConfigError: the mesh does not divide the run, or there are too few devices for it.
      DoesNotFitError: the run does not fit; the message says what would do.
    """
    quiet_libraries()
    config = begin.complete(config)
    count, kind = _devices(config, options)
    planner = Planner(config, device_of(kind))
    try:
        plan = planner.plan(config.mesh.sizes(count))
    except ConfigError as error:
        known = would_do(planner, count)
        raise ConfigError(str(error) if known is None else f"{error}; {known}") from None
    found = search(planner, count)
    best = found.best
    if options.json:
        print(json.dumps(_as_json(planner, plan, best), indent=2))
    else:
        _print(planner, plan, best, count)
    if not plan.fits:
        raise DoesNotFitError(
            f"this run takes {of_bytes(plan.bytes.total)} of each device, more than {percent(ASSUMED.room)} of the "
            f"{of_bytes(plan.device.memory)} of {plan.device.name}: {advice(planner, count, found)}"
        )
    return 0


def _devices(config: TrainConfig, options: argparse.Namespace) -> tuple[int, str]:
    """How many devices are meant, and of which kind: those typed, else those of the mesh, else those that there are."""
    sizes = [getattr(config.mesh, name) for name in config.mesh.names()]
    fixed = None if REST in sizes else math.prod(sizes)
    count, kind = options.devices or fixed, options.device_kind
    if count is None:
        found = devices()
        count = len(found)
        kind = kind or (None if found[0].platform == "cpu" else found[0].device_kind)
    if count > MOST_DEVICES:
        raise ConfigError(f"--devices {count}: a plan is for at most {MOST_DEVICES}")
    return count, kind or next(iter(KINDS))


def _as_json(planner: Planner, plan: Plan, best: Plan | None) -> dict[str, Any]:
    counts = planner.parameters
    return {
        "device": dataclasses.asdict(plan.device),
        "parameters": {"total": counts.total, "active": counts.active},
        "plan": _facts(plan),
        "suggestion": None if best is None else {**_facts(best), "set": settings(best)},
        "assumptions": dataclasses.asdict(ASSUMED),
    }


def _facts(plan: Plan) -> dict[str, Any]:
    return {
        "devices": plan.devices,
        "mesh": dict(plan.sizes),
        "gradient_accumulation_steps": plan.config.gradient_accumulation_steps,
        "remat": plan.config.model.remat,
        "rows_per_device": plan.rows,
        "bytes_per_device": {**dataclasses.asdict(plan.bytes), "total": plan.bytes.total},
        "fits": plan.fits,
        "flops_per_step": plan.flops,
        "collectives": [
            {**dataclasses.asdict(each), "nvlink": within_machine(each.axis, plan.sizes)} for each in plan.exchanges
        ],
        "seconds": {**dataclasses.asdict(plan.times), "step": plan.times.step},
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
    }


def _print(planner: Planner, plan: Plan, best: Plan | None, count: int) -> None:
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _WIDTH
    told = messages.parameters(planner.parameters)
    used = f"{count}" if plan.devices == count else f"{plan.devices} of {count}"
    console.print(f"plan for {used} x {plan.device.name}: {told}; nothing is started")
    better = best if best is not None and settings(best) != settings(plan) else None
    plans = [plan] if better is None else [plan, better]
    for table in (_run_table(plans), _memory_table(plans), _exchange_table(plan)):
        if table.row_count:
            console.print(table)
    a = ASSUMED
    console.print(
        f"Weights, optimizer, EMA and router state are exact; the rest is an estimate, times above all: products reach "
        f"{a.products:.0%} of {short(plan.device.flops)}FLOP/s, attention {a.attention:.0%}, memory {a.memory:.0%} of "
        f"{short(plan.device.bandwidth)}B/s, links {a.links:.0%} of {short(plan.device.nvlink)}B/s (NVLink) and "
        f"{short(plan.device.network)}B/s (network); weights and gradients travel behind {a.hidden:.0%} of products."
    )
    if any(each.fits and each.bytes.total > _TAKEN * each.device.memory for each in plans):
        console.print(
            f"jax takes {_TAKEN:.0%} of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 or so is set, which "
            "a run of this size needs"
        )
    if better is not None:
        console.print(f"suggested: --set {settings(better)}")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right")
    return table


def _columns(plans: list[Plan]) -> tuple[str, ...]:
    return ("asked for", "suggested")[: len(plans)]


def _run_table(plans: list[Plan]) -> Table:
    table = _table("The step", "", *_columns(plans))
    rows = {
        "mesh": lambda p: " x ".join(f"{name}={size}" for name, size in p.sizes.items() if size > 1) or "data=1",
        "rows a device, at once": lambda p: f"{p.rows:,}",
        "gradient_accumulation_steps": lambda p: f"{p.config.gradient_accumulation_steps:,}",
        "model.remat": lambda p: p.config.model.remat,
        "operations": lambda p: f"{short(p.flops)}FLOP",
        "time": lambda p: f"{1000 * p.times.step:,.1f} ms",
        "  products": lambda p: f"{1000 * p.times.products:,.1f} ms",
        "  memory": lambda p: f"{1000 * p.times.memory:,.1f} ms",
        "  exchanges": lambda p: f"{1000 * p.times.exchanges:,.1f} ms",
        "tokens/s": lambda p: f"{p.tokens_per_second:,.0f}",
        "MFU": lambda p: percent(p.mfu),
    }
    for name, told in rows.items():
        table.add_row(name, *map(told, plans))
    return table


def _memory_table(plans: list[Plan]) -> Table:
    table = _table("Memory of each device, at the peak", "", *_columns(plans))
    for field in dataclasses.fields(plans[0].bytes):
        sizes = [getattr(plan.bytes, field.name) for plan in plans]
        if any(sizes):
            table.add_row(field.name, *map(of_bytes, sizes))
    table.add_section()
    table.add_row("in all", *(of_bytes(plan.bytes.total) for plan in plans))
    table.add_row("of which may be filled", *(of_bytes(plan.limit) for plan in plans))
    return table


def _exchange_table(plan: Plan) -> Table:
    table = _table(
        "What each device sends in a step, as asked for", "collective", "axis", "of", "bytes", "over", "time"
    )
    for each in plan.exchanges:
        link = "NVLink" if within_machine(each.axis, plan.sizes) else "network"
        seconds = each.seconds(plan.sizes, plan.device)
        table.add_row(each.kind, each.axis, each.what, of_bytes(each.sent), link, f"{1000 * seconds:,.2f} ms")
    return table


def prepare_backend(options: argparse.Namespace) -> None:
    """Leaves accelerators alone where their number and kind are typed: another run may be using them."""
    if options.devices is not None:
        jax.config.update("jax_platforms", "cpu")
