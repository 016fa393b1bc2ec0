"""PEFT and the Trainer of transformers, beside which ``benchmark lora`` measures."""

import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stellarbyte_jax.cli.lora_speed import chats, padding, without_adapters
from stellarbyte_jax.cli.machine import gpus
from stellarbyte_jax.cli.measurements import REPEATS, summary, tell
from stellarbyte_jax.cli.torch_attention import (
    VARLEN,
    Inputs,
    end_to_end,
    fastest_kernel,
    masked,
    register,
    variable_lengths,
)
from stellarbyte_jax.cli.torch_peers import llama, measure_peer, start_over
from stellarbyte_jax.cli.workers import OUT_OF_MEMORY
from stellarbyte_jax.command import MendableError, imports
from stellarbyte_jax.config import LoRAConfig, TrainConfig

_MODULES = {
    **{name: (f"{name}_proj",) for name in ("q", "k", "v", "o", "down")},
    "gate_up": ("gate_proj", "up_proj"),
}
_OURS_ALONE = ("layers", "activation", "modules_to_save", "regularization")  # settings that the peer is not given
_WARM = 11  # steps of the Trainer before it is timed, as many as others have


def _device() -> Any:
    """The device of torch.

    Raises:
      MendableError: there is a GPU, and torch does not find it.
    """
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the Trainer would spread rows over all of them
    with imports():
        import torch

    if not torch.cuda.is_available() and gpus():
        raise MendableError(f"torch {torch.__version__} finds no GPU, and there is one: install torch with CUDA")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _peft(adapters: Literal["float32", "bfloat16"], on_chats: bool) -> Callable[[TrainConfig, int], dict[str, Any]]:
    def measure(config: TrainConfig, steps: int) -> dict[str, Any]:
        """Adapters on a frozen base in ``lora.base_dtype``, compiled; those in float32 under autocast."""
        device = _device()
        works = _on_chats(config, device) if on_chats else _on_random_tokens(config, device)
        return _measured(device, works, lambda work, again: _adapters(config, steps, device, adapters, work, again))

    return measure


def _measured(
    device: Any, works: Sequence["_Work"], measure: Callable[["_Work", bool], dict[str, Any]]
) -> dict[str, Any]:
    """Measures with the first attention that runs; where memory is short, with layers that are made anew backwards.

    Args:
      device: of torch.
      works: what the peer is given, by the attention that is preferred.
      measure: of one of these, and whether layers are made anew.
    """
    with imports():
        import torch

    left, checkpointing = list(works), False
    while True:
        work = left[0]
        try:
            return {**measure(work, checkpointing), "attention": work.name, "gradient_checkpointing": checkpointing}
        except torch.OutOfMemoryError as error:
            if checkpointing:
                return {"error": OUT_OF_MEMORY}
            told, checkpointing = str(error).partition(". ")[0], True
        except (RuntimeError, AssertionError, TypeError) as error:  # of compilers and kernels
            if len(left) == 1:
                raise
            told, left = f"{work.name}: {type(error).__name__}: {str(error)[:300]}", left[1:]
        tell(told)
        start_over(device)  # behind the handlers, whose tracebacks hold the tensors


def _adapters(
    config: TrainConfig, steps: int, device: Any, adapters: str, work: "_Work", checkpointing: bool
) -> dict[str, Any]:
    with imports():
        import peft
        import torch

    lora = config.model.lora
    model = peft.get_peft_model(
        _network(config, device, lora.base_dtype, work.implementation),
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.r,
            lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]  # a float is a number too
            use_rslora=lora.rslora,
            use_dora=lora.dora,
            lora_dropout=lora.dropout,
            target_modules=_modules(lora),
        ),
        autocast_adapter_dtype=adapters == "float32",
    ).train()
    network: Any = model.get_base_model()  # with adapters; what is round it only breaks the graph
    if checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    half = adapters == "float32" and lora.base_dtype == "bfloat16"
    compiled = torch.compile(network, disable=device.type == "cpu")
    with work.kernel():
        result = measure_peer(config, steps, compiled, device, half, batches=work.batches, tokens=work.tokens)
    learnt = [weight for weight in network.parameters() if weight.requires_grad]
    return {
        **result,
        **({} if work.tokens is None else padding(config, work.tokens)),
        "adapters": str(learnt[0].dtype).removeprefix("torch.") + (", autocast" if half else ""),
        "trained": sum(weight.numel() for weight in learnt),
        "peft": peft.__version__,
    }


def _modules(lora: LoRAConfig) -> list[str]:
    for name in _OURS_ALONE:
        if getattr(lora, name) != getattr(LoRAConfig(), name):
            raise MendableError(f"the peer does without model.lora.{name}: leave it out, or measure --no-peer")
    unknown = lora.targets - _MODULES.keys()
    if unknown:
        raise MendableError(f"the peer has no {', '.join(sorted(unknown))}: --set model.lora.target_modules=all-linear")
    return [module for target in sorted(lora.targets) for module in _MODULES[target]]


