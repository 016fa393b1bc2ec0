"""Every setting of a run, as frozen dataclasses that check themselves.

A run is a Python file with ``def config() -> TrainConfig``. :func:`load` reads it and applies ``a.b=c`` overrides.
``model.py`` holds the network's settings, ``layers.py`` what they say of one layer, ``data.py`` what is read,
``run.py`` all others. This package
imports neither jax nor the rest of the project, so it costs nothing to import.
"""

from stellarbyte_jax.config.data import ChatConfig, DataConfig
from stellarbyte_jax.config.files import beside, compose, load, override
from stellarbyte_jax.config.layers import LayerGroup, LayerSpec
from stellarbyte_jax.config.lora import LoRAConfig
from stellarbyte_jax.config.mesh import MeshConfig
from stellarbyte_jax.config.model import (
    AttentionImplementation,
    ByteConfig,
    CacheConfig,
    MemoryConfig,
    RopeScaling,
)
from stellarbyte_jax.config.moe import MoEConfig
from stellarbyte_jax.config.run import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    LossConfig,
    LossScaleConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from stellarbyte_jax.config.section import ConfigError

__all__ = [
    "AttentionImplementation",
    "ByteConfig",
    "CacheConfig",
    "ChatConfig",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "LayerGroup",
    "LayerSpec",
    "LoRAConfig",
    "LoggingConfig",
    "LossConfig",
    "LossScaleConfig",
    "MemoryConfig",
    "MeshConfig",
    "MoEConfig",
    "OptimizerConfig",
    "RopeScaling",
    "ScheduleConfig",
    "TrainConfig",
    "beside",
    "compose",
    "load",
    "override",
]
