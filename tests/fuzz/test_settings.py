"""Overrides, sections and ``config.json``: accepted, or refused with one line."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest
from helpers.hf_models import SMALL
from helpers.hostile import DEEP, JSON_VALUES, TEXTS, accepts, files_like, is_one_line, json_bytes, mutated
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stellarbyte_jax.config import ByteConfig, ConfigError, TrainConfig, override
from stellarbyte_jax.config.files import setting_types
from stellarbyte_jax.hf.families import FAMILIES
from stellarbyte_jax.hf.rope import ROPE_NAMES, parse_rope
from stellarbyte_jax.hf.settings import parse_config, read_config
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes

RUN = TrainConfig(output_dir="runs/test", steps=1000)
NAMES = tuple(setting_types(TrainConfig))
VALUES = st.one_of(
    TEXTS,
    JSON_VALUES.map(json.dumps),
    st.sampled_from(
        ["none", "true", "1", "0", "1e400", "nan", "-inf", "[" * DEEP, "[1, " * DEEP, "9" * 5000, "[]", "a,b"]
    ),
    st.integers(min_value=-(10**30), max_value=10**30).map(str),
)
OVERRIDES = st.one_of(st.tuples(st.sampled_from(NAMES), VALUES).map("=".join), TEXTS)


@given(st.lists(OVERRIDES, min_size=1, max_size=3))
@example(["data.train=" + "[" * DEEP])
@example(["model.rope_theta=" + "9" * 400])
@example(["model.num_hidden_layers=" + str(2**63), "model.sink_tokens=1", "model.sliding_window=4"])
@example(["model.memory.length=[" + "1," * 5000 + "1]"])
@example(["data.train=" + "x" * 200_000 + "\n", "nothing=3"])
@example(["y" * 200_000 + "=3"])
def test_overrides(texts: list[str]) -> None:
    try:
        override(RUN, texts)
    except ConfigError as error:
        assert is_one_line(error), str(error)[:300]


@given(mutated(RUN.to_dict(), ("model", "data", "steps")))
def test_runs_as_they_are_stored(values: Any) -> None:
    accepts(lambda: TrainConfig.from_dict(values))


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **SMALL,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "torch_dtype": "float32",
}
FIELDS = tuple(dict.fromkeys([*ROPE_NAMES, *(n for f in FAMILIES.values() for n in (*f.defaults, *f.fixed))]))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@given(files_like(LLAMA, FIELDS))
@example(json_bytes(LLAMA | {"model_type": ["llama"]}))
@example(json_bytes(LLAMA | {"architectures": 3}))
@example(json_bytes(LLAMA | {"rope_theta": [1]}))
@example(json_bytes(LLAMA | {"rope_theta": 10**400}))
@example(json_bytes(LLAMA | {"num_hidden_layers": 2**63}))
@example(json_bytes(LLAMA | {"vocab_size": 10**400}))
@example(json_bytes(LLAMA | {"max_position_embeddings": 2**70}))
@example(json_bytes(LLAMA | {"hidden_act": {}}))
@example(json_bytes(LLAMA | {"hidden_act": "x" * 200_000}))
@example(json_bytes(LLAMA | {"model_type": "x" * 200_000}))
@example(json_bytes(LLAMA | {"rms_norm_eps": 10**400}))
@example(json_bytes(LLAMA | {"rope_scaling": {"rope_type": {"a": "x" * 200_000}}}))
@example(json_bytes(LLAMA | {"x" * 200_000 + "\n": 1}))
def test_config_json(directory: Path, content: bytes) -> None:
    (directory / "config.json").write_bytes(content)
    accepts(lambda: read_config(directory))


@given(st.sampled_from(FIELDS), JSON_VALUES, st.sampled_from(["llama", "mistral"]))
def test_every_field_of_config_json(name: str, value: Any, model_type: str) -> None:
    accepts(lambda: parse_config({"model_type": model_type, "hidden_size": 64, name: value}, "config.json"))


@given(st.dictionaries(st.sampled_from(ROPE_NAMES), JSON_VALUES | mutated(LLAMA["rope_scaling"], ("truncate", "type"))))
def test_rotary_settings(values: Any) -> None:
    accepts(lambda: parse_rope(values, 64, "config.json"))


SIZES = st.integers(1, 2**31 - 1) | st.sampled_from([1, 2, 4, 64, 2**31 - 1, 2**30, 2**20])


@settings(max_examples=settings().max_examples // 4)  # each traces the network
@given(
    vocab_size=SIZES, hidden_size=SIZES, intermediate_size=SIZES, head_dim=SIZES, num_hidden_layers=st.integers(1, 4096)
)
@example(
    vocab_size=2**31 - 1, hidden_size=2**31 - 1, intermediate_size=2**31 - 1, head_dim=2**31 - 2, num_hidden_layers=4096
)
def test_shapes_of_huge_models_cost_nothing(**sizes: int) -> None:
    """None is made: the shapes are compared with those of the files first."""

    def shapes() -> None:
        config = ByteConfig(num_attention_heads=2, **sizes)
        jax.tree.map(lambda leaf: leaf.shape, param_shapes(ByteTransformer(config)))

    accepts(shapes)
