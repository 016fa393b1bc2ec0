"""What each setting of the network is worth: the same small run with one change, and the speed of the large model.

    python scripts/ablation.py quality --jobs 6   # validation bits per byte on the embedded corpus, three seeds each
    python scripts/ablation.py speed              # tokens a second and memory of configs/pretrain.py's model
    python scripts/ablation.py copy               # segment memory on texts whose repetitions lie further than a row
    python scripts/ablation.py experts --jobs 6   # as quality, with experts: every gate, balance and dispatch
    python scripts/ablation.py table              # the Markdown table of what was measured

Results go to ``benchmarks/ablation.json``; a measurement renews its own part of it. ``--only NAME`` names variants.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import queue
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from stellarbyte_jax.cli.parser import Parser
from stellarbyte_jax.cli.program import local_path
from stellarbyte_jax.command import command
from stellarbyte_jax.config import TrainConfig, load

OUTPUT = Path("benchmarks/ablation.json")
SEEDS = (0, 1, 2)
SMALL = (
    "model.hidden_size=256",
    "model.num_hidden_layers=6",
    "model.intermediate_size=768",
    "model.compute_dtype=bfloat16",
    "model.scan_unroll=none",
    "data.sequence_length=256",
    "global_batch_size=16",
    "steps=400",
    "optimizer.learning_rate=4e-3",
    "schedule.warmup_steps=40",
    "evaluation.interval=400",
    "checkpoint.interval=400",
    "checkpoint.keep_best=0",
    "export_at_end=false",
    "sample_prompts=[]",
)
# Of all logged steps after a quarter of the run, the worst.
BALANCE = {"step_load": "router/max_load", "dead": "router/dead_experts", "dropped": "router/drop_rate"}
LOCAL = json.dumps([*["sliding_attention"] * 5, "full_attention"])
LOCAL_12 = json.dumps(2 * json.loads(LOCAL))
ORIGINAL = (
    "model.position_embedding=stellarbyte",
    "model.xpos_learnable=true",
    "model.mlp_style=stellarbyte",
    "model.residual_scaling=branch",
    "model.layer_scale_init=1e-5",
    "model.initialization=stellarbyte",
    "model.rms_norm_eps_rule=clamp",
)
# Name: changes of the small run, and of the large one where a length differs there.
VARIANTS: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {
    "baseline": ((), None),
    "XPos": (("model.position_embedding=xpos",), None),
    "XPos, learned rates": (("model.position_embedding=xpos", "model.xpos_learnable=true"), None),
    "XPos, learned rates, pulled to the paper's": (
        ("model.position_embedding=xpos", "model.xpos_learnable=true", "loss.xpos_regularization=0.1"),
        None,
    ),
    "GEGLU": (("model.hidden_act=gelu_pytorch_tanh",), None),
    "the original's MLP": (("model.mlp_style=stellarbyte",), None),
    "parallel residual": (("model.parallel_residual=true",), None),
    "branches / sqrt(2 L)": (("model.residual_scaling=branch",), None),
    "DeepNorm": (("model.residual_scaling=deepnorm",), None),
    "LayerScale from 0.1": (("model.layer_scale_init=0.1",), None),
    "LayerScale from 1e-5": (("model.layer_scale_init=1e-5",), None),
    "DropPath 0.1": (("model.drop_path=0.1",), None),
    "q/k norm": (("model.qk_norm=true",), None),
    "soft cap 30": (("model.attention_logit_softcap=30",), None),
    "biases": (("model.attention_bias=true", "model.attention_output_bias=true", "model.mlp_bias=true"), None),
    "untied head": (("model.tie_word_embeddings=false",), ()),
    "initialisation normal": (("model.initialization=normal",), None),
    "initialisation stellarbyte": (("model.initialization=stellarbyte",), None),
    "window of a quarter row": (("model.sliding_window=64",), ("model.sliding_window=256",)),
    "window of a quarter row, 4 sinks": (
        ("model.sliding_window=64", "model.sink_tokens=4"),
        ("model.sliding_window=256", "model.sink_tokens=4"),
    ),
    "5 local : 1 global": (
        ("model.sliding_window=64", f"model.layer_types={LOCAL}"),
        ("model.sliding_window=256", f"model.layer_types={LOCAL_12}"),
    ),
    "dropout 0.1": (("model.hidden_dropout=0.1", "model.residual_dropout=0.1"), None),
    "attention dropout 0.1": (("model.attention_dropout=0.1",), None),
    "weights under 1 % pruned": (("model.attention_prune_below=0.01",), None),
    "contiguous rows, no memory": (("data.arrangement=contiguous",), None),
    "memory of one row": (
        ("data.arrangement=contiguous", "model.memory.length=256"),
        ("data.arrangement=contiguous", "model.memory.length=1024"),
    ),
    "memory, a quarter of it compressed": (
        ("data.arrangement=contiguous", "model.memory.length=256", "model.memory.recent_share=0.75"),
        ("data.arrangement=contiguous", "model.memory.length=1024", "model.memory.recent_share=0.75"),
    ),
    "the original's defaults": (ORIGINAL, None),
}
RECOMMENDED = "configs/stellarbyte.py"
# As many weights are active as in the dense run. Routers learn at a tenth of the rate: see configs/quickstart_moe.py.
EXPERTS = (
    "model.moe.num_experts=16",
    "model.moe.num_experts_per_tok=4",
    "model.moe.intermediate_size=192",
    "optimizer.router_learning_rate_ratio=0.1",
    "loss.router_load=1",
)
CAPACITY = ("model.moe.dispatch=capacity",)
EXPERT_VARIANTS: dict[str, tuple[str, ...]] = {
    "dense": (),
    "experts: softmax, loss of the load": EXPERTS,
    "sigmoid": (*EXPERTS, "model.moe.scoring_func=sigmoid"),
    "weights not normalised": (*EXPERTS, "model.moe.norm_topk_prob=false"),
    "context gate": (*EXPERTS, "model.moe.gate=context"),
    "context gate with history": (*EXPERTS, "model.moe.gate=context", "model.moe.history_decay=0.9"),
    "noisy top-k": (*EXPERTS, "model.moe.noise=noisy_topk"),
    "Gumbel noise of 0.1": (*EXPERTS, "model.moe.noise=gumbel", "model.moe.noise_scale=0.1"),
    "adaptive temperature": (*EXPERTS, "model.moe.adaptive_temperature=true"),
    "priority of little used experts": (*EXPERTS, "model.moe.expert_priority=true"),
    "priority of cold experts": (*EXPERTS, "model.moe.cooling_steps=20"),
    "at most 4 experts, for half of the scores": (*EXPERTS, "model.moe.dynamic_k=0.5"),
    "2 groups of 4": (*EXPERTS, "model.moe.n_group=4", "model.moe.topk_group=2"),
    "router warm-up of 40 steps": (*EXPERTS, "model.moe.router_warmup_steps=40"),
    "3 experts and a shared one": (*EXPERTS, "model.moe.num_experts_per_tok=3", "model.moe.n_shared_experts=1"),
    "first layer dense": (*EXPERTS, "model.moe.first_k_dense_replace=1"),
    "every second layer dense": (*EXPERTS, "model.moe.decoder_sparse_step=2"),
    "a pool for all layers": (*EXPERTS, "model.moe.shared_pool=true"),
    "not normalised, first layer dense": (
        *EXPERTS,
        "model.moe.norm_topk_prob=false",
        "model.moe.first_k_dense_replace=1",
        "loss.router_sequence=1",
    ),
    "no balance": (*EXPERTS, "loss.router_load=0"),
    "loss over the whole batch": (*EXPERTS, "loss.router_load=0", "loss.router_global=1"),
    "loss of the load, and by row": (*EXPERTS, "loss.router_sequence=1"),
    "loss of the load, and by row, not normalised": (
        *EXPERTS,
        "model.moe.norm_topk_prob=false",
        "loss.router_sequence=1",
    ),
    "loss by row": (*EXPERTS, "loss.router_load=0", "loss.router_sequence=1"),
    "loss of undecided tokens": (*EXPERTS, "loss.router_load=0", "loss.router_entropy=1"),
    "loss KL": (*EXPERTS, "loss.router_load=0", "loss.router_kl=1"),
    "loss MSE": (*EXPERTS, "loss.router_load=0", "loss.router_mse=1"),
    "loss variance": (*EXPERTS, "loss.router_load=0", "loss.router_variance=1"),
    "loss of the load, and z": (*EXPERTS, "loss.router_z=0.001"),
    "bias, no loss": (
        *EXPERTS,
        "model.moe.scoring_func=sigmoid",
        "loss.router_load=0",
        "model.moe.bias_update_rate=0.01",
    ),
    "capacity 1.25, next best": (*EXPERTS, *CAPACITY),
    "capacity 1.25, not normalised": (*EXPERTS, *CAPACITY, "model.moe.norm_topk_prob=false"),
    "capacity 1.25, no overflow": (*EXPERTS, *CAPACITY, "model.moe.overflow=[]"),
    "capacity 1.25, every step": (
        *EXPERTS,
        *CAPACITY,
        'model.moe.overflow=["next_best", "cold", "sticky", "random"]',
    ),
    "dynamic capacity": (*EXPERTS, *CAPACITY, "model.moe.dynamic_capacity=true"),
}
# What makes a model large or fast: each of the two models has its own.
_SIZES = (
    "vocab_size",
    "vocab_size_multiple",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "tie_word_embeddings",
    "scan_unroll",
    "remat",
    "compute_dtype",
)


@command
def main() -> int:
    """Parses the command line and measures."""
    parser = Parser(settings=TrainConfig, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quality", "speed", "copy", "experts", "table"])
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="may be repeated")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time, spread over the GPUs")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="section.name=value")
    parser.add_argument("--output", type=local_path, default=OUTPUT)
    arguments = parser.parse_args()
    known = list(EXPERT_VARIANTS) if arguments.what == "experts" else names()
    unknown = [name for name in arguments.only if name not in known]
    if unknown:
        parser.error(f"there is no variant {unknown[0]!r}; there are: {', '.join(known)}")
    chosen = arguments.only or known
    kept = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    if arguments.what == "table":
        print(table(kept))
        return 0
    found = kept.get(arguments.what, {}).get("results", {})
    arguments.output.parent.mkdir(exist_ok=True)
    measure = {"quality": quality, "speed": speed, "copy": copy, "experts": experts}[arguments.what]
    for name, result in measure(chosen, arguments.jobs, arguments.set):
        print(f"{name:45} {result}", flush=True)
        found[name] = result
        kept[arguments.what] = {"date": date.today().isoformat(), "set": arguments.set, "results": found}
        arguments.output.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
    print(table(kept))
    return 0 if all("error" not in result for result in found.values()) else 1


def names() -> list[str]:
    """All variants; the recommended combination is read from its config."""
    return [*VARIANTS, RECOMMENDED]


def small(name: str, more: list[str]) -> list[str]:
    """Overrides of configs/quickstart.py for a variant of the small run."""
    if name in EXPERT_VARIANTS:
        changes = EXPERT_VARIANTS[name]
    else:
        changes = recommended("small") if name == RECOMMENDED else VARIANTS[name][0]
    return [*SMALL, *changes, *more]


def large(name: str, more: list[str]) -> list[str]:
    """Overrides of configs/pretrain.py for a variant of the large model."""
    if name == RECOMMENDED:
        return [*recommended("large"), *more]
    changes, longer = VARIANTS[name]
    return [*(changes if longer is None else longer), *more]


def recommended(size: str) -> tuple[str, ...]:
    """What configs/stellarbyte.py sets in the network, apart from its size."""
    model = load(RECOMMENDED).model
    names = [n for n in model.given() if n not in _SIZES]
    window = 64 if size == "small" else 256
    settings = {name: getattr(model, name) for name in names}
    if model.layer_types is not None:
        settings |= {"sliding_window": window, "layer_types": json.loads(LOCAL if size == "small" else LOCAL_12)}
    return tuple(f"model.{name}={json.dumps(v) if isinstance(v, list | tuple) else v}" for name, v in settings.items())


def quality(chosen: list[str], jobs: int, more: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Trains every variant with every seed; yields what is known of it after each run."""
    places = Places(jobs)
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        runs = {  # all variants with the first seed: the others find their programs compiled
            (name, seed): pool.submit(
                _train, Path(folder) / f"{number}-{seed}", [*small(name, more), f"seed={seed}"], places
            )
            for seed in SEEDS
            for number, name in enumerate(chosen)
        }
        done: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
        owners = {run: name for (name, _), run in runs.items()}
        for run in concurrent.futures.as_completed(owners):
            name = owners[run]
            done[name].append(run.result())
            yield name, _summary(done[name])


