"""Files of a tokenizer directory: what is read, what is copied, and one line for each fault."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from helpers.hf_models import save_words
from helpers.tiny_documents import save_byte_tokenizer
from packaging.version import Version

from stellarbyte_jax.tokenizer import directory
from stellarbyte_jax.tokenizer.codec import load_tokenizer
from stellarbyte_jax.tokenizer.directory import TokenizerDirectory, copy_tokenizer

COMMITTED = Path(__file__).resolve().parents[2] / "tokenizer"


def _copy(tmp_path, **config):
    shutil.copytree(COMMITTED, tmp_path / "t")
    file = tmp_path / "t" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **config}), encoding="utf-8")
    return tmp_path / "t"


def test_separate_and_named_templates(tmp_path):
    directory = _copy(
        tmp_path, chat_template=[{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    )
    assert load_tokenizer(directory).chat_template == "D"
    (directory / "chat_template.jinja").write_text("S", encoding="utf-8")
    assert load_tokenizer(directory).chat_template == "S"


def test_unreadable_directories(tmp_path):
    with pytest.raises(ValueError, match="does not exist: give a directory"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json: only"):
        load_tokenizer(tmp_path)
    inside = tmp_path / "tokenizer"
    shutil.copytree(COMMITTED, inside)
    with pytest.raises(ValueError, match=rf"holds no tokenizer\.json, but {inside} does: give that directory$"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer that"):
        load_tokenizer(tmp_path)
    shutil.copy(COMMITTED / "tokenizer.json", tmp_path)
    with pytest.raises(ValueError, match=r"holds no tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(b'"\xff"')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json must hold a JSON object, got list"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": 5}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: bos_token must be a token's spelling, got 5"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8 text"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"pad_token is '<pad>', which tokenizer\.json does not hold"):
        load_tokenizer(_copy(tmp_path, pad_token="<pad>", added_tokens_decoder={}))  # so that the map does not count


@pytest.mark.parametrize("missing", ["tokenizer.json", "tokenizer_config.json"])
def test_half_a_tokenizer_is_told_from_a_whole_one(tmp_path, missing):
    save_byte_tokenizer(tmp_path)
    found = TokenizerDirectory(tmp_path)
    assert found.has_library and found.is_complete
    (tmp_path / missing).unlink()
    assert found.has_library == (missing != "tokenizer.json")
    assert not found.is_complete


def test_a_copy_has_every_file_of_a_tokenizer_and_nothing_else(tmp_path):
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    source.mkdir()
    assert copy_tokenizer(source, target) == [] and not target.exists()
    for name in (*directory.FILES, "model.safetensors", "config.json"):
        (source / name).write_text(json.dumps({"name": name}))
    assert copy_tokenizer(source, target) == list(directory.FILES)
    assert {p.name: p.read_text() for p in target.iterdir()} == {
        name: json.dumps({"name": name}) for name in directory.FILES
    }
    known = {
        "chat_template.jinja",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "tekken.json",
    }
    assert known < set(directory.FILES)


def test_a_copy_has_every_chat_template(tmp_path):
    """Those that transformers 5 writes into a folder beside the first one."""
    import transformers

    source, target = Path(save_byte_tokenizer(tmp_path / "source")), tmp_path / "target"
    peer = transformers.AutoTokenizer.from_pretrained(source)
    peer.chat_template = {"default": "a", "tool_use": "b"}
    peer.save_pretrained(source)
    (target / "additional_chat_templates").mkdir(parents=True)
    (target / "additional_chat_templates" / "earlier.jinja").write_text("c")
    for place in (target, tmp_path / "new"):
        assert "additional_chat_templates/tool_use.jinja" in copy_tokenizer(source, place)
        assert transformers.AutoTokenizer.from_pretrained(place).chat_template == peer.chat_template
    assert load_tokenizer(target).chat_template == "a"


def test_a_copy_holds_no_file_of_an_earlier_tokenizer(tmp_path):
    source = save_byte_tokenizer(tmp_path / "source")
    target = tmp_path / "target"
    target.mkdir()
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "notes.txt"):
        (target / name).write_text("earlier")
    copied = copy_tokenizer(source, target)
    assert {p.name for p in target.iterdir()} == {*copied, "notes.txt"}
    assert "chat_template.jinja" not in copied


def test_a_directory_is_the_copy_of_itself(tmp_path):
    save_byte_tokenizer(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(copy_tokenizer(tmp_path, tmp_path / ".." / tmp_path.name)) == set(before)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_copy_knows_the_ends_of_a_text_that_the_models_settings_name(tmp_path):
    """Which stay behind; a generation config of the source's own keeps what else it says."""
    source = Path(save_byte_tokenizer(tmp_path / "source"))
    (source / "config.json").write_text(json.dumps({"eos_token_id": [2, 7], "bos_token_id": 1, "hidden_size": 8}))
    copied = copy_tokenizer(source, tmp_path / "copy")
    assert "generation_config.json" in copied and not (tmp_path / "copy" / "config.json").exists()
    assert TokenizerDirectory(tmp_path / "copy").generation_ids() == {"eos_token_id": [2, 7], "bos_token_id": 1}
    (source / "generation_config.json").write_text('{"eos_token_id": 9, "top_k": 3}')
    copy_tokenizer(source, tmp_path / "copy")
    written = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    assert written == {"eos_token_id": [9, 2, 7], "bos_token_id": 1, "top_k": 3}
    (source / "config.json").unlink()
    copy_tokenizer(source, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "generation_config.json").read_text()) == {"eos_token_id": 9, "top_k": 3}


