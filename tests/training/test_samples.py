"""Samples of text: how prompts go on, which file keeps them, and that a run with them trains as one without."""

import dataclasses
import functools
import json
import os
import re
import signal

import jax
import numpy as np
import pytest
from helpers.runs import cli, log_of, same_weights, write_config
from helpers.tiny_documents import save_byte_tokenizer
from helpers.training import one_layer

from stellarbyte_jax.checkpoint.bundle import load_bundle
from stellarbyte_jax.checkpoint.weights import load_weights
from stellarbyte_jax.config import RopeScaling
from stellarbyte_jax.inference.text import Continued, encode_prompt, generate_text
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes
from stellarbyte_jax.tokenizer.codec import load_tokenizer
from stellarbyte_jax.training import finish, samples
from stellarbyte_jax.training.samples import SampleFile, Sampler
from stellarbyte_jax.training.tasks import TaskRounds


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def run(tmp_path, tokenizer):
    """Settings of a run with a vocabulary of bytes and one layer."""
    return functools.partial(one_layer, tmp_path, tokenizer)


def always_saying(config, token):
    """Weights by which every next token is this one: all others have no logit at all."""
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), param_shapes(ByteTransformer(config.model)))
    params["embed"]["embedding"][:] = 1
    params["final_norm"]["scale"][:] = 1
    params["lm_head"]["kernel"][:, token] = 10
    return params


def sampler_of(config, start=0, stopped=lambda: False, published=None):
    publish = (lambda step, made: None) if published is None else lambda *taken: published.append(taken)
    return Sampler(config, ByteTransformer(config.model), start, stopped, publish)


def said_by(config, params, step=1, **more):
    said = []
    sampler_of(config, step, **more).sample(params, step, said.append)
    return said


def lines_of(directory):
    return [json.loads(line) for line in (directory / "samples.jsonl").read_bytes().splitlines()]


def test_every_prompt_is_continued_and_kept(run, tokenizer, tmp_path):
    """As many tokens as half of the positions; the end of a text ends it before."""
    config, published = run(sample_prompts=("春", "Hi [b]there")), []
    (letter,) = tokenizer.encode("a")
    made = [("春", "a" * 16), ("Hi [b]there", "a" * 16)]
    said = said_by(config, always_saying(config, letter), 5, published=published)
    assert said == [f"sample: {prompt}|{text}" for prompt, text in made]
    assert lines_of(tmp_path) == [{"step": 5, "prompt": prompt, "text": text} for prompt, text in made]
    assert published == [(5, made)]
    assert said_by(config, always_saying(config, tokenizer.eos_id), 6) == ["sample: 春|", "sample: Hi [b]there|"]
    assert [line["step"] for line in lines_of(tmp_path)] == [5, 5, 6, 6]


@pytest.mark.parametrize(("positions", "longest"), [(17, 8), (32, 16), (129, 64), (4096, 64)])
def test_how_texts_are_sampled(run, monkeypatch, positions, longest):
    """With a temperature, since small models repeat themselves without; each prompt with a seed of its own."""
    asked = []
    done = Continued(["x"], None)
    monkeypatch.setattr(samples, "continue_text", lambda *args, **kwargs: asked.append((args, kwargs)) or done)
    monkeypatch.setattr(samples, "cast_for_inference", lambda model, params: (model, params))
    for step, add_bos in enumerate((True, False)):
        config = run(positions, sample_prompts=("a", "b"), add_bos=add_bos)
        assert said_by(config, "weights", step) == ["sample: a|x", "sample: b|x"]
        for seed, prompt in enumerate("ab"):
            args, kwargs = asked.pop(0)
            tokenizer = load_tokenizer(config.data.tokenizer)
            assert args[1][1] == "weights" and args[3] == [encode_prompt(tokenizer, prompt, add_bos=add_bos)]
            expected = {"max_new_tokens": longest, "temperature": 0.8, "top_k": 40, "seed": seed}
            assert kwargs == {**expected, "stop_tokens": [tokenizer.eos_id]}


