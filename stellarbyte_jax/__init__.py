"""Pretrain, convert and run language models in JAX and Flax.

The public names below are imported when they are first used, so that importing the package starts no device.
"""

import importlib

TYPE_CHECKING = False  # typing takes long to import, and Ctrl-C in it would show where it was
if TYPE_CHECKING:
    from stellarbyte_jax.checkpoint.bundle import load_bundle as load_run
    from stellarbyte_jax.config import ByteConfig, TrainConfig
    from stellarbyte_jax.hf.directory import from_pretrained, save_pretrained
    from stellarbyte_jax.inference.api import generate
    from stellarbyte_jax.inference.bank import AdapterBank
    from stellarbyte_jax.model.decoder import ByteTransformer
    from stellarbyte_jax.model.placement import place_weights
    from stellarbyte_jax.sharding import make_mesh
    from stellarbyte_jax.training.run import train

__version__ = "0.1.0"

__all__ = [
    "AdapterBank",
    "ByteConfig",
    "ByteTransformer",
    "TrainConfig",
    "from_pretrained",
    "generate",
    "load_run",
    "make_mesh",
    "place_weights",
    "save_pretrained",
    "train",
]

_HOME = {
    "AdapterBank": ("stellarbyte_jax.inference.bank", "AdapterBank"),
    "ByteConfig": ("stellarbyte_jax.config", "ByteConfig"),
    "ByteTransformer": ("stellarbyte_jax.model.decoder", "ByteTransformer"),
    "TrainConfig": ("stellarbyte_jax.config", "TrainConfig"),
    "from_pretrained": ("stellarbyte_jax.hf.directory", "from_pretrained"),
    "generate": ("stellarbyte_jax.inference.api", "generate"),
    "load_run": ("stellarbyte_jax.checkpoint.bundle", "load_bundle"),
    "make_mesh": ("stellarbyte_jax.sharding", "make_mesh"),
    "place_weights": ("stellarbyte_jax.model.placement", "place_weights"),
    "save_pretrained": ("stellarbyte_jax.hf.directory", "save_pretrained"),
    "train": ("stellarbyte_jax.training.run", "train"),
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
