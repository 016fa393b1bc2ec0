"""What a benchmark ran on, for its JSON: hardware, driver, versions and variables, without starting a device."""

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from typing import Any

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "liger-kernel",
    "triton",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
)
_VARIABLES = ("NCCL_", "XLA_", "CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "TORCH_NCCL_")


def facts(more: Mapping[str, str]) -> dict[str, Any]:
    """Python, cores, versions of the packages that are installed, GPUs with their driver, and variables that matter.

    Args:
      more: variables of the processes that measure, beside those of this one.
    """
    found, variables = gpus(), {**os.environ, **more}
    return {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        **({"gpus": [name for name, _ in found], "driver": found[0][1]} if found else {}),
        "environment": {name: variables[name] for name in sorted(variables) if name.startswith(_VARIABLES)},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def gpus() -> list[list[str]]:
    """Name and driver of each NVIDIA GPU of the machine; none where ``nvidia-smi`` is missing or fails."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [[part.strip() for part in line.split(",")] for line in lines if "," in line]
