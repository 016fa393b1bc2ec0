"""The command line of ``benchmark``: what it measures, by name, and its options."""

import argparse
from collections.abc import Sequence

from stellarbyte_jax.cli.attention_speed import NAMES as OF_ATTENTION
from stellarbyte_jax.cli.attention_speed import PEERS as BESIDE_ATTENTION
from stellarbyte_jax.cli.attention_speed import SMALL as SMALL_ATTENTION
from stellarbyte_jax.cli.decode_speed import NAMES as OF_DECODING
from stellarbyte_jax.cli.decode_speed import SMALL as SMALL_DECODING
from stellarbyte_jax.cli.grouped_speed import ON_GPU as GROUPED
from stellarbyte_jax.cli.grouped_speed import SMALL as SMALL_GROUPED
from stellarbyte_jax.cli.layer_speed import NAMES as OF_LAYERS
from stellarbyte_jax.cli.layer_speed import OF_SHAPES
from stellarbyte_jax.cli.layer_speed import PEERS as BESIDE_LAYERS
from stellarbyte_jax.cli.layer_speed import SMALL as SMALL_LAYERS
from stellarbyte_jax.cli.lora_speed import NAMES as OF_LORA
from stellarbyte_jax.cli.loss_speed import NAMES as OF_LOSS
from stellarbyte_jax.cli.loss_speed import PEERS as BESIDE_LOSS
from stellarbyte_jax.cli.loss_speed import SMALL as SMALL_LOSS
from stellarbyte_jax.cli.mesh_speed import NAMES as ON_MESH
from stellarbyte_jax.cli.program import local_path, new_parser, positive
from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.config.section import ConfigError

