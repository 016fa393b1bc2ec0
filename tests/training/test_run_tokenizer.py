"""The copy of its tokenizer that a run keeps: whole, so that a run chats and ends its texts as the original says."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.tiny_documents import save_byte_tokenizer
from helpers.training import river_run

from stellarbyte_jax.checkpoint.bundle import load_bundle
from stellarbyte_jax.checkpoint.weights import load_weights, save_initial
from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.hf.directory import save_pretrained
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes
from stellarbyte_jax.tokenizer.codec import load_tokenizer
from stellarbyte_jax.tokenizer.directory import FILES, copy_tokenizer
from stellarbyte_jax.tokenizer.special import stop_ids
from stellarbyte_jax.training.run import train


@pytest.fixture
def tokenizer(tmp_path):
    """A directory as transformers 5 saves it: the chat template and the ends of texts in files of their own."""
    path = Path(save_byte_tokenizer(tmp_path / "tokenizer"))
    config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    (path / "chat_template.jinja").write_text(config.pop("chat_template"), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
    return path


MODEL = ByteConfig(
    vocab_size=300,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=16,
    compute_dtype="float32",
)


def test_a_run_from_weights_without_a_tokenizer_exports_their_ends_of_texts(tokenizer, tmp_path):
    """Which from-hf put into the run's folder of the tokenizer; also after the run was typed again."""
    (tokenizer / "generation_config.json").unlink()
    config = river_run(tmp_path, MODEL, tokenizer, steps=1, export_at_end=True)
    run = tmp_path / "run"
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), param_shapes(ByteTransformer(config.model)))
    (tmp_path / "config.json").write_text('{"eos_token_id": [4, 7], "pad_token_id": 9}')
    copy_tokenizer(tmp_path, run / "tokenizer")
    save_initial(run, config.model, params, str(run / "tokenizer"))
    for steps in (1, 2):
        with jax.numpy_dtype_promotion("standard"):
            assert train(dataclasses.replace(config, steps=steps)).exit_code == 0
        eos = load_tokenizer(run / "tokenizer").eos_id
        written = [json.loads((run / "hf" / file).read_text()) for file in ("config.json", "generation_config.json")]
        assert [w["eos_token_id"] for w in written] == [[eos, 4, 7]] * 2
        assert written[0]["pad_token_id"] == load_tokenizer(tokenizer).pad_id  # it names one itself
        assert load_bundle(run).stop_ids == load_bundle(run / "hf").stop_ids == [eos, 4, 7]


def test_a_run_keeps_the_whole_tokenizer(tokenizer, tmp_path):
    config = river_run(tmp_path, MODEL, tokenizer, steps=1)
    run = tmp_path / "run"
    with jax.numpy_dtype_promotion("standard"):  # optax mixes float and integer types inside
        assert train(config).exit_code == 0
    kept = run / "tokenizer"
    assert {p.name: p.read_bytes() for p in kept.iterdir()} == {p.name: p.read_bytes() for p in tokenizer.iterdir()}
    loaded = load_tokenizer(kept)
    assert loaded.chat_template is not None and loaded.chat_template == load_tokenizer(tokenizer).chat_template
    assert stop_ids(kept, loaded.eos_id) == [2, 4]

    stored, params = load_weights(run)
    save_pretrained(tmp_path / "hf", ByteTransformer(stored.model), params, tokenizer=kept)
    assert {p.name for p in kept.iterdir()} == {p.name for p in (tmp_path / "hf").iterdir()} & set(FILES)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == [2, 4]