def test_a_copy_knows_those_ends_without_any_file_of_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": [2, 7], "bos_token_id": null}')
    assert copy_tokenizer(tmp_path, tmp_path / "copy") == ["generation_config.json"]
    assert json.loads((tmp_path / "copy" / "generation_config.json").read_text()) == {"eos_token_id": [2, 7]}
    copy_tokenizer(tmp_path, tmp_path / "copy", {"eos_token_id": 3, "pad_token_id": 1})
    written = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    assert written == {"eos_token_id": 3, "pad_token_id": 1}


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_that_other_files_add_are_those_of_transformers(tmp_path, file):
    import transformers

    directory = Path(save_byte_tokenizer(tmp_path / "t"))
    size = load_tokenizer(directory).vocab_size
    before = load_tokenizer(directory).fingerprint
    if file == "added_tokens.json":
        (directory / file).write_text(json.dumps({"<|a|>": size, "<|b|>": size + 1}))
    else:
        config = json.loads((directory / file).read_text())
        config["added_tokens_decoder"] = {
            str(size): {"content": "<|a|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False},
            str(size + 1): {"content": "<|b|>", "special": False, "rstrip": False, "normalized": False},
        }
        (directory / file).write_text(json.dumps(config))
    ours, peer = load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    assert ours.vocab_size == len(peer) == size + 2
    text = "x<|a|>y <|b|>"
    assert ours.encode(text, parse_special=True) == peer(text, add_special_tokens=False).input_ids
    assert (size in ours.encode("<|a|>")) == (file == "added_tokens.json")  # a document spells a special one as text
    for skip in (True, False):
        assert ours.decode([size, size + 1], skip_special_tokens=skip) == peer.decode(
            [size, size + 1], skip_special_tokens=skip
        )
    assert ours.fingerprint != before
    assert pickle.loads(pickle.dumps(ours)).encode(text) == ours.encode(text)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"<|a|>": 7}, "the added token '<|a|>' has id 7, but the next free one of tokenizer.json is "),
        ({"<|a|>": "x"}, r"added_tokens\.json: added tokens must be an id and a spelling each"),
        ({"": 300}, r"added_tokens\.json: added tokens must be an id and a spelling each"),
    ],
    ids=str,
)
def test_added_tokens_that_do_not_fit_are_named(tmp_path, added, message):
    directory = Path(save_byte_tokenizer(tmp_path / "t"))
    (directory / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        load_tokenizer(directory)


@pytest.mark.parametrize("template", [3, {"default": "x"}, [3], [{"name": "default", "template": 3}]])
def test_a_template_that_is_no_text_is_named(tmp_path, template):
    with pytest.raises(
        ValueError, match=r"tokenizer_config\.json: chat_template must be a text, or a list of templates"
    ):
        load_tokenizer(_copy(tmp_path, chat_template=template))


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("tokenizer.json", '"a": 0', '"a": 5, "a": 0'),
        ("tokenizer_config.json", '"eos_token": "b"', '"eos_token": "a", "eos_token": "b"'),
    ],
)
def test_a_key_with_two_values_is_refused(tmp_path, file, old, new):
    directory = save_words(tmp_path / "words", ["a", "b"], eos_token="b")
    text = json.dumps(json.loads((directory / file).read_text()))
    assert old in text
    (directory / file).write_text(text)
    load_tokenizer(directory)
    (directory / file).write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=rf"{file} gives two values for the key '(a|eos_token)', .*: keep one of them"):
        load_tokenizer(directory)


