"""Numbers about a run that are not the loss: perplexity, bits per byte, speed, utilisation, memory."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from stellarbyte_jax.config import ByteConfig

# Dense bfloat16 TFLOP/s from the vendors' data sheets, by a part of jax's device_kind.
_PEAK_TFLOPS = {
    "H100": 989.4,
    "H200": 989.4,
    "GH200": 989.4,
    "A100": 312.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "4090": 165.2,
}


def validation_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Turns sums over all validation targets into token-weighted means.

    ``loss`` is nats a token, ``perplexity`` its exponential, ``bits_per_byte`` the same information by UTF-8 byte of
    the targets' text, which does not depend on the tokenizer; ``accuracy`` the share of targets predicted first.

    Raises:
      ValueError: the sums hold no target token.
    """
    tokens = sums["tokens"]
    if tokens == 0:
        raise ValueError("the validation set holds no token to predict: its documents are empty or one token long")
    loss = sums["cross_entropy"] / tokens
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "accuracy": sums["correct"] / tokens}
    if sums.get("bytes"):
        result["bits_per_byte"] = sums["cross_entropy"] / math.log(2) / sums["bytes"]
    return result


@dataclass(frozen=True)
class FlopsPerToken:
    """Floating-point operations of a training step by token, forward and backward: two for a multiply-add.

    Attributes:
      causal: ``6 (parameters - embedding) + 6 L T N H``: causal attention counted by the half that is computed, and
        where there is a memory of M tokens, ``12 L M N H``; reading the memory's keys is not counted.
      full: the same with attention counted as if it were not causal, as in the PaLM paper (2022,
        https://arxiv.org/abs/2204.02311, appendix B).
    """

    causal: float
    full: float


def flops_per_token(config: ByteConfig, parameters: int, sequence_length: int) -> FlopsPerToken:
    """Counts the operations of a model with so many parameters; a tied table counts once, as the head.

    The head is computed for the padding of the vocabulary too.
    """
    matrices = parameters if config.tie_word_embeddings else parameters - config.padded_vocab_size * config.hidden_size
    width = config.num_attention_heads * config.head_size
    attention = 0.0
    for spec in config.layer_specs:
        keys = sequence_length if spec.window is None else min(2 * spec.window, sequence_length)
        if spec.recent:  # the same number of keys for every token of a segment
            keys = 2 * spec.memory_slots
        attention += 6.0 * keys * width
    return FlopsPerToken(6.0 * matrices + attention, 6.0 * matrices + 2 * attention)


def peak_flops() -> float | None:
    """Peak bfloat16 operations a second of the device in use, None where it is not known."""
    kind = jax.devices()[0].device_kind
    return next((1e12 * peak for name, peak in _PEAK_TFLOPS.items() if name in kind), None)


def speed_metrics(tokens: float, seconds: float, flops: FlopsPerToken) -> dict[str, float]:
    """Tokens a second and, where the device's peak is known, model FLOP utilisation by both conventions."""
    rate = tokens / seconds
    result = {"tokens_per_second": rate}
    peak = peak_flops()
    if peak is not None:
        result["mfu"] = rate * flops.causal / peak
        result["mfu_full_attention"] = rate * flops.full / peak
    return result


def memory_metrics() -> dict[str, float]:
    """Peak device memory in GiB, where the device tells."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"peak_memory_gib": stats["peak_bytes_in_use"] / 2**30} if "peak_bytes_in_use" in stats else {}


def count_parameters(params: Any) -> int:
    """Number of weights in a tree."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))