def test_texts_begin_as_documents_do(run, tokenizer):
    """A model that repeats the first token of a text alone, by the embedding: of bos, or of the prompt."""
    for step, add_bos in enumerate((True, False)):
        config = run(sample_prompts=("a",), add_bos=add_bos)
        (a,), (b,), (c,) = map(tokenizer.encode, "abc")
        params = always_saying(config, 0)
        params["embed"]["embedding"][:] = 0
        params["embed"]["embedding"][[a, c], 0] = 1
        params["embed"]["embedding"][[tokenizer.bos_id, b], 1] = 1
        params["layers"]["0"]["attn_norm"]["scale"][:] = 1
        params["layers"]["0"]["attn"]["v"][0, 1, :, 0] = 1
        params["layers"]["0"]["attn"]["o"][0, :, 0, 2] = 50
        params["lm_head"]["kernel"][:] = 0
        params["lm_head"]["kernel"][0, c] = 20
        params["lm_head"]["kernel"][2, b] = 100
        assert said_by(config, params, step) == [f"sample: a|{('b' if add_bos else 'c') * 16}"]


def test_a_round_that_a_signal_breaks_off_is_made_whole_later(run, tokenizer, tmp_path):
    config, published = run(sample_prompts=("a", "b"), sample_interval=3), []
    answers = iter([False, True])
    params = always_saying(config, tokenizer.encode("x")[0])
    assert len(said_by(config, params, 3, stopped=lambda: next(answers), published=published)) == 1
    assert not (tmp_path / "samples.jsonl").exists() and published == []
    no_tasks = TaskRounds(config, ByteTransformer(config.model), 3, lambda: False)
    assert not finish.is_done(config, 3, sampler_of(config, 3), no_tasks)
    again = sampler_of(config, 3)
    assert again.due(3)
    again.sample(params, 3, lambda text: None)
    assert not again.due(3) and not sampler_of(config, 3).due(3)
    assert finish.is_done(config, 3, again, no_tasks)
    assert [line["prompt"] for line in lines_of(tmp_path)] == ["a", "b"]


def test_which_steps_are_due(run):
    due = [step for step in range(10) if sampler_of(run(sample_prompts=("a",), sample_interval=3)).due(step)]
    assert due == [3, 6, 9]
    assert not any(sampler_of(run(sample_prompts=("a",))).due(step) for step in range(10))


@pytest.mark.parametrize(("start", "kept"), [(0, []), (2, [1, 2]), (9, [1, 2, 3])])
def test_a_resume_drops_the_lines_past_its_step(tmp_path, start, kept):
    file = SampleFile(tmp_path, 0)
    for step in (1, 2, 3):
        file.write(step, [("a\n", "春\u2028\ud800")])
    with (tmp_path / "samples.jsonl").open("ab") as damaged:
        damaged.write(b'\xff\n{"step": 3, "pro')
    again = SampleFile(tmp_path, start)
    assert [line["step"] for line in lines_of(tmp_path)] == kept
    assert all(line["prompt"] == "a\n" and line["text"] == "春\u2028\ud800" for line in lines_of(tmp_path))
    assert again.has(3, ["a\n"]) == (3 in kept) and not again.has(3, ["b"])


def test_a_round_takes_the_place_of_one_after_the_same_step(tmp_path):
    SampleFile(tmp_path, 0).write(1, [("a", "x")])
    file = SampleFile(tmp_path, 1)
    file.write(2, [("a", "x")])
    file.write(2, [("a", "y"), ("b", "z")])
    assert [(line["step"], line["text"]) for line in lines_of(tmp_path)] == [(1, "x"), (2, "y"), (2, "z")]


