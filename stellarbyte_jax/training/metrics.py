"""Numbers about a run that are not the loss: perplexity, bits per byte, speed, utilisation, memory."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from stellarbyte_jax.inspect.costs import FlopsPerToken
from stellarbyte_jax.launch.hardware import hardware_of


def validation_metrics(sums: Mapping[str, Any]) -> dict[str, float]:
    """Turns sums over all validation targets into token-weighted means.

    ``loss`` is nats a token, ``perplexity`` its exponential, ``bits_per_byte`` the same information by UTF-8 byte of
    the targets' text, which does not depend on the tokenizer; ``accuracy`` the share of targets predicted first. Of
    conversations of several turns ``loss_reply_1`` and so on are those of the first reply and later ones.

    Raises:
      ValueError: the sums hold no target token.
    """
    tokens = float(sums["tokens"])
    if tokens == 0:
        raise ValueError("the validation set holds no token to predict: its documents are empty or one token long")
    loss = float(sums["cross_entropy"]) / tokens
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "accuracy": float(sums["correct"]) / tokens}
    if sums.get("bytes"):
        result["bits_per_byte"] = float(sums["cross_entropy"]) / math.log(2) / float(sums["bytes"])
    counts = sums.get("reply_tokens", ())
    if sum(count > 0 for count in counts) > 1:
        for number, (total, count) in enumerate(zip(sums["reply_losses"], counts, strict=True), 1):
            if count:
                result[f"loss_reply_{number}"] = float(total / count)
    return result


def peak_flops() -> float | None:
    """Peak bfloat16 operations a second of the device in use, None where it is not known."""
    known = hardware_of(jax.devices()[0].device_kind)
    return None if known is None else known.bfloat16_flops


def speed_metrics(tokens: float, seconds: float, flops: FlopsPerToken, devices: int = 1) -> dict[str, float]:
    """Tokens a second of all devices and, where their peak is known, model FLOP utilisation by both conventions."""
    rate = tokens / seconds
    result = {"tokens_per_second": rate}
    peak = peak_flops()
    if peak is not None:
        result["mfu"] = rate * flops.causal / (peak * devices)
        result["mfu_full_attention"] = rate * flops.full / (peak * devices)
    return result


def memory_metrics() -> dict[str, float]:
    """Peak memory in GiB of the device of this process that used most, where devices tell."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [of_device["peak_bytes_in_use"] for of_device in stats if "peak_bytes_in_use" in of_device]
    return {"peak_memory_gib": max(peaks) / 2**30} if peaks else {}
