"""Attention of the peers on torch: the fastest kernel for whole rows, and one for packed conversations.

Suffixes: B rows, T positions, N query heads, K key/value heads, H head size, W tokens laid end to end.
"""

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

from stellarbyte_jax.cli.lora_speed import Batch
from stellarbyte_jax.cli.measurements import tell
from stellarbyte_jax.command import imports
from stellarbyte_jax.config import TrainConfig

VARLEN = "varlen"  # name under which transformers finds the kernel
_IGNORED = -100
Inputs = Mapping[str, Any]
# (q_WNH, k_WKH, v_WKH, begins, longest) -> [W, N, H]
Attend = Callable[[Any, Any, Any, Any, int], Any]


def masked(batch: Batch, device: Any) -> Inputs:
    """Rows with a mask bool [B, 1, T, T]; padding sees itself, so that no row of it is empty."""
    with imports():
        import torch

    segments_BT = torch.from_numpy(batch["segment_ids"]).to(device)
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    return {**_arrays(batch, device), "attention_mask": same_BTT.tril()[:, None]}


def end_to_end(batch: Batch, documents: int, device: Any) -> Inputs:
    """All rows as one, [1, W], with the places int32 where conversations and padding begin, and the end.

    There are as many places whatever a batch holds, so that it has one shape: the last ones are of nothing.

    Args:
      batch: of the loader.
      documents: a row has no more.
      device: of torch.
    """
    with imports():
        import numpy as np
        import torch

    segments_BT = batch["segment_ids"]
    new_BT = np.ones(segments_BT.shape, bool)
    new_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    places = np.full(segments_BT.shape[0] * (documents + 1) + 1, segments_BT.size, np.int32)
    found = np.flatnonzero(new_BT)
    places[: len(found)] = found
    rows = {name: array.reshape(1, -1) for name, array in _arrays(batch, device).items()}
    return {**rows, "cu_seq_lens_q": torch.from_numpy(places).to(device)}


def _arrays(batch: Batch, device: Any) -> dict[str, Any]:
    with imports():
        import numpy as np
        import torch

    made = {
        "input_ids": batch["tokens"],
        "position_ids": batch["positions"],
        "labels": np.where(batch["loss_mask"], batch["tokens"], _IGNORED),
    }
    return {name: torch.from_numpy(array.astype(np.int64)).to(device) for name, array in made.items()}


def register(attend: Attend, longest: int) -> None:
    """Makes transformers know the kernel as ``VARLEN``, for rows that are laid end to end.

    Args:
      attend: the kernel.
      longest: no conversation has more tokens.
    """
    with imports():
        import transformers

    def varlen(module: Any, query: Any, key: Any, value: Any, mask: Any, *, cu_seq_lens_q: Any, **_: Any) -> Any:
        # Rotated in float32 under autocast, where values are in half precision.
        q_WNH, k_WKH, v_WKH = (x[0].transpose(0, 1).to(value.dtype).contiguous() for x in (query, key, value))
        return attend(q_WNH, k_WKH, v_WKH, cu_seq_lens_q, longest)[None], None

    transformers.AttentionInterface.register(VARLEN, varlen)


def variable_lengths(device: Any) -> Attend | None:
    """The flash kernel of torch for sequences laid end to end; None where it has none, or one that gives other results.

    Its arguments differ from release to release, and whether it takes fewer heads of keys than of queries.
    """
    if device.type != "cuda":
        return None
    try:
        with imports():
            from torch.nn.attention import varlen
    except ImportError:
        tell("this torch has no attention for sequences of several lengths: a mask stands for it")
        return None
    varlen_attn = cast(Any, varlen.varlen_attn)
    known = inspect.signature(varlen_attn).parameters
    named: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    grouped = {**named, "enable_gqa": True} if "enable_gqa" in known else named

    def direct(q_WNH: Any, k_WKH: Any, v_WKH: Any, places: Any, longest: int) -> Any:
        return varlen_attn(q_WNH, k_WKH, v_WKH, places, places, longest, longest, **grouped)

    def repeated(q_WNH: Any, k_WKH: Any, v_WKH: Any, places: Any, longest: int) -> Any:
        times = q_WNH.shape[1] // k_WKH.shape[1]
        k_WNH, v_WNH = (x.repeat_interleave(times, 1) for x in (k_WKH, v_WKH))
        return varlen_attn(q_WNH, k_WNH, v_WNH, places, places, longest, longest, **named)

    for attend in (direct, repeated):
        if (problem := _problem(attend, device)) is None:
            return attend
        tell(f"varlen_attn, {attend.__name__}: {problem}")
    return None


