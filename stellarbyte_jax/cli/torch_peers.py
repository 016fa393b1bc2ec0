"""The Llama of transformers on torch, beside which ``benchmark`` measures: on one device, and on several."""

import contextlib
import gc
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from stellarbyte_jax.cli.measurements import fastest, tell, timed
from stellarbyte_jax.command import imports
from stellarbyte_jax.config import ByteConfig, TrainConfig

_LLAMAS = ("huggingface", "huggingface_bfloat16", "huggingface_liger")
# Of what ``benchmark train`` measures of ours, the peers beside it, on random tokens; the fastest counts.
PEERS = dict.fromkeys(("synthetic", "real"), _LLAMAS)


def train_peer(config: TrainConfig, steps: int, model: Any) -> dict[str, Any]:
    """Speed of training a model of transformers on random tokens: compiled on a GPU, float32 weights under autocast.

    Weights in bfloat16 are trained as they are, without autocast and without float32 copies.
    """
    with imports():
        import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = _half(config, model, device)
    model = torch.compile(model.to(device), disable=device.type == "cpu")
    return measure_peer(config, steps, model, device, half)


def _half(config: TrainConfig, model: Any, device: Any) -> bool:
    """Whether products are made in bfloat16 by autocast: of float32 weights on a GPU."""
    with imports():
        import torch

    return device.type == "cuda" and config.model.compute_dtype == "bfloat16" and model.dtype == torch.float32


