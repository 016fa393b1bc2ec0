"""The peers of ``benchmark attention``: torch's flexible attention, and its fused ones where order alone hides keys."""

from collections.abc import Callable
from typing import Any

from stellarbyte_jax.cli.attention_speed import CALLS, CASES, PEERS, Case, Result, documents, figures, firsts
from stellarbyte_jax.cli.layer_speed import timed
from stellarbyte_jax.command import imports
from stellarbyte_jax.config import TrainConfig


def _peer(name: str) -> Callable[[TrainConfig, int | None], Result]:
    def measure(config: TrainConfig, steps: int | None) -> Result:
        del config
        with imports():
            import torch

        case, calls = CASES[name], steps or CALLS
        torch.manual_seed(0)
        q, k, v, d = (
            torch.randn(case.rows, heads, case.length, case.size, device="cuda", dtype=torch.bfloat16)
            for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
        )
        for x in (q, k, v):
            x.requires_grad_()
        plain = case.document is None and case.window is None and case.softcap is None
        ways: dict[str, Callable[..., Any]] = dict(_fused(torch) if plain else {}, flex=_flexible(torch, case))
        found: Result = {}
        for way, attend in ways.items():

            def forward(count: int, attend: Callable[..., Any] = attend) -> None:
                with torch.no_grad():
                    for _ in range(count):
                        attend(q, k, v)
                torch.cuda.synchronize()

            def both(count: int, attend: Callable[..., Any] = attend) -> None:
                for _ in range(count):
                    torch.autograd.grad(attend(q, k, v), (q, k, v), d)
                torch.cuda.synchronize()

            try:
                for run in (forward, both):
                    run(3)
            except RuntimeError as error:
                found[way] = {"refused": str(error).splitlines()[0][:200]}
                continue
            found[way] = figures(case, timed(forward, calls), timed(both, calls), torch.cuda.get_device_name())
        return {**found, "on": f"torch {torch.__version__}, {torch.cuda.get_device_name()}"}

    return measure


def _fused(torch: Any) -> dict[str, Callable[..., Any]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def by(backend: Any) -> Callable[..., Any]:
        def attend(q: Any, k: Any, v: Any) -> Any:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return attend

    return {"cudnn": by(SDPBackend.CUDNN_ATTENTION), "flash": by(SDPBackend.FLASH_ATTENTION)}


def _flexible(torch: Any, case: Case) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def capped(score: Any, b: Any, h: Any, t: Any, s: Any) -> Any:
        del b, h, t, s
        return case.softcap * torch.tanh(score / case.softcap)

    blocks = create_block_mask(seen_by(torch, case, "cuda"), case.rows, None, case.length, case.length, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    score_mod = None if case.softcap is None else capped
    return lambda q, k, v: compiled(q, k, v, score_mod=score_mod, block_mask=blocks, enable_gqa=True)


def seen_by(torch: Any, case: Case, device: str) -> Callable[[Any, Any, Any, Any], Any]:
    """Whether query t of row b and head h sees key s."""
    ids = documents(case)
    documents_BS, firsts_BS = (torch.as_tensor(x, device=device) for x in (ids, firsts(ids)))

    def sees(b: Any, h: Any, t: Any, s: Any) -> Any:
        del h
        seen = s <= t
        if case.window is not None:
            seen = seen & ((t - s < case.window) | (s - firsts_BS[b, s] < case.sinks))
        return seen if case.document is None else seen & (documents_BS[b, t] == documents_BS[b, s])

    return sees


WORKERS = {peer: _peer(peer.removeprefix("torch_")) for peer in PEERS}