@pytest.mark.parametrize(
    ("prompt", "add_bos", "message"),
    [
        (
            "x" * 40,
            True,
            r"^sample_prompts: 'x{40}' has 41 tokens, and with 16 new ones the model has room for 16: shorten it, "
            r"or set model\.max_position_embeddings=81$",
        ),
        ("", False, r"sample_prompts: '' cannot be continued: row 0: the prompt is empty"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(run, prompt, add_bos, message):
    with pytest.raises(ValueError, match=message):
        samples.check(run(sample_prompts=("a", prompt), add_bos=add_bos))


@pytest.mark.parametrize("tokens", [25, 63, 64, 65, 200])
@pytest.mark.parametrize("scaling", [RopeScaling(), RopeScaling(name="linear", factor=2.0)], ids=["", "stretched"])
def test_the_advice_for_a_long_prompt_is_followed_with_success(run, tokens, scaling):
    """Where positions are not stretched, one less would not do; nor would a prompt of one token more."""

    def config(positions, length):
        made = run(sample_prompts=("x" * length,), add_bos=False, positions=positions)
        return dataclasses.replace(made, model=dataclasses.replace(made.model, rope_scaling=scaling))

    with pytest.raises(ValueError, match="has room for") as caught:
        samples.check(config(16, tokens))
    room, enough = map(int, re.findall(r"room for (\d+): .*=(\d+)$", str(caught.value))[0])
    samples.check(config(16, room))
    samples.check(config(enough, tokens))
    with pytest.raises(ValueError, match="has room for"):
        samples.check(config(16, room + 1))
    if scaling.name == "none":
        with pytest.raises(ValueError, match="has room for"):
            samples.check(config(enough - 1, tokens))


SAMPLED = ('sample_prompts=["春", "Call me"]', "sample_interval=7")


@pytest.mark.slow
def test_samples_change_nothing_in_a_run_and_are_of_its_averaged_weights(
    config_file, straight, tmp_path, capsys, monkeypatch
):
    """One run is stopped by a signal in its first round, and goes on; both train as a run without samples."""
    assert cli(config_file, *SAMPLED) == 0
    out = capsys.readouterr().out
    run = tmp_path / "run"
    assert log_of(run) == log_of(straight)
    assert same_weights(load_weights(run)[1], load_weights(straight)[1])
    lines = lines_of(run)
    assert [(line["step"], line["prompt"]) for line in lines] == [
        (s, p) for s in (7, 14, 20) for p in ("春", "Call me")
    ]
    assert re.search(r"^step 14/20  sample: Call me\|", out, re.MULTILINE)
    for step in (14, 20):  # checkpoints hold the average as weights to be used
        bundle = load_bundle(run, step)
        for seed, prompt in enumerate(("春", "Call me")):
            expected = generate_text(
                bundle.model,
                bundle.params,
                bundle.tokenizer,
                [prompt],
                max_new_tokens=32,
                temperature=0.8,
                top_k=40,
                seed=seed,
            )
            assert expected == [line["text"] for line in lines if (line["step"], line["prompt"]) == (step, prompt)]

    (tmp_path / "other").mkdir()
    other = write_config(tmp_path / "other")
    run, generate = tmp_path / "other" / "run", samples.continue_text

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return generate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(samples, "continue_text", interrupted)
        assert cli(other, *SAMPLED) == 143
        out = capsys.readouterr().out
        assert out.count("sample: ") == 1 and "stopped at step 7 of 20" in out
        assert not (run / "samples.jsonl").exists()
        assert cli(other, *SAMPLED) == 143  # while the round is made up for
        assert "stopped at step 7 of 20" in capsys.readouterr().out
    assert cli(other, *SAMPLED) == 0
    assert lines_of(run) == lines and log_of(run) == log_of(straight)
    assert same_weights(load_weights(run)[1], load_weights(straight)[1])
    capsys.readouterr()
    assert cli(other, *SAMPLED) == 0  # complete
    assert "sample: " not in capsys.readouterr().out and lines_of(run) == lines