def measure_peer(
    config: TrainConfig,
    steps: int,
    model: Any,
    device: Any,
    half: bool,
    processes: int = 1,
    *,
    batches: Sequence[Mapping[str, Any]] | None = None,
    tokens: float | None = None,
) -> dict[str, Any]:
    """Speed of training those weights of a model that have gradients.

    Args:
      config: of the run.
      steps: of a repeat.
      model: on its device.
      device: of torch.
      half: products are made in bfloat16 by autocast.
      processes: that train it, each with its part of a batch's rows.
      batches: arguments of the model, on the device, taken in turn; None: random tokens.
      tokens: of a batch, on average, that count; None: every position.

    Returns:
      The rate, the peak of the GPU's memory, the loss of the last step and what it ran on; ``error`` instead, where
      that loss is not finite: such a run has not trained.
    """
    with imports():
        import numpy as np
        import torch
        import transformers

    on_gpu = device.type == "cuda"
    torch.set_float32_matmul_precision("high")
    learnt = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    length = config.data.sequence_length
    if batches is None:
        random = np.random.default_rng(int(os.environ.get("RANK", "0")))
        shape = (config.global_batch_size // processes, length)
        made = [torch.from_numpy(random.integers(0, config.model.vocab_size, shape)).to(device) for _ in range(4)]
        batches = [{"input_ids": ids, "labels": ids} for ids in made]
    taken = itertools.cycle(batches)
    loss: Any = None

    def run(count: int) -> None:
        nonlocal loss
        for _ in range(count):
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss = model(**next(taken)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learnt, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()

    tell("compiling the first step" if on_gpu else "the first step")
    start = time.perf_counter()
    run(1)
    first = time.perf_counter() - start
    tell(f"first step after {first:.1f} s; 10 steps to warm up")
    run(10)
    count = f"{processes} x " if processes > 1 else ""
    name = f"{torch.cuda.get_device_name()}, compiled" if on_gpu else f"cpu, {torch.get_num_threads()} threads"
    rates = timed(run, tokens or config.global_batch_size * length, steps)
    if not math.isfinite(last := loss.item()):
        return {"error": f"the loss is {last}"}
    memory = {"peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)} if on_gpu else {}
    return {
        **rates,
        **memory,
        "first_step_seconds": round(first, 1),
        "loss": last,
        **({} if processes == 1 else {"devices": processes}),
        "on": f"torch {torch.__version__}, transformers {transformers.__version__}, {count}{name}",
    }


def llama(c: ByteConfig) -> Any:
    """Settings of a Llama of transformers with this shape."""
    with imports():
        import transformers

    return transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.mlp_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.kv_heads,
        hidden_act=c.hidden_act,
        max_position_embeddings=c.max_position_embeddings,
        tie_word_embeddings=c.tie_word_embeddings,
        use_cache=False,
    )


def _huggingface(config: TrainConfig, steps: int) -> dict[str, Any]:
    with imports():
        import torch
        import transformers

    torch.manual_seed(0)
    return train_peer(config, steps, transformers.LlamaForCausalLM(llama(config.model)))


@contextlib.contextmanager
def _group(*, alone: bool = False) -> Iterator[tuple[Any, int]]:
    """The processes that ``workers.run_worker`` started: the device of this one, and how many there are.

    Args:
      alone: this process is a group of its own, whatever the variables of ``torch.distributed`` say.
    """
    with imports():
        import torch
        import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    device = torch.device(f"cuda:{0 if alone else os.environ['LOCAL_RANK']}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    members: dict[str, Any] = {}
    if alone:
        members = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None, **members)
    torch.manual_seed(0)
    try:
        yield device, dist.get_world_size()
    finally:
        dist.destroy_process_group()


def _data_parallel(config: TrainConfig, steps: int) -> dict[str, Any]:
    """Under DistributedDataParallel, float32 weights, compiled as a whole on GPUs."""
    with imports():
        import torch
        import transformers
        from torch.nn.parallel import DistributedDataParallel

    with _group() as (device, processes):
        model = transformers.LlamaForCausalLM(llama(config.model)).to(device)
        half = _half(config, model, device)
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
        compiled = torch.compile(parallel, disable=device.type == "cpu")
        return {**measure_peer(config, steps, compiled, device, half, processes), "weights": "float32"}


def _fully_sharded(config: TrainConfig, steps: int) -> dict[str, Any]:
    """Under FSDP2, all weights in the compute dtype."""
    with imports():
        import torch
        import transformers

    dtype = config.model.compute_dtype
    with _group() as (device, processes):
        with device:
            model: Any = transformers.AutoModelForCausalLM.from_config(llama(config.model), dtype=getattr(torch, dtype))
        _shard(config, model, device)
        return {**measure_peer(config, steps, model, device, False, processes), "weights": dtype}


def _shard(config: TrainConfig, model: Any, device: Any, **settings: Any) -> None:
    """Hands a Llama to FSDP2, each layer compiled and cut, with remat=full checkpointed.

    Args:
      config: of the run.
      model: on its device.
      device: of torch.
      settings: of ``fully_shard``.
    """
    with imports():
        import torch
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
        from torch.distributed.fsdp import fully_shard

    layers = model.model.layers
    for index, layer in enumerate(layers):
        if config.model.remat == "full":
            layer = checkpoint_wrapper(layer)
        # Compiled first: what gathers weights then stays outside of the compiled function.
        layers[index] = torch.compile(layer, disable=device.type == "cpu")
        fully_shard(layers[index], **settings)
    fully_shard(model, **settings)


def _with_copies(config: TrainConfig, steps: int, device: Any, prepare: Callable[[Any, Any], None]) -> dict[str, Any]:
    """On one device under FSDP2's mixed precision: copies in the compute dtype of float32 weights, which are trained.

    Args:
      config: of the run.
      steps: of a repeat.
      device: of torch, that of a group of one process.
      prepare: changes the model on its device, before FSDP2 has it.
    """
    with imports():
        import torch
        import transformers
        from torch.distributed.fsdp import MixedPrecisionPolicy

    torch.manual_seed(0)
    with device:
        model = transformers.LlamaForCausalLM(llama(config.model))
    prepare(model, device)
    dtype = config.model.compute_dtype
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)
    # The copies stay until the backward pass: on one device, making them again there saves no other's memory.
    _shard(config, model, device, mp_policy=policy, reshard_after_forward=False)
    return {**measure_peer(config, steps, model, device, False), "weights": f"float32, copies in {dtype}"}


def _compile_loss(model: Any, device: Any) -> None:
    with imports():
        import torch

    model.loss_function = torch.compile(model.loss_function, disable=device.type == "cpu")


def _mixed_precision(config: TrainConfig, steps: int) -> dict[str, Any]:
    """Each layer compiled, and the loss."""
    with _group(alone=True) as (device, _):
        return _with_copies(config, steps, device, _compile_loss)


def _fuse_loss(model: Any, device: Any) -> None:
    """Head and loss as one kernel of liger, which has logits of a part of the positions at a time."""
    del device
    with imports():
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearCrossEntropyLoss,
        )
        from torch.nn.functional import pad
        from transformers.modeling_outputs import CausalLMOutput

    fused = LigerFusedLinearCrossEntropyLoss()

    def forward(input_ids: Any, labels: Any) -> Any:
        hidden_BTD = model.model(input_ids=input_ids).last_hidden_state
        targets_BT = pad(labels, (0, 1), value=fused.ignore_index)[:, 1:]
        # An output of transformers: FSDP2 looks for tensors in what it returns.
        return CausalLMOutput(loss=fused(model.lm_head.weight, hidden_BTD.flatten(0, 1), targets_BT.flatten()))

    model.forward = forward  # inside of which FSDP2 has the head's weight whole


def _liger(config: TrainConfig, steps: int) -> dict[str, Any]:
    """With liger's loss, then with its norms, rotation and MLP too, which torch may fail to compile; the faster."""
    with _group(alone=True) as (device, _):
        tell("kernels of liger: the loss")
        found = [{**_with_copies(config, steps, device, _fuse_loss), "kernels": "loss"}]
        start_over(device)
        tell("kernels of liger: all")
        try:
            from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
                apply_liger_kernel_to_llama,
            )

            apply_liger_kernel_to_llama(cross_entropy=False, fused_linear_cross_entropy=False)  # of models made later
            found.append({**_with_copies(config, steps, device, _fuse_loss), "kernels": "all"})
        except Exception as error:  # of its names for parts of transformers, of compilers and kernels
            told = f"{type(error).__name__}: {str(error)[:300]}"
            tell(told)
            found.append({"error": told, "kernels": "all"})
    return {**fastest(found), "liger": metadata.version("liger-kernel")}


def start_over(device: Any) -> None:
    """Forgets compiled functions and what no longer has a name, so that the next model has the device for itself."""
    with imports():
        import torch

    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


WORKERS = {
    "huggingface": _huggingface,
    "huggingface_bfloat16": _mixed_precision,
    "huggingface_liger": _liger,
    "huggingface_ddp": _data_parallel,
    "huggingface_fsdp2": _fully_sharded,
}