def _network(config: TrainConfig, device: Any, dtype: str, implementation: str) -> Any:
    with imports():
        import torch
        import transformers

    torch.manual_seed(0)
    with device:
        return transformers.AutoModelForCausalLM.from_config(
            llama(config.model), dtype=getattr(torch, dtype), attn_implementation=implementation
        )


@dataclass(frozen=True)
class _Work:
    """What a peer is given.

    Attributes:
      batches: arguments of the model, on the device; None: random tokens.
      tokens: of a batch, on average; None: all positions.
      implementation: of attention, as transformers calls it.
      name: of it, for the report.
      kernel: context inside which the model is compiled and runs.
    """

    batches: Sequence[Inputs] | None
    tokens: float | None
    implementation: str
    name: str
    kernel: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def _on_random_tokens(config: TrainConfig, device: Any) -> list[_Work]:
    name, kernel = fastest_kernel(config, device)
    preferred = [] if name is None else [_Work(None, None, "sdpa", f"sdpa, {name}", kernel)]
    return [*preferred, _Work(None, None, "sdpa", "sdpa, torch's choice")]


def _on_chats(config: TrainConfig, device: Any) -> list[_Work]:
    """Packed conversations, which do not see each other."""
    batches, tokens = chats(config)
    works = [_Work([masked(batch, device) for batch in batches], tokens, "sdpa", "sdpa, rows with a mask")]
    if (attend := variable_lengths(device)) is not None:
        register(attend, config.data.sequence_length)
        laid = [end_to_end(batch, config.data.max_documents_per_sequence, device) for batch in batches]
        works.insert(0, _Work(laid, tokens, VARLEN, "varlen flash, rows end to end"))
    return works


def _trainer(config: TrainConfig, steps: int) -> dict[str, Any]:
    """Full fine-tuning of the same network by the Trainer: float32 weights, bfloat16 autocast, compiled."""
    config, device = without_adapters(config), _device()
    works = _on_chats(config, device)
    return _measured(device, works, lambda work, again: _by_trainer(config, steps, device, work, again))


def _by_trainer(config: TrainConfig, steps: int, device: Any, work: _Work, checkpointing: bool) -> dict[str, Any]:
    with imports():
        import accelerate
        import torch
        import transformers
        from transformers.trainer_callback import PrinterCallback

    assert work.batches is not None and work.tokens is not None
    on_gpu = device.type == "cuda"
    torch.set_float32_matmul_precision("high")
    total = _WARM + REPEATS * steps
    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step = state.global_step
            if step == 1 or (step >= _WARM and (step - _WARM) % steps == 0):
                if on_gpu:
                    torch.cuda.synchronize()
                times.append(time.perf_counter())
                tell(f"step {step} of {total}")

    with tempfile.TemporaryDirectory() as directory:
        arguments = transformers.TrainingArguments(
            output_dir=directory,
            max_steps=total,
            per_device_train_batch_size=1,  # an item of the data is a batch
            bf16=on_gpu,
            torch_compile=on_gpu,
            optim="adamw_torch_fused",
            learning_rate=6e-4,
            adam_beta2=0.95,
            weight_decay=0.1,
            max_grad_norm=1.0,
            lr_scheduler_type="constant",
            gradient_checkpointing=checkpointing,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            use_cpu=not on_gpu,
        )
        trainer = transformers.Trainer(
            model=_network(config, device, "float32", work.implementation),
            args=arguments,
            train_dataset=list(itertools.islice(itertools.cycle(work.batches), total)),  # type: ignore[arg-type]
            data_collator=lambda items: items[0],
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        loss = trainer.train().training_loss
    first, *marks = times
    rates = [work.tokens * steps / (end - begin) for begin, end in itertools.pairwise(marks)]
    name = f"{torch.cuda.get_device_name()}, compiled" if on_gpu else f"cpu, {torch.get_num_threads()} threads"
    memory = {"peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)} if on_gpu else {}
    return {
        **summary(rates, steps),
        **memory,
        "first_step_seconds": round(first - start, 1),
        "mean_loss": loss,
        "on": f"torch {torch.__version__}, transformers {transformers.__version__}, {name}",
        **padding(config, work.tokens),
        "weights": "float32",
        "accelerate": accelerate.__version__,
    }


WORKERS = {
    "lora_peft": _peft("float32", False),
    "lora_peft_bfloat16": _peft("bfloat16", False),
    "lora_chats_peft": _peft("float32", True),
    "lora_chats_peft_bfloat16": _peft("bfloat16", True),
    "sft_chats_trainer": _trainer,
}
