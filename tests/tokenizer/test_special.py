"""Which ids begin and end a text, from the files of a directory."""

import json

import pytest
from helpers.tiny_documents import save_byte_tokenizer
from tokenizers import Tokenizer, models, processors

from stellarbyte_jax.tokenizer.codec import load_tokenizer
from stellarbyte_jax.tokenizer.special import adds_bos, special_ids, stop_ids

WORDS = {"a": 0, "<b>": 1, "<e>": 2, "<p>": 3}


@pytest.fixture
def words(tmp_path):
    """A directory of four words whose configuration names none of them."""
    Tokenizer(models.WordLevel(WORDS, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    return tmp_path


def _write(path, values):
    path.write_text(json.dumps(values))


def test_ids_that_end_a_text(words):
    assert stop_ids(words, None) == []
    assert stop_ids(words, 2) == [2]
    file = words / "generation_config.json"
    _write(file, {"eos_token_id": [9, 2]})
    assert stop_ids(words, 2) == [2, 9]
    assert stop_ids(words, None) == [9, 2]
    _write(file, {"eos_token_id": 8})
    assert stop_ids(words, 2) == [2, 8]
    _write(words / "config.json", {"eos_token_id": [7, 8], "pad_token_id": 5})
    assert stop_ids(words, 2) == [2, 8, 7]
    assert special_ids(words, 4)["eos_token_id"] == [8, 7] and special_ids(words, 4)["pad_token_id"] == 5
    file.unlink()
    assert stop_ids(words, 2) == [2, 7, 8]


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [1, true]}'])
def test_a_broken_generation_config_is_named(words, text):
    (words / "generation_config.json").write_text(text)
    for read in (lambda: stop_ids(words, 2), lambda: special_ids(words, 4)):
        with pytest.raises(ValueError, match=r"generation_config\.json"):
            read()


def test_the_configuration_goes_before_the_map(words):
    _write(words / "special_tokens_map.json", {"eos_token": "<p>", "pad_token": "<p>", "bos_token": "<b>"})
    _write(words / "tokenizer_config.json", {"eos_token": {"content": "<e>"}, "bos_token": None})
    expected = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    assert special_ids(words, 4) == expected
    tokenizer = load_tokenizer(words)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)
    _write(words / "generation_config.json", {"eos_token_id": [2, 0], "pad_token_id": None})
    assert special_ids(words, 4) == expected | {"eos_token_id": [2, 0]}


def test_the_library_alone_gives_no_ids(words):
    (words / "tokenizer_config.json").unlink()
    assert special_ids(words, 4) == {}


def test_a_tokenizer_of_another_model_is_refused(words):
    with pytest.raises(
        ValueError, match="has 4 tokens, the model's vocab_size is 3: this tokenizer belongs to another"
    ):
        special_ids(words, 3)
    Tokenizer(models.WordLevel({**WORDS, "far": 9}, unk_token="a")).save(str(words / "tokenizer.json"))
    with pytest.raises(ValueError, match="has 10 tokens"):  # the highest id needs a row
        special_ids(words, 9)
    _write(words / "tokenizer_config.json", {"eos_token": "<end>"})
    with pytest.raises(ValueError, match=r"eos_token is '<end>', which tokenizer\.json does not hold"):
        special_ids(words, 10)


def test_bos_comes_from_the_post_processor_and_a_configuration_that_differs_is_told(words, caplog):
    """As in transformers 5, whose tokens tests/tokenizer/test_codec.py compares."""
    assert not adds_bos(words, None)
    assert not adds_bos(words, 1)
    library = Tokenizer(models.WordLevel(WORDS, unk_token="a"))
    library.post_processor = processors.TemplateProcessing(single="<b> $A", special_tokens=[("<b>", 1)])
    library.save(str(words / "tokenizer.json"))
    assert adds_bos(words, 1)
    assert not adds_bos(words, 2)
    _write(words / "tokenizer_config.json", {"add_bos_token": True})
    assert adds_bos(words, 1)
    assert not caplog.messages
    _write(words / "tokenizer_config.json", {"add_bos_token": False})
    assert adds_bos(words, 1)
    (message,) = caplog.messages
    assert "add_bos_token is false, but tokenizer.json adds bos: that decides" in message
    assert not adds_bos(words, None)


def test_the_project_s_own_format(tmp_path):
    tokenizer = load_tokenizer(save_byte_tokenizer(tmp_path))
    assert adds_bos(tmp_path, tokenizer.bos_id)
    assert stop_ids(tmp_path, tokenizer.eos_id) == [tokenizer.eos_id]
