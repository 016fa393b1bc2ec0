"""Metrics of whole tasks beside lm-eval's own backend for transformers, where lm-eval is installed."""

import functools
import json
import logging
import multiprocessing
import os
import random
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.grids import mostly_slow
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
from stellarbyte_jax.evaluation.tasks import check_tasks, evaluate_tasks, quiet, to_json  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def managers():
    """Of the tasks that lm-eval knows two folders, since it would read thousands of files."""
    from lm_eval import tasks

    make, folder = tasks.TaskManager, Path(tasks.__file__).parent

    @functools.cache
    def made(include_defaults=True, include_path=None):
        if include_defaults:
            include_path = [str(folder / name) for name in ("arc", "hellaswag")]
        return make(include_path=include_path, include_defaults=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "TaskManager", made)
        yield


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


# Six examples of every task: as many rows, and so the same programs, in all tests.
def ours(places, batch_size=8):
    bundle = load_bundle(places[0])
    float32 = reconfigure(bundle.model, ["compute_dtype=float32"])
    return as_lm(replace(bundle, model=float32), batch_size=batch_size)


@pytest.mark.parametrize(
    "task", mostly_slow(["status_choice", "word_order", "corpus", "status_name"], "corpus", "status_name")
)
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


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}",
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} {% endfor %}I end",
    ],
    ids=["as it is", "trimmed", "with a space"],
)
def test_a_reply_is_begun_as_by_transformers(places, tmp_path, template):
    """Also one whose text the template spells again behind it, and an empty one."""
    from transformers import AutoTokenizer

    directory = shutil.copytree(places[0], tmp_path / "hf")
    (directory / "chat_template.jinja").write_text(template)
    model, peer = as_lm(load_bundle(directory), batch_size=1), AutoTokenizer.from_pretrained(directory)
    for begun in ("The answer is", "I", "end", "m", "|", "A ", " A", "A\n", "", "user"):
        chat = [{"role": "user", "content": "Who am I?"}, {"role": "assistant", "content": begun}]
        wanted = peer.apply_chat_template(chat, tokenize=False, continue_final_message=True)
        assert model.apply_chat_template(chat, add_generation_prompt=False) == wanted, begun


def test_a_reply_that_the_template_changes_cannot_be_begun(places, tmp_path):
    directory = shutil.copytree(places[0], tmp_path / "hf")
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    with pytest.raises(ValueError, match=r"^the chat template changes the beginning of a reply .* \(gen_prefix\)"):
        as_lm(load_bundle(directory), batch_size=1).apply_chat_template(
            [{"role": "assistant", "content": "so"}], add_generation_prompt=False
        )


def test_a_penalty_of_generation_config_holds_as_by_lm_evals_own_backend(places, tmp_path):
    pytest.importorskip("accelerate", reason="lm-eval's backend for transformers needs it")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    directory = shutil.copytree(places[0], tmp_path / "hf")
    file = directory / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 1.5}))
    prompt = ("The river runs past the old stone bridge", {"until": [], "max_gen_toks": 24})
    asked = [Instance(request_type="generate_until", doc={}, arguments=prompt, idx=0)]
    peer = HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=1)
    wanted = peer.generate_until(asked, disable_tqdm=True)
    assert ours((directory,)).generate_until(asked) == wanted
    assert ours(places).generate_until(asked) != wanted


def test_a_json_file_includes_another_file_as_yaml_does(places, tmp_path, monkeypatch):
    """Also where its path begins with the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    known = Path(places[1]["status_choice"])
    shutil.copy(known, tmp_path / "base.yaml")
    (tmp_path / "made.json").write_text(json.dumps({"include": "base.yaml", "task": "made"}))
    (found, _), (wanted, _) = (evaluate_tasks(ours(places), [str(path)], limit=2) for path in ("~/made.json", known))
    assert (found.task, found.value) == ("made", wanted.value)


def test_metrics_of_filtered_answers_name_their_filter(places, tmp_path):
    settings = json.loads(Path(places[1]["status_name"]).read_text())
    filters = [{"name": "last", "filter": [{"function": "take_first"}]}]
    (tmp_path / "filtered.json").write_text(json.dumps(settings | {"task": "filtered", "filter_list": filters}))
    found = evaluate_tasks(ours(places), [str(tmp_path / "filtered.json")], limit=6)
    assert [result.metric for result in found] == ["exact_match/last", "bleu/last"]


def test_more_examples_than_there_are_is_one_line(places):
    name = places[1]["status_name"]
    with pytest.raises(ValueError, match=r"status_name\.yaml: they have fewer examples than the 99 asked for: lower"):
        evaluate_tasks(ours(places), [name], limit=1, num_fewshot=99)


def test_whatever_a_metric_of_a_task_is_can_be_written(places, tmp_path):
    """Metrics of a task's own code, which lm-eval passes on as they are."""
    (tmp_path / "utils.py").write_text(
        "import numpy as np\n"
        "def scores(doc, results): return {'none': 0, 'infinite': 0, 'array': 0, 'table': 0, 'names': 0}\n"
        "def none(items): return float('nan')\n"
        "def infinite(items): return np.float32(np.inf)\n"
        "def array(items): return np.array([1.0, 2.0])\n"
        "def table(items): return {'a': np.float32(1.5), 2: [np.int64(3)]}\n"
        "def names(items): return {'x'}\n"
    )
    lines = Path(places[1]["status_name"]).read_text()
    settings = {key: value for key, value in json.loads(lines).items() if key != "metric_list"} | {"task": "own"}
    metrics = "".join(
        f"- {{metric: {name}, aggregation: !function utils.{name}, higher_is_better: true}}\n"
        for name in ("none", "infinite", "array", "table", "names")
    )
    path = tmp_path / "own.yaml"
    path.write_text(
        "".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items())
        + f"process_results: !function utils.scores\nmetric_list:\n{metrics}"
    )
    written = to_json(evaluate_tasks(ours(places), [str(path)], limit=6), {"model": "m"})

    def refused(constant):
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(written, parse_constant=refused)
    assert [(result["metric"], result["value"]) for result in found["results"]] == [
        ("none", None),
        ("infinite", None),
        ("array", [1.0, 2.0]),
        ("table", {"a": 1.5, "2": [3]}),
        ("names", ["x"]),
    ]