def test_the_size_of_a_vocabulary_is_its_largest_id_and_one_everywhere(tmp_path, monkeypatch):
    from collections import Counter

    from tokenizers import Tokenizer, decoders, models

    from stellarbyte_jax.tokenizer.byte_lengths import token_byte_lengths
    from stellarbyte_jax.tokenizer.special import special_ids
    from stellarbyte_jax.tokenizer.training import evaluation
    from stellarbyte_jax.tokenizer.training.stages import Sample, Stage

    assert directory.vocabulary_size([]) == 0
    sparse = Tokenizer(models.WordLevel({"a": 0, "far": 9}, unk_token="a"))
    sparse.decoder = decoders.ByteLevel()
    sparse.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert sparse.get_vocab_size() == 2
    assert load_tokenizer(tmp_path).vocab_size == 10 and len(token_byte_lengths(tmp_path)) == 10
    with pytest.raises(ValueError, match=r"has 10 tokens"):
        special_ids(tmp_path, 9)
    monkeypatch.setattr(evaluation, "build", lambda merges: sparse)
    sample = Sample(Counter({"a": 1}), 1, [])
    assert evaluation.evaluate([], {"t": sample}, [Stage(300, {"t": 1.0})])["vocab_size"] == 10


NEWER = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<image>", "<new>"], "eos_token": "</s>"}
OLDER = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<image>", "<new>"]}


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (NEWER, OLDER | {"eos_token": "</s>"}),
        (NEWER | {"additional_special_tokens": ["<x>"]}, OLDER | {"eos_token": "</s>"}),  # which nobody reads there
        ({"extra_special_tokens": [], "eos_token": "</s>"}, {"eos_token": "</s>"}),
        (
            {"extra_special_tokens": [], "additional_special_tokens": ["<new>"]},
            {"additional_special_tokens": ["<new>"]},
        ),
        ({"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": {"image_token": "<image>"}}, None),
        ({"eos_token": "</s>"}, None),
    ],
)
def test_settings_are_spelled_for_older_readers(tmp_path, given, written):
    transformers = pytest.importorskip("transformers", reason="the peer")
    path = save_words(tmp_path / "t", ["<unk>", "<s>", "</s>", "<image>"], **given)
    before, tokens = TokenizerDirectory(path).special_tokens(), load_tokens(path)
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(path).get_added_vocab()
    directory.spell_for_older(path)
    assert json.loads((path / "tokenizer_config.json").read_text()) == (given if written is None else written)
    assert (TokenizerDirectory(path).special_tokens(), load_tokens(path)) == (before, tokens)
    both = given.get("extra_special_tokens") == [] and "additional_special_tokens" in given
    if not both or Version(transformers.__version__) >= Version("5.24"):  # an earlier one took the empty list
        assert transformers.PreTrainedTokenizerFast.from_pretrained(path).get_added_vocab() == peer


def load_tokens(path):
    return TokenizerDirectory(path).read_library()[1].get_vocab(with_added_tokens=True)


@pytest.mark.parametrize(("extra", "written"), [(["<image>", "<new>"], ["<image>", "<new>"]), ([], None)])
def test_tokens_beside_a_map_of_tokens_keep_their_name(tmp_path, extra, written):
    path = save_words(tmp_path / "t", ["<unk>", "<image>"], **(NEWER | {"extra_special_tokens": extra}))
    (path / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<other>"]}')
    tokens = load_tokens(path)
    directory.spell_for_older(path)
    assert load_tokens(path) == tokens and ("<other>" in tokens) == (extra == [])
    settings = json.loads((path / "tokenizer_config.json").read_text())
    assert settings.get("extra_special_tokens") == written
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
