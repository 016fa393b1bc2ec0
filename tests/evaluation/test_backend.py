"""What lm-eval asks of a model, asked by stubs of its requests."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers.tiny_documents import save_byte_tokenizer
from helpers.training import one_layer

from stellarbyte_jax.checkpoint.bundle import Bundle
from stellarbyte_jax.evaluation import answers
from stellarbyte_jax.evaluation.answers import AnswerSettings, model_settings
from stellarbyte_jax.evaluation.backend import Backend
from stellarbyte_jax.evaluation.likelihood import log_likelihoods
from stellarbyte_jax.evaluation.texts import Pair
from stellarbyte_jax.inference.api import generate
from stellarbyte_jax.model.decoder import ByteTransformer, init_params, param_shapes
from stellarbyte_jax.tokenizer.codec import load_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Windowed(Backend):
    """Windows of eight tokens without any shared context, in place of lm-eval's."""

    def windows(self, tokens):
        before = [self._encoder.prefix_id, *tokens]
        return [(before[at : at + 1], tokens[at : at + 8]) for at in range(0, len(tokens), 8)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A model of one layer with random weights, and bytes for tokens."""
    tokenizer = load_tokenizer(save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    model = ByteTransformer(one_layer("unused", tokenizer, positions=64).model)
    params = jax.tree.map(lambda x: 3 * x, init_params(model, jax.random.key(1)))
    return Bundle(model, params, tokenizer, [tokenizer.eos_id], add_bos=True, plain_text=True)


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


def saying(bundle, text):
    """A model that says a text over and over: each token is decided by the one before it alone."""
    ids = bundle.tokenizer.encode(text)
    config = replace(bundle.model.config, hidden_size=len(ids) * 4, num_attention_heads=2, num_key_value_heads=2)
    model = ByteTransformer(config)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), param_shapes(model))
    params["final_norm"]["scale"][:] = 1
    for number, token in enumerate(ids):
        params["embed"]["embedding"][token, number] = 1
        params["lm_head"]["kernel"][number, ids[(number + 1) % len(ids)]] = 10
    return replace(bundle, model=model, params=params)


def test_likelihoods_are_in_the_order_of_their_requests(bundle):
    backend, encoder = Backend(bundle, batch_size=4), bundle.tokenizer.encode
    bos = bundle.tokenizer.bos_id
    texts = [("ab ", "c"), ("", "de"), ("ab ", "xyz"), ("q", "rs")]
    pairs = [
        Pair((bos, *encoder("ab")), tuple(encoder(" c"))),
        Pair((bos,), tuple(encoder("de"))),
        Pair((bos, *encoder("ab")), tuple(encoder(" xyz"))),
        Pair((bos, *encoder("q")), tuple(encoder("rs"))),
    ]
    one_by_one = [log_likelihoods(bundle.model, bundle.params, [p], batch_size=1, max_length=64)[0] for p in pairs]
    found = backend.loglikelihood(requests(*texts))
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in one_by_one], atol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in one_by_one]


@pytest.mark.parametrize("add_bos", [True, False])
def test_texts_begin_as_those_of_the_model(bundle, add_bos):
    encoder = bundle.tokenizer.encode
    pair = Pair((*[bundle.tokenizer.bos_id] * add_bos, *encoder("ab")), tuple(encoder("c")))
    wanted = log_likelihoods(bundle.model, bundle.params, [pair], batch_size=1, max_length=64)[0][0]
    found = Backend(replace(bundle, add_bos=add_bos), batch_size=1).loglikelihood(requests(("ab", "c")))[0][0]
    assert found == pytest.approx(wanted, abs=1e-5)


def test_weights_are_cast_once(bundle):
    model = ByteTransformer(replace(bundle.model.config, compute_dtype="bfloat16"))
    backend = Backend(replace(bundle, model=model), batch_size=1)
    assert backend._params["lm_head"]["kernel"].dtype == jax.numpy.bfloat16


def test_rolling_likelihoods_are_sums_over_windows(bundle):
    backend = Windowed(bundle, batch_size=4)
    first, second = "a river runs past", "stone"
    found = backend.loglikelihood_rolling(requests((first,), (second,)))
    for text, total in zip((first, second), found, strict=True):
        tokens = [bundle.tokenizer.bos_id, *bundle.tokenizer.encode(text)]
        before = [bundle.tokenizer.bos_id, *tokens]
        pairs = [Pair(tuple(before[i : i + 1]), tuple(tokens[i : i + 8])) for i in range(0, len(tokens), 8)]
        scores = log_likelihoods(bundle.model, bundle.params, pairs, batch_size=1, max_length=64)
        assert total == pytest.approx(sum(score for score, _ in scores), abs=1e-5)


def test_answers_end_before_the_first_stop_text(bundle):
    backend = Backend(saying(bundle, "abc\n"), batch_size=2)
    kwargs = {"max_gen_toks": 9}
    asked = [
        ("xa", kwargs),
        ("xa", kwargs | {"until": ["\n"]}),
        ("xb", kwargs | {"until": ["\n"]}),
        ("xc", kwargs | {"until": "ca"}),
        ("xa", kwargs | {"until": ["ab", "b"]}),  # as lm-eval cuts: first at "ab", then at "b"
        ("xb", kwargs | {"until": ["", "\n"]}),
    ]
    assert backend.generate_until(requests(*asked)) == ["bc\nabc\nab", "bc", "c", "\nabc\nabc\n", "", "c"]


def test_nothing_is_generated_behind_a_stop_text(bundle, monkeypatch):
    """But for what one call of the program makes."""
    made = []
    monkeypatch.setattr(answers, "generate", lambda *a, **kw: made.append(generate(*a, **kw)) or made[-1])
    backend = Backend(saying(bundle, "abc\n"), batch_size=2)
    for until in (["\n"], []):
        backend.generate_until(requests(*[(text, {"max_gen_toks": 60, "until": until}) for text in ("xa", "xb")]))
    stopped, whole = made
    assert stopped.lengths.max() < 30 and whole.lengths.tolist() == [60, 60]


def test_tokens_that_the_tokenizer_does_not_know_are_no_text(bundle):
    """Models have more rows than their tokenizer has tokens, for the sake of shapes."""
    unknown = bundle.tokenizer.vocab_size
    wider = ByteTransformer(replace(bundle.model.config, vocab_size=unknown + 1))
    spoken = saying(replace(bundle, model=wider), "abcd")
    params = jax.tree.map(np.array, spoken.params)
    params["lm_head"]["kernel"][1, :] = 0
    params["lm_head"]["kernel"][1, unknown] = 10  # behind b
    params["embed"]["embedding"][unknown, 2] = 1  # and d behind that
    backend = Backend(replace(spoken, params=params), batch_size=1)
    assert backend.generate_until(requests(("xa", {"max_gen_toks": 4}))) == ["bda"]


def test_answers_end_with_a_stop_token_also_one_that_a_stop_text_spells(bundle):
    tokenizer = bundle.tokenizer
    (a,) = tokenizer.encode("a")
    control = tokenizer.pad_id
    spoken = saying(bundle, "abcd")
    for end, stops, until in ((tokenizer.eos_id, [tokenizer.eos_id], []), (control, [], None)):
        params = jax.tree.map(np.array, spoken.params)
        params["lm_head"]["kernel"][0, :] = 0
        params["lm_head"]["kernel"][0, end] = 10  # behind a
        params["embed"]["embedding"][end, 1] = 1  # and c behind that, where it goes on
        named = [tokenizer.decode([end], skip_special_tokens=False)] if until is None else until
        backend = Backend(replace(spoken, params=params, stop_ids=stops), batch_size=3)
        kwargs = {"max_gen_toks": 20, "until": named}
        assert backend.generate_until(requests(("xb", kwargs), ("xa", kwargs))) == ["cda", ""]
    assert a != control


def test_an_eos_that_is_spelled_out_ends_an_answer(bundle, tmp_path):
    """lm-eval counts its spelling among the stop texts, whatever tokens spell it."""
    directory = Path(save_byte_tokenizer(tmp_path / "tokenizer"))
    for file in directory.glob("*.json"):
        written = file.read_text(encoding="utf-8")
        file.write_text(written.replace(bundle.tokenizer.special_tokens["eos_token"], "<e>"), encoding="utf-8")
    spoken = saying(replace(bundle, tokenizer=load_tokenizer(directory)), "ab<e>")
    assert Backend(spoken, batch_size=1).generate_until(requests(("xa", {"max_gen_toks": 9}))) == ["b"]


def test_an_empty_prompt_is_that_which_texts_begin_with(bundle):
    kwargs = {"max_gen_toks": 6}
    begun = Backend(bundle, batch_size=1).generate_until(requests(("", kwargs)))
    assert Backend(replace(bundle, add_bos=False), batch_size=1).generate_until(requests(("", kwargs))) == begun
    assert begun != Backend(replace(bundle, add_bos=False), batch_size=1).generate_until(requests(("a", kwargs)))


def test_the_longest_prompts_come_first(bundle, monkeypatch):
    lengths = []

    def note(model, params, tokenizer, prompts, *_):
        lengths.append([len(prompt) for prompt in prompts])
        return [""] * len(prompts)

    monkeypatch.setattr(answers, "_continue", note)
    Backend(bundle, batch_size=2).generate_until(requests(*[("x" * n, {"max_gen_toks": 4}) for n in (3, 9, 1, 5)]))
    assert lengths == [[10, 6], [4, 2]]


def test_a_prompt_that_is_too_long_loses_its_beginning(bundle):
    backend = Backend(saying(bundle, "abc\n"), batch_size=1)
    assert backend.generate_until(requests(("x" * 200 + "a", {"max_gen_toks": 5}))) == ["bc\nab"]
    with pytest.raises(ValueError, match=r"max_gen_toks of a task is 64, which leaves no room .* in the 64 positions"):
        backend.generate_until(requests(("a", {"max_gen_toks": 64})))


def test_samples_of_one_prompt_differ_and_do_not_depend_on_the_batch(bundle):
    kwargs = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_k": 50}
    asked = requests(("ab", kwargs), ("ab", kwargs), ("c", kwargs))
    alone = Backend(bundle, batch_size=1).generate_until(asked)
    assert alone == Backend(bundle, batch_size=3).generate_until(asked)
    assert alone[0] != alone[1]


@pytest.mark.parametrize(
    ("given", "sampling"),
    [
        ({}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9, "top_k": 3}, {"temperature": 0.0}),
        ({"temperature": 0.7, "top_k": 0}, {"temperature": 0.7}),
        ({"temperature": 0.7, "top_k": -1}, {"temperature": 0.7}),
        ({"do_sample": True, "top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        ({"temperature": 0.0, "repetition_penalty": 1.1}, {"temperature": 0.0, "repetition_penalty": 1.1}),
    ],
)
def test_how_answers_are_sampled(given, sampling):
    assert dict(AnswerSettings.read(given).sampling) == sampling
    assert AnswerSettings.read(given).max_new_tokens == 256


def test_settings_of_transformers_that_change_nothing_are_accepted():
    neutral = {"num_beams": 1, "num_return_sequences": 1, "length_penalty": 1.0, "no_repeat_ngram_size": 0}
    assert AnswerSettings.read(neutral | {"early_stopping": False}) == AnswerSettings.read({})
    unsaid = dict.fromkeys(("until", "max_gen_toks", "do_sample", "temperature", "top_p"))
    assert AnswerSettings.read(unsaid) == AnswerSettings.read({})


def test_a_model_says_what_a_task_leaves_out():
    of_model = {"repetition_penalty": 1.1, "top_k": 20, "top_p": 0.8}
    sampled = {"do_sample": True, "temperature": 0.7, "top_k": 5}
    for given, wanted in (
        ({}, {"temperature": 0.0, "repetition_penalty": 1.1}),
        ({"repetition_penalty": 1.0}, {"temperature": 0.0, "repetition_penalty": 1.0}),
        (sampled, {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "repetition_penalty": 1.1}),
    ):
        assert dict(AnswerSettings.read(given, of_model).sampling) == wanted


def test_what_of_generation_config_is_obeyed_is_told(tmp_path, caplog):
    assert model_settings(str(tmp_path)) == {}
    stated = {"repetition_penalty": 1.1, "top_p": 0.8, "num_beams": 1, "no_repeat_ngram_size": 3, "eos_token_id": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(stated | {"suppress_tokens": None}))
    assert model_settings(str(tmp_path)) == {"repetition_penalty": 1.1, "top_p": 0.8}
    assert "repetition_penalty 1.1 holds for answers to tasks that name none" in caplog.text
    assert "answers are made without no_repeat_ngram_size, which transformers would obey" in caplog.text


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_names_of_the_length(name):
    assert AnswerSettings.read({name: 7, "until": ["a", ""]}).max_new_tokens == 7
    assert AnswerSettings.read({"max_gen_toks": 3, name: 7}).max_new_tokens in (3, 7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 4}, r"^generation_kwargs\.num_beams of a task is not supported: leave it out \(there are until"),
        ({"until": [3]}, r"^generation_kwargs\.until of a task must be a text or a list of texts, got \[3\]$"),
        ({"max_gen_toks": True}, r"^generation_kwargs\.max_gen_toks of a task must be .* above 0, got True$"),
        ({"max_gen_toks": 0}, r"^generation_kwargs\.max_gen_toks of a task must be an integer above 0, got 0$"),
    ],
)
def test_settings_that_are_not_supported_are_refused(bundle, given, message):
    with pytest.raises(ValueError, match=message):
        Backend(bundle, batch_size=1).generate_until(requests(("a", given)))


def test_chat_templates(bundle, caplog):
    backend = Backend(replace(bundle, tokenizer=replace(bundle.tokenizer, chat_template=TEMPLATE)), batch_size=1)
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": " hi "}
    assert backend.chat_template(True) == TEMPLATE and backend.chat_template(False) is None
    assert backend.apply_chat_template([user]) == "<user>hi</><assistant>"
    with caplog.at_level(logging.WARNING):
        assert backend.apply_chat_template([system, user]) == "<user>hi</><assistant>"
        assert backend.apply_chat_template([system, user]) == "<user>hi</><assistant>"
    assert caplog.text.count("system messages are left out") == 1, "for all documents"
    begun = [user, {"role": "assistant", "content": "The answer is "}]
    assert backend.apply_chat_template(begun, add_generation_prompt=False) == "<user>hi</><assistant>The answer is"
    assert backend.tokenizer_name == bundle.tokenizer.fingerprint
    caplog.clear()
    broken = replace(bundle.tokenizer, chat_template="{{ raise_exception('nothing goes') }}")
    with pytest.raises(ValueError, match="nothing goes"):
        Backend(replace(bundle, tokenizer=broken), batch_size=1).apply_chat_template([user])
    assert not caplog.text, "there is no system message"
    with pytest.raises(ValueError, match="give no name"):
        backend.chat_template("rag")
    without = Backend(replace(bundle, tokenizer=replace(bundle.tokenizer, chat_template=None)), batch_size=1)
    with pytest.raises(ValueError, match="has no chat_template: evaluate without chat"):
        without.apply_chat_template([user])


@pytest.mark.parametrize("filtered", ["", "| trim"])
def test_a_reply_that_the_template_spells_twice_is_begun_at_its_last_place(bundle, filtered):
    template = f"<{{{{ messages[-1].content {filtered} }}}}/{{{{ messages[-1].content {filtered} }}}}>"
    backend = Backend(replace(bundle, tokenizer=replace(bundle.tokenizer, chat_template=template)), batch_size=1)
    reply = {"role": "assistant", "content": "so, so"}
    assert backend.apply_chat_template([reply], add_generation_prompt=False) == "<so, so/so, so"


def test_progress_is_told_after_each_call_and_may_end_the_evaluation(bundle):
    told = []
    Backend(bundle, batch_size=2, progress=lambda *each: told.append(each)).loglikelihood(
        requests(*[("a" * n, "b") for n in range(1, 6)])
    )
    assert told == [("loglikelihood", done, 5) for done in (0, 2, 4, 5)]

    def stop(kind, done, total):
        raise KeyboardInterrupt

    told.clear()
    Backend(bundle, batch_size=2, progress=lambda *each: told.append(each)).generate_until(
        requests(*[("ab", {"max_gen_toks": 2})] * 3)
    )
    assert told == [("generate_until", done, 3) for done in (0, 2, 3)]
    with pytest.raises(KeyboardInterrupt):
        Backend(bundle, batch_size=2, progress=stop).generate_until(requests(("a", {})))