def test_rounds_repeat_each_other_and_leave_random_numbers_alone(places):
    tasks = [places[1]["status_choice"], places[1]["status_name"]]
    model = ours(places)
    random.seed(7)
    np.random.seed(7)
    first = evaluate_tasks(model, tasks, limit=6)
    assert all(isinstance(result.stderr, float) for result in first), "also of BLEU, where it is drawn"
    drawn = random.random(), np.random.random()
    random.seed(7)
    np.random.seed(7)
    assert drawn == (random.random(), np.random.random())
    assert evaluate_tasks(ours(places), tasks, limit=6) == first


@pytest.mark.parametrize("bars", [True, False])
@pytest.mark.parametrize("disabled", [None, "0"])
def test_what_is_set_for_lm_eval_is_put_back(monkeypatch, bars, disabled):
    """Bars of datasets, levels of loggers, the environment, and random numbers of torch, which lm-eval seeds."""
    import datasets
    from lm_eval.utils import set_torch_seed

    torch = pytest.importorskip("torch")
    name = "DISABLE_MULTIPROC"
    monkeypatch.delenv(name, raising=False)
    if disabled is not None:
        monkeypatch.setenv(name, disabled)
    before = datasets.utils.are_progress_bars_disabled()
    datasets.enable_progress_bars() if bars else datasets.disable_progress_bars()
    logger, random_state = logging.getLogger("lm_eval"), torch.get_rng_state()
    monkeypatch.setattr(logger, "level", logging.INFO)
    try:
        with pytest.raises(KeyboardInterrupt), quiet():
            assert datasets.utils.are_progress_bars_disabled() and logger.level == logging.ERROR
            set_torch_seed(1234)
            raise KeyboardInterrupt
        assert datasets.utils.are_progress_bars_disabled() != bars
    finally:
        datasets.disable_progress_bars() if before else datasets.enable_progress_bars()
    assert os.environ.get(name) == disabled
    assert logger.level == logging.INFO
    assert torch.equal(torch.get_rng_state(), random_state)


def test_standard_errors_are_drawn_without_a_word_and_without_processes(monkeypatch, capsys):
    """A fork of JAX may hang."""
    from lm_eval.api.metrics import bootstrap_stderr, median

    def refuse(*_):
        raise AssertionError("processes are started")

    monkeypatch.setattr(multiprocessing, "Pool", refuse)
    with quiet():
        assert bootstrap_stderr(median, [1.0, 2.0, 3.0], 10) > 0
    assert capsys.readouterr() == ("", "")


def test_a_group_that_lm_eval_knows_is_measured_with_its_tasks_once(places, tmp_path, monkeypatch):
    from lm_eval import tasks

    members = [json.loads(Path(places[1][name]).read_text()) for name in ("status_choice", "word_order")]
    average = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    group = {"group": "both", "task": members, "aggregate_metric_list": [average]}
    (tmp_path / "both.yaml").write_text(json.dumps(group))
    known = tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", lambda **_: known)
    found = evaluate_tasks(ours(places), ["both"], limit=2)
    accuracies = {result.task: result.value for result in found if result.metric == "acc"}
    assert accuracies.keys() == {"both", "both::status_choice", "both::word_order"}
    assert accuracies.pop("both") == pytest.approx(np.mean(list(accuracies.values())))


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
    prompts.clear()
    evaluate_tasks(model, [places[1]["status_name"]], limit=1)
    assert prompts[0].count("Name of HTTP status") == 2 + 1, "what was asked for holds for one round"


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
    far = json.loads(Path(places[1]["corpus"]).read_text())
    far["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "none.jsonl")
    (tmp_path / "far.json").write_text(json.dumps(far))
    choice = places[1]["status_choice"]
    for names, message in (
        ([str(tmp_path / "none.yaml")], r"none\.yaml does not exist: give the path of a task, or a name"),
        ([str(wrong)], r"wrong\.yaml: the task cannot be loaded \(\w+: .*\): mend its file"),
        ([str(tmp_path / "broken.json")], r"broken\.json"),
        ([choice, choice], r"^status_choice is a task of .* and of .*: name it once$"),
        ([str(tmp_path / "far.json")], r"far\.json: the task cannot be loaded \(FileNotFoundError: .*none\.jsonl"),
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
