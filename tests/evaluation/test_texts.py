"""Ids of contexts and continuations beside a tokenizer of transformers that is asked as lm-eval's backend asks it."""

import json
from pathlib import Path

import pytest
from helpers.tiny_documents import save_byte_tokenizer

from stellarbyte_jax.evaluation import texts
from stellarbyte_jax.evaluation.texts import TextEncoder, checked
from stellarbyte_jax.tokenizer.codec import load_tokenizer

PAIRS = [
    ("The river", " runs"),
    ("The river ", "runs"),
    ("Two \n ", "lines"),
    ("春天", "来了"),
    ("", "runs"),
    ("", "{bos}runs"),
    ("{bos}The river", " runs{eos}"),
    ("The {eos}river", " runs"),
]


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no bos"])
def both(request, tmp_path_factory):
    """Our encoder and the tokenizer of transformers, whose post-processor adds bos or nothing."""
    transformers = pytest.importorskip("transformers")
    directory = Path(save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bytes"))
    tokenizer = load_tokenizer(directory)
    path = directory / "tokenizer.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    described["post_processor"] = None
    if request.param:
        bos = tokenizer.special_tokens["bos_token"]
        described["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        }
    path.write_text(json.dumps(described), encoding="utf-8")
    return TextEncoder(load_tokenizer(directory), add_bos=request.param), transformers.AutoTokenizer.from_pretrained(
        directory
    )


def theirs(peer, context, continuation):
    """What lm-eval's backend for transformers does, step by step."""

    def encode(text, **options):
        if text.startswith(peer.bos_token):
            options = {"add_special_tokens": False}
        return peer.encode(text, **options)

    if context == "":
        ids = peer.encode(continuation, add_special_tokens=False)
        return (ids[:1], ids[1:]) if ids[0] == peer.bos_token_id else ([peer.bos_token_id], ids)
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    before = encode(context)
    return before, encode(context + continuation)[len(before) :]


@pytest.mark.parametrize(("context", "continuation"), PAIRS)
def test_pairs_are_split_as_lm_eval_does(both, context, continuation):
    encoder, peer = both
    context, continuation = (text.format(bos=peer.bos_token, eos=peer.eos_token) for text in (context, continuation))
    ours = encoder.pairs([(context, continuation)])[0]
    assert (list(ours.context), list(ours.continuation)) == theirs(peer, context, continuation)
    assert encoder.prefix_id == peer.bos_token_id


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_many_pairs_are_split_as_each_alone(both, monkeypatch, at_once):
    encoder, peer = both
    requests = [tuple(text.format(bos=peer.bos_token, eos=peer.eos_token) for text in pair) for pair in PAIRS]
    requests += [requests[0], *requests[::-1]]
    alone = [encoder.pairs([request])[0] for request in requests]
    monkeypatch.setattr(texts, "_AT_ONCE", at_once)
    encoded, encode_batch = [], encoder.tokenizer.encode_batch

    def recording(self, part, **options):
        encoded.append(len(part))
        return encode_batch(part, **options)

    monkeypatch.setattr(type(encoder.tokenizer), "encode_batch", recording)
    assert encoder.pairs(requests) == alone
    assert max(encoded) <= at_once
    encoded.clear()
    encoder.pairs([("The river", f" {number}") for number in range(9)])
    assert sum(encoded) == 10, "the context once"


def test_without_bos_a_text_follows_eos(tmp_path):
    directory = Path(save_byte_tokenizer(tmp_path / "bytes"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (directory / name).exists():
            held = json.loads((directory / name).read_text(encoding="utf-8"))
            held.pop("bos_token", None)
            (directory / name).write_text(json.dumps(held), encoding="utf-8")
    tokenizer = load_tokenizer(directory)
    assert tokenizer.bos_id is None
    encoder = TextEncoder(tokenizer, add_bos=True)
    assert encoder.pairs([("", "a")])[0].context == (tokenizer.eos_id,)
    assert encoder.pairs([("b", "a")])[0].context == tuple(tokenizer.encode("b"))


def test_bos_behind_spaces_that_it_takes_in_is_the_context(tmp_path):
    """As in lm-eval, which compares ids; texts of this model begin with bos, and those that go on do not."""
    path = Path(save_byte_tokenizer(tmp_path / "bytes")) / "tokenizer.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    for token in described["added_tokens"]:
        token["lstrip"] = True
    path.write_text(json.dumps(described), encoding="utf-8")
    tokenizer = load_tokenizer(path.parent)
    bos = tokenizer.special_tokens["bos_token"]
    (pair,) = TextEncoder(tokenizer, add_bos=True).pairs([("", f" {bos}a")])
    assert pair == ((tokenizer.bos_id,), tuple(tokenizer.encode("a")))


def test_a_continuation_without_a_token_is_refused(both):
    encoder, _ = both
    with pytest.raises(ValueError, match=r"^the continuation of a request has no token \(continuation ''\), so "):
        encoder.pairs([("The river", "")])
    with pytest.raises(ValueError, match=r"^the context of a request has no token"):
        checked([], [1], "x")
