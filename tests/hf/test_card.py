"""The model card of an export, read with the Hub's own library; its commands run as they stand there."""

import builtins
import dataclasses
import re

import jax
import numpy as np
import pytest
import yaml
from helpers.hf_models import save_words
from helpers.training import MODEL
from helpers.variants import init
from huggingface_hub import ModelCard

from stellarbyte_jax.hf.card import TrainingFacts, model_card
from stellarbyte_jax.hf.directory import save_pretrained
from stellarbyte_jax.model.decoder import ByteTransformer

CONFIG = dataclasses.replace(MODEL, num_key_value_heads=2, max_position_embeddings=2048)
FACTS = TrainingFacts(steps=1500, tokens=12_288_000, optimizer="muon", validation_loss=3.14159)


def card(**changes):
    settings = {"architecture": "LlamaForCausalLM", "parameters": 12345, "dtype": "bfloat16", "has_tokenizer": True}
    return model_card(CONFIG, **(settings | changes))


def rows(text):
    return dict(re.findall(r"^\| (.+?) \| (.+?) \|$", text, re.M))


def test_front_matter_says_what_is_known_and_no_more():
    read = ModelCard(card())
    assert read.data.to_dict() == {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert yaml.safe_load(card().split("---")[1]) == read.data.to_dict()
    assert ModelCard(card(own_code=True)).data.tags == ["custom_code"]


def test_what_the_model_is():
    found = rows(card())
    assert found["architecture"] == "LlamaForCausalLM" and found["parameters"] == "12,345 (bfloat16)"
    assert found["layers"] == str(CONFIG.num_hidden_layers) and found["context length"] == "2,048 tokens"
    assert found["attention heads"] == f"{CONFIG.num_attention_heads}, 2 of keys and values"
    assert found["vocabulary"] == f"{CONFIG.vocab_size} tokens"


def test_experts_are_told_where_there_are_any():
    assert "experts" not in rows(card())
    moe = {"num_experts": 8, "intermediate_size": 1024, "mlp_only_layers": (0,)}
    config = dataclasses.replace(CONFIG, num_hidden_layers=4, moe=moe)
    settings = {"architecture": "X", "parameters": 1, "dtype": "float32", "has_tokenizer": True}
    told = "2 of 8 for each token in 3 layers, 1,024 channels each"
    assert rows(model_card(config, **settings))["experts"] == told
    shared = dataclasses.replace(config, moe=moe | {"n_shared_experts": 1})
    assert rows(model_card(shared, **settings))["experts"] == told.replace(" for", " and 1 shared for")


def test_what_a_model_with_experts_is():
    moe = {"num_experts": 8, "intermediate_size": 24}
    settings = {"architecture": "X", "parameters": 100_000, "dtype": "bfloat16", "has_tokenizer": False}
    found = rows(model_card(dataclasses.replace(CONFIG, moe={**moe, "n_shared_experts": 1}), **settings))
    active = 100_000 - CONFIG.num_hidden_layers * 6 * 3 * CONFIG.hidden_size * 24
    assert found["parameters"] == f"100,000 (bfloat16), {active:,} active"
    assert "feed-forward size" not in found
    some = rows(model_card(dataclasses.replace(CONFIG, moe={**moe, "decoder_sparse_step": 2}), **settings))
    assert some["feed-forward size"] == f"{CONFIG.mlp_size}" == rows(card())["feed-forward size"]


def test_training_is_told_where_it_is_known():
    found = rows(card(training=FACTS))
    assert (found["optimizer"], found["steps"]) == ("muon", "1,500")
    assert found["tokens"] == "12,288,000 (padding included)" and found["validation loss"] == "3.1416 nats a token"
    assert "validation loss" not in card(training=dataclasses.replace(FACTS, validation_loss=None))
    zero = dataclasses.replace(FACTS, validation_loss=0.0)
    assert rows(card(training=zero))["validation loss"] == "0.0000 nats a token"
    assert "texts" not in found
    plain = rows(card(training=dataclasses.replace(FACTS, plain_text=True)))
    assert plain["texts"].startswith("plain text, no conversations")
    assert "Training" not in card() and "tokens" not in rows(card())


def test_a_tokenizer_is_loaded_where_there_is_one():
    assert "AutoTokenizer" in card() and "AutoTokenizer" not in card(has_tokenizer=False)


@pytest.fixture(params=[False, True], ids=["llama", "own code"])
def saved(request, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model = ByteTransformer(dataclasses.replace(MODEL, parallel_residual=request.param))
    params = jax.device_get(init(model))
    save_pretrained(tmp_path / "hf", model, params, training=FACTS)
    return model, params, tmp_path / "hf"


def test_an_export_has_a_card_with_its_own_numbers(saved):
    _, params, target = saved
    text = (target / "README.md").read_text(encoding="utf-8")
    total = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    assert rows(text)["parameters"] == f"{total:,} (float32)" and rows(text)["steps"] == "1,500"
    assert "AutoTokenizer" not in text


def test_its_commands_work(saved):
    model, params, target = saved
    text = (target / "README.md").read_text(encoding="utf-8")
    hf, ours = (
        code.replace("path/to/this/directory", str(target)) for code in re.findall(r"```python\n(.*?)```", text, re.S)
    )
    names = {}
    exec(ours, names)
    jax.tree.map(np.testing.assert_array_equal, names["params"], params)
    pytest.importorskip("torch")
    exec(hf, names)
    assert ("trust_remote_code=True" in hf) == model.config.parallel_residual
    assert sum(p.numel() for p in names["model"].parameters()) == sum(map(np.size, jax.tree.leaves(params)))


def test_its_commands_ask_nothing_on_the_terminal(tmp_path, monkeypatch):
    """AutoTokenizer reads the config of the model too, and that names a modelling file."""
    pytest.importorskip("torch")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model = ByteTransformer(dataclasses.replace(MODEL, parallel_residual=True))
    words = save_words(tmp_path / "words", ["a", "b"])
    save_pretrained(tmp_path / "hf", model, jax.device_get(init(model)), tokenizer=words)
    text = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.S)[0].replace("path/to/this/directory", str(tmp_path / "hf"))
    asked, names = [], {}
    monkeypatch.setattr(builtins, "input", lambda prompt="": asked.append(prompt) or "n")
    exec(code, names)
    assert not asked and names["tokenizer"]("b a").input_ids == [0]


def test_a_card_is_replaced_as_the_other_files_are(saved):
    model, params, target = saved
    (target / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        save_pretrained(target, model, params)
    assert (target / "README.md").read_text() == "mine"
    save_pretrained(target, model, params, overwrite=True)
    assert (
        "Training" not in (target / "README.md").read_text()
        and ("StellarByte" if model.config.parallel_residual else "Llama") + "ForCausalLM"
        in (target / "README.md").read_text()
    )
