"""Metrics of whole tasks beside lm-eval's own backend for transformers, where lm-eval is installed."""

import random
import warnings
from dataclasses import replace

import numpy as np
import pytest
from helpers.hf_models import random_model
from helpers.local_tasks import write_tasks
from helpers.tiny_documents import save_byte_tokenizer

from stellarbyte_jax.checkpoint.bundle import load_bundle
from stellarbyte_jax.cli import evaluate
from stellarbyte_jax.command import MendableError
from stellarbyte_jax.hf.directory import save_pretrained
from stellarbyte_jax.inference.reconfigure import reconfigure
from stellarbyte_jax.tokenizer.codec import load_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="the peer is lm-eval: pip install -e '.[eval]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval and datasets

from stellarbyte_jax.evaluation.adapter import as_lm  # noqa: E402
from stellarbyte_jax.evaluation.tasks import check_tasks, evaluate_tasks  # noqa: E402


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Files of tasks, and an exported Llama of 256 positions with random weights; its tokens are bytes."""
    place = tmp_path_factory.mktemp("evaluation")
    tokenizer = save_byte_tokenizer(place / "tokenizer")
    model, params = random_model(vocab_size=load_tokenizer(tokenizer).vocab_size, max_position_embeddings=256)
    save_pretrained(place / "hf", model, params, tokenizer=tokenizer)
    return place / "hf", {name: str(path) for name, path in write_tasks(place / "tasks").items()}


@pytest.fixture(scope="module")
def peer(places):
    pytest.importorskip("accelerate", reason="lm-eval's backend for transformers needs it")
    from lm_eval.models.huggingface import HFLM

    with warnings.catch_warnings(action="ignore"):
        return HFLM(pretrained=str(places[0]), dtype="float32", device="cpu", batch_size=1)


def ours(places, batch_size=8):
    bundle = load_bundle(places[0])
    float32 = reconfigure(bundle.model, ["compute_dtype=float32"])
    return as_lm(replace(bundle, model=float32), batch_size=batch_size)


@pytest.mark.parametrize("task", ["status_choice", "word_order", "corpus", "status_name"])
def test_numbers_are_those_of_lm_evals_own_backend(places, peer, task):
    """Choices that share a context, texts without one, windows of long texts, and answers up to a stop text."""
    found = evaluate_tasks(ours(places), [places[1][task]], limit=6)
    wanted = evaluate_tasks(peer, [places[1][task]], limit=6)
    assert [(result.task, result.metric) for result in found] == [(result.task, result.metric) for result in wanted]
    for ours_, theirs in zip(found, wanted, strict=True):
        assert ours_.value == pytest.approx(theirs.value, rel=1e-4), ours_.metric
        assert ours_.stderr == (None if theirs.stderr is None else pytest.approx(theirs.stderr, rel=1e-4))
        assert ours_.samples == theirs.samples


def test_each_request_is_answered_as_by_lm_evals_own_backend(places, peer):
    from lm_eval.api.instance import Instance

    def requests(kind, *arguments):
        return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]

    model = ours(places)
    pairs = [
        ("The river ", "runs"),
        ("The river ", "sleeps"),
        ("", "runs"),
        ("x" * 300, " past it"),
        ("春", "天"),
    ]
    for (found, greedy), wanted in zip(
        model.loglikelihood(requests("loglikelihood", *pairs)),
        peer.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True),
        strict=True,
    ):
        assert (found, greedy) == (pytest.approx(wanted[0], rel=1e-5), wanted[1])
    texts = [("a river runs past the old stone bridge " * 20,), ("stone",)]
    np.testing.assert_allclose(
        model.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)),
        peer.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True),
        rtol=1e-5,
    )
    kwargs = {"until": ["\n"], "max_gen_toks": 16}
    prompts = [(text, kwargs) for text in ("The river", "x" * 300, "春天", "")]
    assert model.generate_until(requests("generate_until", *prompts[:3])) == peer.generate_until(
        requests("generate_until", *prompts[:3]), disable_tqdm=True
    )


def test_rounds_repeat_each_other_and_leave_random_numbers_alone(places):
    tasks = [places[1]["status_choice"], places[1]["status_name"]]
    model = ours(places)
    random.seed(7)
    np.random.seed(7)
    first = evaluate_tasks(model, tasks, limit=3)
    drawn = random.random(), np.random.random()
    random.seed(7)
    np.random.seed(7)
    assert drawn == (random.random(), np.random.random())
    assert evaluate_tasks(ours(places), tasks, limit=3) == first


@pytest.mark.parametrize(("examples", "chat"), [(None, False), (1, False), (0, True)])
def test_prompts_have_the_examples_and_the_template_that_are_asked_for(places, monkeypatch, examples, chat):
    model, prompts = ours(places), []
    monkeypatch.setattr(
        model, "generate_until", lambda asked: prompts.extend(each.args[0] for each in asked) or [""] * len(asked)
    )
    evaluate_tasks(model, [places[1]["status_name"]], limit=2, num_fewshot=examples, chat=chat)
    expected = 2 if examples is None else examples  # two by the task's own file
    assert [prompt.count("Name of HTTP status") for prompt in prompts] == [expected + 1] * 2
    assert [prompt.startswith("<|SBOS|>user\n") for prompt in prompts] == [chat] * 2


def test_a_task_that_lm_eval_knows_is_asked_by_its_name(places, monkeypatch):
    import datasets

    rows = [
        {"id": str(i), "question": f"{i} + 1?", "answerKey": "B", "choices": {"text": ["7", "8"], "label": ["A", "B"]}}
        for i in range(3)
    ]
    split = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=split, test=split))
    found = evaluate_tasks(ours(places), ["arc_easy"], limit=2)
    assert [(result.task, result.metric, result.samples) for result in found] == [
        ("arc_easy", "acc", 2),
        ("arc_easy", "acc_norm", 2),
    ]


def test_tasks_that_cannot_be_loaded_are_told_in_one_line(places, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("task: wrong\noutput_type: multiple_choice\n")
    (tmp_path / "broken.json").write_text("{")
    choice = places[1]["status_choice"]
    for names, message in (
        ([str(tmp_path / "none.yaml")], r"none\.yaml: there is no such file: give the path of a task, or a name"),
        ([str(wrong)], r"wrong\.yaml: the task cannot be loaded \(\w+: .*\): mend its file"),
        ([str(tmp_path / "broken.json")], r"broken\.json"),
        ([choice, choice], r"^status_choice is a task of .* and of .*: name it once$"),
        (["hellaswagg"], r"^hellaswagg: lm-eval knows no task of this name; did you mean hellaswag"),
    ):
        with pytest.raises(MendableError, match=message) as caught:
            check_tasks(names)
        assert "\n" not in str(caught.value)


def test_the_command_prints_what_lm_eval_measures(places, tmp_path, capsys):
    name = places[1]["status_choice"]
    arguments = [f"--model={places[0]}", f"--tasks={name}", "--limit=4", "--batch-size=8", "--compute-dtype=fp32"]
    assert evaluate.main(arguments) == 0
    (result, _) = evaluate_tasks(ours(places), [name], limit=4)
    told = capsys.readouterr()
    lines = [line.split()[1::2] for line in told.out.splitlines()]
    assert ["status_choice", "acc", f"{result.value:.4f}"] in [line[:3] for line in lines]
    assert "loglikelihood: 16 of 16" in told.err
