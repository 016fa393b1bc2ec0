"""Special tokens that the settings of a tokenizer name are those of transformers, in templates and vocabulary."""

import json
from importlib.metadata import version

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from stellarbyte_jax.tokenizer.byte_lengths import token_byte_lengths
from stellarbyte_jax.tokenizer.chat import Conversation
from stellarbyte_jax.tokenizer.codec import load_tokenizer

WORDS = {"a": 0, "<b>": 1, "<e>": 2, "<p>": 3, "<image>": 4, "<x>": 5}
TYPED = {"__type": "AddedToken", "content": "<image>", "lstrip": True}
DECODER = {"added_tokens_decoder": {"2": {"content": "<e>", "special": True}}}
TEMPLATE = (
    "{{ bos_token }}{{ eos_token }}{{ image_token }}{{ video_token }}{{ other }}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)

both_names = pytest.mark.skipif(
    tuple(int(part) for part in version("transformers").split(".")[:2]) < (5, 24),
    reason="the rule is that of transformers 5.24; an earlier one was seen to read both names otherwise",
)


def _directory(path, config, tokens_map=None, added=None):
    library = Tokenizer(models.WordLevel(WORDS, unk_token="a"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(path / "tokenizer.json"))
    for name, values in (
        ("tokenizer_config.json", {"chat_template": TEMPLATE, **config}),
        ("special_tokens_map.json", tokens_map),
        ("added_tokens.json", added),
    ):
        if values is not None:
            (path / name).write_text(json.dumps(values))
    return path


def _peer(path):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize(
    "files",
    [
        ({"extra_special_tokens": {"image_token": "<image>"}},),
        ({"extra_special_tokens": {"other": "<image>", "video_token": "<new>"}},),
        ({"extra_special_tokens": {"image_token": TYPED}},),
        ({"extra_special_tokens": ["<image>", "<new>"]},),
        ({"extra_special_tokens": [TYPED, {**TYPED, "content": "<new>", "special": True}]},),
        ({"extra_special_tokens": None},),
        ({"additional_special_tokens": ["<image>"]},),
        ({"additional_special_tokens": {"image_token": "<image>"}},),
        ({"additional_special_tokens": ["<image>"], "extra_special_tokens": ["<x>"]},),
        *(
            pytest.param(({"additional_special_tokens": ["<image>"], "extra_special_tokens": both},), marks=both_names)
            for both in ({"image_token": "<x>"}, [])
        ),
        ({"image_token": "<image>", "add_other_token": True, "number_token": 3},),
        ({"image_token": TYPED, "video_token": {"content": "<x>"}},),
        ({"model_specific_special_tokens": {"image_token": "<image>"}},),
        ({"model_specific_special_tokens": {"image_token": "<image>"}, "video_token": "<x>"},),
        ({"image_token": "<image>", "extra_special_tokens": {"image_token": "<x>"}},),
        ({"eos_token": "<e>", "extra_special_tokens": {"eos_token": "<x>"}},),
        ({"unk_token": "<new2>", "image_token": "<new3>", "extra_special_tokens": ["<new1>", "<new3>", ""]},),
        ({"eos_token": "<e>", "bos_token": "<b>"}, {"eos_token": "<p>", "bos_token": None}),
        ({"eos_token": "<e>", **DECODER}, {"eos_token": "<p>", "pad_token": "<p>"}),
        ({"image_token": "<image>"}, {"image_token": "<x>", "video_token": {"content": "<p>"}}),
        ({}, {"extra_special_tokens": {"image_token": "<image>"}}),
        ({"extra_special_tokens": ["<image>"]}, {"extra_special_tokens": ["<x>"]}),
        ({}, {"additional_special_tokens": ["<image>"]}),
        ({"image_token": "<new>"}, None, {"<new>": 6}),
        ({"image_token": "<x>", **DECODER}, None, {"<new>": 6}),
        ({"image_token": "<new>", "added_tokens_decoder": {"6": {"content": "<new>", "special": False}}},),
        ({"added_tokens_decoder": {"2": {"content": "<e>", "special": True}, "6": {"content": "<new>"}}},),
    ],
    ids=json.dumps,
)
def test_names_and_ids_are_those_of_transformers(tmp_path, files):
    _directory(tmp_path, *files)
    ours, peer = load_tokenizer(tmp_path), _peer(tmp_path)
    assert ours.special_tokens == peer.special_tokens_map
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id)
    assert ours.vocab_size == len(peer)
    special = {token.content for token in peer.added_tokens_decoder.values() if token.special}
    seen = {token for token, number in peer.get_vocab().items() if ours.decode([number]) == ""}
    assert seen == special - {""}
    message = {"role": "user", "content": "a"}
    text = peer.apply_chat_template([message], tokenize=False)
    ids = peer(text, add_special_tokens=False).input_ids
    assert Conversation(ours).ask("a") == ids == ours.encode(text, parse_special=True)
    assert ours.decode(range(ours.vocab_size)) == peer.decode(list(range(len(peer))), skip_special_tokens=True)
    assert ours.encode("<image>", parse_special=True) == peer("<image>", add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("config", "tokens_map", "message"),
    [
        ({"extra_special_tokens": {"image_token": None}}, None, "_config.json: image_token must be a token's spelling"),
        ({"extra_special_tokens": {"image_token": 3}}, None, "_config.json: image_token must be .*, got 3$"),
        ({"extra_special_tokens": "<x>"}, None, "must be a list of tokens, or an object of names, got '<x>'$"),
        ({"extra_special_tokens": [3]}, None, "extra_special_tokens must be a token's spelling, got 3$"),
        ({"model_specific_special_tokens": ["<x>"]}, None, "must be an object of names and tokens, got "),
        ({}, {"extra_special_tokens": [3]}, "special_tokens_map.json: extra_special_tokens must be"),
        ({}, {"image_token": {"content": 3}}, "special_tokens_map.json: image_token must be"),
        ({"image_token": "\ud83d"}, None, "image_token is '.*': half of a surrogate pair is no text$"),
        # Every text needs them, so an id that no model was trained for is refused.
        ({"eos_token": "<new>"}, None, "eos_token is '<new>', which tokenizer.json does not hold$"),
    ],
    ids=str,
)
def test_what_is_no_token_is_one_line(tmp_path, config, tokens_map, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(_directory(tmp_path, config, tokens_map))


def test_a_named_token_gets_no_id_of_another_one(tmp_path):
    library = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 3}, unk_token="a"))
    _directory(tmp_path, {"extra_special_tokens": {"image_token": "<image>"}})
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"'<image>' has no id, and the one that is next, 3, is another token's"):
        load_tokenizer(tmp_path)


