"""The copy of its tokenizer that a run keeps: whole, so that a run chats and ends its texts as the original says."""

import json
from pathlib import Path

import jax
import pytest
from helpers.tiny_documents import save_byte_tokenizer

from stellarbyte_jax.checkpoint.weights import load_weights
from stellarbyte_jax.config import ByteConfig, DataConfig, ScheduleConfig, TrainConfig
from stellarbyte_jax.hf.directory import save_pretrained
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.tokenizer.codec import load_tokenizer
from stellarbyte_jax.tokenizer.directory import FILES
from stellarbyte_jax.tokenizer.special import stop_ids
from stellarbyte_jax.train.run import train


@pytest.fixture
def tokenizer(tmp_path):
    """A directory as transformers 5 saves it: the chat template and the ends of texts in files of their own."""
    path = Path(save_byte_tokenizer(tmp_path / "tokenizer"))
    config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    (path / "chat_template.jinja").write_text(config.pop("chat_template"), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
    return path


def test_a_run_keeps_the_whole_tokenizer(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a river runs past the old stone bridge"}\n' * 20)
    data = DataConfig(
        train=(str(tmp_path / "a.jsonl"),),
        tokenizer=str(tokenizer),
        sequence_length=16,
        workers=0,
        cache_dir=str(tmp_path / "cache"),
    )
    model = ByteConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        compute_dtype="float32",
    )
    run = tmp_path / "run"
    config = TrainConfig(
        output_dir=str(run),
        steps=1,
        global_batch_size=2,
        model=model,
        data=data,
        schedule=ScheduleConfig(warmup_steps=0),
    )
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
