"""Which ids begin and end a text, from the files of a directory."""

import json

import pytest
from helpers.tiny_documents import save_byte_tokenizer
from tokenizers import Tokenizer, models, processors

from stellarbyte_jax.tokenizer.codec import load_tokenizer
from stellarbyte_jax.tokenizer.special import adds_bos, kept_ids, special_ids, stop_ids

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
    assert special_ids(words, 9)["eos_token_id"] == [8, 7] and special_ids(words, 9)["pad_token_id"] == 5
    file.unlink()
    assert stop_ids(words, 2) == [2, 7, 8]


def test_ids_that_the_model_has_no_row_for_are_not_stated(words):
    _write(words / "generation_config.json", {"eos_token_id": [2, 99], "pad_token_id": -1, "bos_token_id": [7]})
    assert special_ids(words, 8) == {"eos_token_id": [2], "bos_token_id": [7]}
    _write(words / "tokenizer_config.json", {"pad_token": "<p>"})
    assert special_ids(words, 8)["pad_token_id"] == 3


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [1, true]}'])
def test_a_broken_generation_config_is_named(words, text):
    (words / "generation_config.json").write_text(text)
    for read in (lambda: stop_ids(words, 2), lambda: special_ids(words, 4)):
        with pytest.raises(ValueError, match=r"generation_config\.json"):
            read()


@pytest.mark.parametrize("config", [{}, {"added_tokens_decoder": {}}], ids=["map", "no map"])
def test_the_map_goes_before_the_configuration_that_lists_no_added_tokens(words, config):
    """As in transformers, with the configurations that it reads."""
    import transformers

    _write(words / "special_tokens_map.json", {"eos_token": "<p>", "pad_token": "<p>", "bos_token": None})
    _write(words / "tokenizer_config.json", {"eos_token": "<e>", "bos_token": "<b>", **config})
    peer = transformers.AutoTokenizer.from_pretrained(words)
    tokenizer = load_tokenizer(words)
    found = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert found == (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id)
    assert found == ((1, 2, None) if config else (None, 3, 3))
    expected = {f"{name}_token_id": i for name, i in zip(("bos", "eos", "pad"), found, strict=True) if i is not None}
    assert special_ids(words, 4) == expected
    _write(words / "generation_config.json", {"eos_token_id": [2, 0], "pad_token_id": None})
    assert special_ids(words, 4) == expected | {"eos_token_id": [2, 0]}


def test_a_token_may_be_an_object(words):
    """As early versions of transformers wrote it."""
    _write(words / "tokenizer_config.json", {"eos_token": {"content": "<e>"}, "bos_token": None})
    assert special_ids(words, 4) == {"eos_token_id": 2}


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
    assert not adds_bos(words, None, None)
    assert not adds_bos(words, 1, None)
    library = Tokenizer(models.WordLevel(WORDS, unk_token="a"))
    library.post_processor = processors.TemplateProcessing(single="<b> $A", special_tokens=[("<b>", 1)])
    library.save(str(words / "tokenizer.json"))
    assert adds_bos(words, 1, None)
    assert not adds_bos(words, 2, None)
    _write(words / "tokenizer_config.json", {"add_bos_token": True})
    assert adds_bos(words, 1, None)
    assert not caplog.messages
    _write(words / "tokenizer_config.json", {"add_bos_token": False})
    assert adds_bos(words, 1, None)
    (message,) = caplog.messages
    assert "add_bos_token is false, but tokenizer.json adds bos: that decides" in message
    assert not adds_bos(words, None, None)


@pytest.mark.parametrize("stated", [None, True, False])
@pytest.mark.parametrize("template", ["$A", "$A <e>", "<b> $A <e>", "<b> $A"])
def test_eos_after_a_text_is_not_a_matter_of_the_configuration(words, caplog, stated, template):
    """Nor is it in transformers 5; what is not followed is told."""
    import transformers

    library = Tokenizer(models.WordLevel(WORDS, unk_token="a"))
    library.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<b>", 1), ("<e>", 2)][: 1 + ("<e>" in template)]
    )
    library.save(str(words / "tokenizer.json"))
    config = {"bos_token": "<b>", "eos_token": "<e>"} | ({} if stated is None else {"add_eos_token": stated})
    _write(words / "tokenizer_config.json", config)
    peer = transformers.AutoTokenizer.from_pretrained(words)
    adds = peer("a").input_ids[-1] == 2
    assert adds == ("<e>" in template)
    assert adds_bos(words, 1, 2) == (peer("a").input_ids[0] == 1)
    said = [f"add_eos_token is {str(stated).lower()}, but tokenizer.json {'adds' if adds else 'does not add'} eos"]
    said = said if stated not in (None, adds) else []
    said += ["tokenizer.json adds eos after a text"] if adds else []
    assert len(caplog.messages) == len(said)
    assert all(words in message for words, message in zip(said, caplog.messages, strict=True))


def test_padding_that_the_library_asks_for_is_no_beginning(words):
    library = Tokenizer(models.WordLevel(WORDS, unk_token="a"))
    library.post_processor = processors.TemplateProcessing(single="<b> $A", special_tokens=[("<b>", 1)])
    library.enable_padding(direction="left", length=8, pad_id=3, pad_token="<p>")
    library.save(str(words / "tokenizer.json"))
    assert adds_bos(words, 1, 2) and not adds_bos(words, 3, None)


def test_an_eos_that_a_short_library_cuts_off_is_told(words, caplog):
    library = Tokenizer(models.WordLevel(WORDS, unk_token="a"))
    library.post_processor = processors.TemplateProcessing(single="<b> $A <e>", special_tokens=[("<b>", 1), ("<e>", 2)])
    library.enable_truncation(2)
    library.save(str(words / "tokenizer.json"))
    assert adds_bos(words, 1, 2) and "adds eos after a text" in caplog.text


def test_an_eos_that_stands_for_unknown_text_is_no_end(words, caplog):
    library = Tokenizer(models.WordLevel({"<b>": 0, "<e>": 1}, unk_token="<e>"))
    library.post_processor = processors.TemplateProcessing(single="<b> $A", special_tokens=[("<b>", 0)])
    library.save(str(words / "tokenizer.json"))
    assert adds_bos(words, 0, 1) and not caplog.messages


def test_ends_that_another_tokenizer_keeps_have_rows_and_are_not_its_own(words):
    before = words / "before"
    before.mkdir()
    _write(before / "config.json", {"eos_token_id": [2, -1]})
    assert kept_ids(before, words, 4) == {"eos_token_id": 2}
    _write(words / "tokenizer_config.json", {"eos_token": "<e>"})
    assert kept_ids(before, words, 4) == {}


def test_one_token_that_begins_and_ends_texts_is_told_apart(words, caplog):
    library = Tokenizer(models.WordLevel(WORDS, unk_token="a"))
    library.post_processor = processors.TemplateProcessing(single="<b> $A", special_tokens=[("<b>", 1)])
    library.save(str(words / "tokenizer.json"))
    assert adds_bos(words, 1, 1) and not caplog.messages


def test_the_project_s_own_format(tmp_path):
    tokenizer = load_tokenizer(save_byte_tokenizer(tmp_path))
    assert adds_bos(tmp_path, tokenizer.bos_id, tokenizer.eos_id)
    assert stop_ids(tmp_path, tokenizer.eos_id) == [tokenizer.eos_id]
