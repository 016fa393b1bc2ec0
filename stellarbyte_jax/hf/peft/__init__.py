"""Directories of PEFT, ``adapter_config.json`` beside ``adapter_model.safetensors``, read and written."""

from stellarbyte_jax.hf.peft.reading import base_directory, load_adapter, read_adapter
from stellarbyte_jax.hf.peft.settings import is_adapter
from stellarbyte_jax.hf.peft.writing import save_adapter

__all__ = ["base_directory", "is_adapter", "load_adapter", "read_adapter", "save_adapter"]