def _problem(attend: Attend, device: Any) -> str | None:
    """What is wrong with a kernel, tried on a few tokens; None: nothing."""
    with imports():
        import torch

    torch.manual_seed(0)
    heads = (4, 2, 2)
    ours = [torch.randn(8, n, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for n in heads]
    theirs = [x.detach().float().requires_grad_() for x in ours]
    places = torch.tensor([0, 3, 8, 8], dtype=torch.int32, device=device)
    slope = torch.randn(8, 4, 64, device=device)
    try:
        found = attend(ours[0], ours[1], ours[2], places, 16)
        found.backward(slope.to(found.dtype))
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    expected = reference(theirs[0], theirs[1], theirs[2], places, 16)
    expected.backward(slope)
    pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]
    close = all(a is not None and torch.allclose(a.float(), b, rtol=0.05, atol=0.05) for a, b in pairs)
    return None if close else "other results than those of the formula"


def reference(q_WNH: Any, k_WKH: Any, v_WKH: Any, places: Any, longest: int) -> Any:
    """The same, sequence after sequence."""
    del longest
    with imports():
        import torch

    parts, times = [], q_WNH.shape[1] // k_WKH.shape[1]
    for begin, end in zip(places[:-1].tolist(), places[1:].tolist(), strict=True):
        if end > begin:
            q_NTH, k_KTH, v_KTH = (x[begin:end].transpose(0, 1) for x in (q_WNH, k_WKH, v_WKH))
            k_NTH, v_NTH = (x.repeat_interleave(times, 0) for x in (k_KTH, v_KTH))
            out_1NTH = torch.nn.functional.scaled_dot_product_attention(
                q_NTH[None], k_NTH[None], v_NTH[None], is_causal=True
            )
            parts.append(out_1NTH[0].transpose(0, 1))
    return torch.cat(parts)


def fastest_kernel(
    config: TrainConfig, device: Any
) -> tuple[str | None, Callable[[], contextlib.AbstractContextManager[Any]]]:
    """The fused kernel that does attention of whole rows fastest, and a context that prefers it.

    Each is tried forward and backward. None where none can be tried.
    """
    with imports():
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

    if device.type != "cuda":
        return None, contextlib.nullcontext
    c, rows, length = config.model, config.global_batch_size, config.data.sequence_length
    heads = (c.num_attention_heads, c.kv_heads, c.kv_heads)
    made = [
        torch.randn(rows, length, n, c.head_size, device=device, dtype=torch.bfloat16, requires_grad=True)
        for n in heads
    ]
    seconds = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            with sdpa_kernel(backend):
                seconds[backend] = _seconds(*made)
        except RuntimeError as error:
            tell(f"{backend.name}: {str(error).splitlines()[0][:200]}")
    if not seconds:
        return None, contextlib.nullcontext
    first, *rest = sorted(seconds, key=lambda backend: seconds[backend])
    order = [first, *rest, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    name = first.name.removesuffix("_ATTENTION").lower()
    return name, functools.partial(sdpa_kernel, order, set_priority=True)


def _seconds(q_BTNH: Any, k_BTKH: Any, v_BTKH: Any) -> float:
    with imports():
        import torch

    slope_BTNH = torch.randn_like(q_BTNH)

    def run() -> None:
        q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out.transpose(1, 2).backward(slope_BTNH)

    for _ in range(3):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        run()
    torch.cuda.synchronize()
    return time.perf_counter() - start