NAMES = {
    "train": ["synthetic", "real", "huggingface", "huggingface_bfloat16", "huggingface_liger"],
    "mesh": list(ON_MESH),
    "data": ["jsonl", "shards"],
    "generate": [
        *(f"batch_{size}" for size in (1, 8, 32, 128)),
        *(f"{how}_batch_{size}" for how in ("apart", "kernel", "experts") for size in (1, 32)),
    ],
    "cache": ["float32", "bfloat16", "int8", "float8_e4m3fn"],
    "checkpoint": ["verified", "unverified"],
    "eval": ["eval", "eval_huggingface"],
    "moe": ["dropless", "capacity", "huggingface_moe", "huggingface_moe_bfloat16"],
    "moe_layer": [*OF_LAYERS, *BESIDE_LAYERS],
    "lora": list(OF_LORA),
    "grouped_matmul": list(GROUPED),
    "attention": [*OF_ATTENTION, *BESIDE_ATTENTION],
    "decode_attention": list(OF_DECODING),
    "cross_entropy": [*OF_LOSS, *BESIDE_LOSS],
}
SMALL_NAMES = {  # where there is no GPU
    "generate": ["small_batch_1", "small_batch_8", "small_experts"],
    "grouped_matmul": list(SMALL_GROUPED),
    "moe_layer": list(SMALL_LAYERS),
    "attention": list(SMALL_ATTENTION),
    "decode_attention": list(SMALL_DECODING),
    "cross_entropy": list(SMALL_LOSS),
}
SMALL = "quickstart"  # what is trained where there is no GPU
TRAINED = ("train", "moe", "mesh", "lora")  # those that measure training steps
_OF_THEIR_OWN = ("mesh", "grouped_matmul")  # models or shapes, and steps
_STEPS = 20


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options, checked together; of a worker they are what the command gave it.

    Args:
      arguments: of the command line; None: those of the process.

    Raises:
      ConfigError: they do not go together.
    """
    parser = new_parser(
        "benchmark",
        "Measure throughput in medians over repeats, each measurement in a process of its own. Until all is measured,\n"
        "FILE.part has what is; it stays where something fails or the command is killed.\n\n"
        "train       this project's training step on random and real batches, and the Llama of transformers in three\n"
        "            ways (extra torch; liger-kernel), of which the fastest counts\n"
        "mesh        training over all GPUs by each axis of a mesh, beside one GPU, and torch's FSDP2 and DDP\n"
        "data        batches from the files and from prepared shards; needs no device\n"
        "generate    128 prompt tokens and 256 new ones, models of 1.10B parameters and with experts, by batch\n"
        "cache       decoding over caches of each dtype, 25M parameters in float32\n"
        "checkpoint  seconds to save and restore a run, and for checksums alone\n"
        "eval        requests of lm-eval (extra eval), and its backend for transformers (extra torch, accelerate)\n"
        "moe         the training step with experts by dispatch, and the Qwen3-MoE of transformers in that shape\n"
        "lora        adapters on a model of 1.10B parameters, on random tokens and on packed conversations, and all\n"
        "            its weights, beside PEFT and the Trainer of transformers (extra torch; peft, accelerate)\n"
        "moe_layer   a layer with experts, its router included, forward and backward, and that of transformers\n"
        "grouped_matmul  products of experts as kernels for Hopper GPUs and as plain XLA, beside torch's (extra torch)"
        "\nattention   attention and its gradients by mask and implementation, beside torch's (extra torch)"
        "\ndecode_attention  attention of a token over a cache: bytes read a second, by rows, keys and dtype"
        "\ncross_entropy  the head and its loss with their gradients, beside torch's (extra torch; liger-kernel)",
        "train --no-peer",
        "mesh --only fsdp --only tensor --output two_rows.json",
        "data --set 'data.train=my_corpus/train/*.jsonl'",
        settings=TrainConfig,
    )
    parser.add_argument("what", choices=list(NAMES), nargs="?", default="train", help="default: %(default)s")
    parser.add_argument(
        "--config", metavar="FILE", help=f"default: pretrain, without a GPU {SMALL}; mesh has a model for each row"
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="section.name=value")
    parser.add_argument(
        "--steps", type=positive, metavar="N", help="steps of one repeat (default: 20; mesh: 5 to 20 by row)"
    )
    parser.add_argument("--no-peer", action="store_true", help="leave the peer out")
    known = sorted({name for names in (*NAMES.values(), *SMALL_NAMES.values()) for name in names})
    parser.add_argument(
        "--only",
        choices=known,
        action="append",
        default=[],
        metavar="NAME",
        help="this measurement; may be repeated: %(choices)s",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="SECONDS", help="kill a measurement that takes longer (default: none)"
    )
    parser.add_argument(
        "--profile",
        type=local_path,
        metavar="DIR",
        help="write a profile of three steps of each measurement of training below DIR, and tell the share of "
        "collectives; not of peers",
    )
    parser.add_argument(
        "--output", type=local_path, metavar="FILE", help="default: benchmarks/WHAT.json, without a GPU WHAT-cpu.json"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.worker:
        _check(options)
    options.steps = options.steps or (None if options.what in _OF_THEIR_OWN else _STEPS)
    return options


def _check(options: argparse.Namespace) -> None:
    """Raises ConfigError where options do not go together."""
    of_mesh = options.what == "mesh"
    known = [*NAMES[options.what], *SMALL_NAMES.get(options.what, ())]
    for name in options.only:
        if name not in known:
            raise ConfigError(f"--only {name}: benchmark {options.what} measures {', '.join(known)}, name one of them")
    if options.profile and options.what not in TRAINED:
        raise ConfigError(f"--profile is of training: benchmark {options.what} has no training steps, leave it out")
    if of_mesh and options.config:
        raise ConfigError("benchmark mesh has a model for each row: leave --config out; --set changes the models")
    own = {
        "grouped_matmul": ("config", "set", "steps"),
        "attention": ("config", "set"),
        "decode_attention": ("config", "set"),
        "cross_entropy": ("config", "set"),
    }
    if given := [name for name in own.get(options.what, ()) if getattr(options, name)]:
        raise ConfigError(f"--{given[0]}: benchmark {options.what} has shapes and calls of its own, leave it out")
    for setting in options.set if options.what == "moe_layer" else ():
        if setting.partition("=")[0].strip() in OF_SHAPES:
            raise ConfigError(f"--set {setting}: benchmark moe_layer has shapes of its own, leave it out")
    for setting in options.set if of_mesh else ():
        if setting.partition("=")[0].strip() == "global_batch_size" or setting.strip().startswith("mesh."):
            raise ConfigError(f"--set {setting}: each row of benchmark mesh says its own, leave it out")