def _summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and range of the runs so far; those that failed are told with an error."""
    errors = [f["error"] for f in found if "error" in f]
    bits = [f["bits_per_byte"] for f in found if "error" not in f]
    if errors:
        return {"error": errors[0]}
    spread = {"lowest": min(bits), "highest": max(bits), "seeds": len(bits)}
    most = {n: max(f[n] for f in found) for n in ("max_load", *BALANCE) if n in found[0]}
    return {"bits_per_byte": statistics.mean(bits), **spread, **most, "on": found[0]["on"]}


def experts(chosen: list[str], jobs: int, more: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same for networks with experts, and how the load was spread in the worst of the runs."""
    yield from quality(chosen, jobs, more)


class Places:
    """Where runs can be made at the same time: each has one GPU, or a share of one where there are more runs."""

    def __init__(self, jobs: int) -> None:
        """Deals ``jobs`` runs out to the GPUs of this machine."""
        found = gpus() or [None]
        self._free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for number in range(jobs):
            self._free.put(found[number % len(found)])
        self._share = 0.9 / -(-jobs // len(found))

    @contextlib.contextmanager
    def taken(self) -> Iterator[dict[str, str]]:
        """The environment of a run that has one of the places to itself."""
        place = self._free.get()
        chosen = {} if place is None else {"CUDA_VISIBLE_DEVICES": place}
        try:
            yield {**os.environ, **chosen, "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{self._share:.3f}"}
        finally:
            self._free.put(place)


def gpus() -> list[str]:
    """The GPUs of this machine, as ``CUDA_VISIBLE_DEVICES`` names them; none where there is no driver."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return done.stdout.split() if done.returncode == 0 else []


def _train(folder: Path, overrides: list[str], places: Places, config: str = "configs/quickstart.py") -> dict[str, Any]:
    command = [sys.executable, "scripts/train.py", "--config", config]
    command += ["--set", *overrides, f"output_dir={folder}"]
    with places.taken() as environment:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "validation/bits_per_byte" in line][-1]
    _, _, machine = (folder / "train.log").read_text(encoding="utf-8").splitlines()[0].split(" ", 2)  # date, time
    found = {"bits_per_byte": last["validation/bits_per_byte"], "loss": last["validation/loss"], "on": machine}
    steps = [line for line in lines if "router/max_load" in line]
    late = [line for line in steps if line["step"] > steps[-1]["step"] // 4]
    if not late:
        return found
    worst = {name: max(line[metric] for line in late) for name, metric in BALANCE.items()}
    return found | {"max_load": quarters(folder, steps[-1]["step"])} | worst


def quarters(folder: Path, steps: int) -> float:
    """Of the later quarters of a run, each taken as a whole, the most that an expert of a layer got over the mean.

    A step of this size holds the texts of 16 rows, and its loads are as uneven as these.
    """
    lines = [json.loads(line) for line in (folder / "router_load.jsonl").read_text().splitlines()]
    most = 0.0
    for quarter in range(1, 4):
        first, last = quarter * steps // 4, (quarter + 1) * steps // 4
        loads = [line["load"] for line in lines if first < line["step"] <= last]
        for layer in loads[0] if loads else ():
            means = [statistics.mean(shares) for shares in zip(*(load[layer] for load in loads), strict=True)]
            most = max(most, max(means) * len(means))
    return most


def speed(chosen: list[str], jobs: int, more: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Random tokens through training steps of the large model, each variant in a process of its own."""
    del jobs
    places = Places(1)
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder, places.taken() as environment:
            output = Path(folder) / "out.json"
            command = [sys.executable, "scripts/benchmark.py", "train", "--only", "synthetic", "--steps", "8"]
            command += ["--output", str(output)]
            overrides = large(name, more)
            command += ["--set", *overrides] if overrides else []
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            found = json.loads(output.read_text())["results"]["synthetic"] if output.exists() else {}
            if done.returncode:
                found = {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
        kept = ("tokens_per_second", "peak_memory_gib", "first_step_seconds", "on", "error")
        yield name, {key: found[key] for key in kept if key in found}


WORDS = """the of and to in is that for it as was with be by on not he his but at are this have from or had an they
which one you were all her she there would their we him been has when who will no more if out so up said what its about
than into them can only other time new some could these two may first then do any like my now over such our man me even
most made after also did many off before must well back through years where much your way down should because long
each""".split()


def copy(chosen: list[str], jobs: int, more: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Texts of 80 random words, said four times, in rows of 64 tokens: with memory the repetitions can be known."""
    del chosen
    places = Places(jobs)
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for split, count in (("train", 4000), ("valid", 100)):
            draw = random.Random(split)
            texts = [" ".join(4 * draw.choices(WORDS, k=80)) for _ in range(count)]
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (Path(folder) / f"{split}.jsonl").write_text(lines)
        common = [
            *SMALL,
            f"data.train={folder}/train.jsonl",
            f"data.validation={folder}/valid.jsonl",
            "data.arrangement=contiguous",
            "data.sequence_length=64",
            "global_batch_size=32",
            "steps=1500",
            "evaluation.interval=1500",
            "checkpoint.interval=1500",
        ]
        runs = {
            f"memory of {length}": pool.submit(
                _train, Path(folder) / str(length), [*common, f"model.memory.length={length}", *more], places
            )
            for length in (0, 64, 128)
        }
        for name, run in runs.items():
            yield name, run.result()


def table(kept: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    rows = ["| setting | bits per byte (lowest to highest) | tokens/s | memory, GiB |", "|---|---|---:|---:|"]
    bits = kept.get("quality", {}).get("results", {})
    rates = kept.get("speed", {}).get("results", {})
    for name in names():
        b, r = bits.get(name, {}), rates.get(name, {})
        if not b and not r:
            continue
        rate = f"{r['tokens_per_second']:,}" if "tokens_per_second" in r else "-"
        memory = f"{r['peak_memory_gib']:.1f}" if "peak_memory_gib" in r else "-"
        rows.append(f"| {name} | {_bits(b)} | {rate} | {memory} |")
    mixed = kept.get("experts", {}).get("results", {})
    if mixed:
        rows += ["", "| experts | bits per byte (lowest to highest) | max/mean load (of one step) | dead | dropped |"]
        rows += ["|---|---|---:|---:|---:|"]
    for name in sorted(mixed, key=[*EXPERT_VARIANTS, *mixed].index):
        m = mixed[name]
        loads = "- | - | -"
        if "max_load" in m:
            loads = f"{m['max_load']:.2f} ({m['step_load']:.2f}) | {m['dead']:.0f} | {m['dropped']:.1%}"
        rows.append(f"| {name} | {_bits(m)} | {loads} |")
    copies = kept.get("copy", {}).get("results", {})
    if copies:
        rows += ["", "| copy | nats a token |", "|---|---:|"]
        rows += [f"| {name} | {result.get('loss', float('nan')):.2f} |" for name, result in copies.items()]
    return "\n".join(rows)


def _bits(result: dict[str, Any]) -> str:
    if "lowest" not in result:
        return "-"
    few = f", {result['seeds']} of {len(SEEDS)} seeds" if result.get("seeds", len(SEEDS)) < len(SEEDS) else ""
    return f"{result['bits_per_byte']:.3f} ({result['lowest']:.3f} to {result['highest']:.3f}{few})"


def check() -> list[TrainConfig]:
    """Every config that is measured; raises where one is refused."""
    return [
        *(load("configs/quickstart.py", small(name, [])) for name in [*EXPERT_VARIANTS, *names()]),
        *(load("configs/pretrain.py", large(name, [])) for name in names()),
    ]


if __name__ == "__main__":
    sys.exit(main())
