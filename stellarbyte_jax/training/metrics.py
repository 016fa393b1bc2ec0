"""Numbers about a run that are not the loss: perplexity, bits per byte, speed, utilisation, memory."""

import math
from collections.abc import Mapping

import jax

from stellarbyte_jax.inspect.costs import FlopsPerToken

# Dense bfloat16 TFLOP/s from the vendors' data sheets, by a part of jax's device_kind.
PEAK_TFLOPS = {
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


def peak_flops() -> float | None:
    """Peak bfloat16 operations a second of the device in use, None where it is not known."""
    kind = jax.devices()[0].device_kind
    return next((1e12 * peak for name, peak in PEAK_TFLOPS.items() if name in kind), None)


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
