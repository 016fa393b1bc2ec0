"""The peer of ``benchmark moe_layer``: the layer of Qwen3-MoE in transformers, compiled, with grouped products."""

from collections.abc import Callable
from typing import Any

from stellarbyte_jax.cli.layer_speed import PEERS, SHAPES, Result, figures, timed
from stellarbyte_jax.command import imports
from stellarbyte_jax.config import TrainConfig


def _peer(name: str) -> Callable[[TrainConfig, int], Result]:
    def measure(config: TrainConfig, steps: int) -> Result:
        with imports():
            import torch
            import transformers
            from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        shape, on_gpu = SHAPES[name], torch.cuda.is_available()
        device, kind = ("cuda", torch.cuda.get_device_name()) if on_gpu else ("cpu", "cpu")
        make: Any = transformers.Qwen3MoeConfig
        settings = make(
            hidden_size=shape.hidden,
            num_experts=shape.experts,
            num_experts_per_tok=shape.choices,
            moe_intermediate_size=shape.inside,
            hidden_act=config.model.hidden_act,
            norm_topk_prob=config.model.moe.norm_topk_prob,
        )
        experts = "grouped_mm" if on_gpu else "eager"
        settings._experts_implementation = experts
        torch.manual_seed(0)
        layer: Any = Qwen3MoeSparseMoeBlock(settings).to(device, torch.bfloat16)
        for weight in layer.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        x, d = (torch.randn(1, shape.tokens, shape.hidden, device=device, dtype=torch.bfloat16) for _ in range(2))
        x.requires_grad_()
        compiled: Any = torch.compile(layer) if on_gpu else layer

        def forward(calls: int) -> None:
            for _ in range(calls):
                compiled(x)
            if on_gpu:
                torch.cuda.synchronize()

        def both(calls: int) -> None:
            for _ in range(calls):
                layer.zero_grad(set_to_none=True)
                x.grad = None
                compiled(x).backward(d)
            if on_gpu:
                torch.cuda.synchronize()

        for run in (forward, both):
            run(3)
        told = figures(shape, timed(forward, steps), timed(both, steps), kind)
        return {**told, "experts": experts, "on": f"torch {torch.__version__}, {kind}"}

    return measure


WORKERS = {peer: _peer(peer.removeprefix("huggingface_")) for peer in PEERS}