def test_new_ids_follow_the_order_of_transformers(tmp_path):
    names = {"image_token": "<i>", "mask_token": "<m>", "cls_token": "<c>", "unk_token": "<u>"}
    ours = load_tokenizer(_directory(tmp_path, names))
    text = "".join(names.values())
    assert ours.encode(text, parse_special=True) == _peer(tmp_path)(text, add_special_tokens=False).input_ids


def test_tokens_that_are_listed_again_change_nothing(tmp_path):
    """Runs that began before they were go on."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": False}
    library = Tokenizer(models.WordLevel(WORDS, unk_token="a"))
    library.add_tokens([AddedToken("<word>", normalized=False)])
    _directory(tmp_path, {})
    library.save(str(tmp_path / "tokenizer.json"))
    before = load_tokenizer(tmp_path).fingerprint
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"6": {"content": "<word>", **flags}}})
    )
    assert load_tokenizer(tmp_path).fingerprint == before


def test_added_tokens_come_in_any_order(tmp_path):
    ours = load_tokenizer(_directory(tmp_path, {}, None, {"<z>": 7, "<y>": 6}))
    assert ours.encode("<y><z>") == [6, 7] == _peer(tmp_path)("<y><z>", add_special_tokens=False).input_ids


def test_a_named_token_is_a_control_token(tmp_path):
    """Also one that tokenizer.json holds as a word: what a document spells is text, and it stands for no bytes."""
    before = load_tokenizer(_directory(tmp_path, {}))
    named = load_tokenizer(_directory(tmp_path, {"extra_special_tokens": {"image_token": "<image>"}}))
    assert (named.decode([4]), before.decode([4])) == ("", "<image>")
    assert named.encode("a<image>a", parse_special=True) == [0, 4, 0]
    assert named.encode("a<image>a") == before.encode("a<image>a")
    assert named.fingerprint == before.fingerprint  # the ids of all texts are the same
    more = load_tokenizer(_directory(tmp_path, {"extra_special_tokens": {"image_token": "<new>"}}))
    assert more.fingerprint != before.fingerprint and more.vocab_size == 7
    assert token_byte_lengths(tmp_path) is None  # no bytes are known of such words
