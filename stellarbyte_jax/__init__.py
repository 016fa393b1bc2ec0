"""Pretrain, convert and run language models in JAX and Flax.

The public names below are imported when they are first used, so that importing the package starts no device.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stellarbyte_jax.config import ByteConfig
    from stellarbyte_jax.hf.directory import from_pretrained, save_pretrained
    from stellarbyte_jax.inference.api import generate
    from stellarbyte_jax.model.decoder import ByteTransformer

__version__ = "0.1.0"

__all__ = ["ByteConfig", "ByteTransformer", "from_pretrained", "generate", "save_pretrained"]

_HOME = {
    "ByteConfig": "stellarbyte_jax.config",
    "ByteTransformer": "stellarbyte_jax.model.decoder",
    "from_pretrained": "stellarbyte_jax.hf.directory",
    "generate": "stellarbyte_jax.inference.api",
    "save_pretrained": "stellarbyte_jax.hf.directory",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
