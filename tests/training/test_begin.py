"""What a run begins with: weights of another directory, and what is checked before its own is made."""

import contextlib
import dataclasses
import json
import os
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hf_models import assert_same_tree
from helpers.tiny_documents import save_byte_tokenizer
from helpers.training import RIVER, river_run, some_weights

from stellarbyte_jax.checkpoint.store import Checkpointer, CheckpointError
from stellarbyte_jax.checkpoint.weights import load_weights, save_initial
from stellarbyte_jax.cli.train import main
from stellarbyte_jax.config import (
    ByteConfig,
    CheckpointConfig,
    ConfigError,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)
from stellarbyte_jax.data.sources import DataError
from stellarbyte_jax.hf.directory import save_pretrained
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.training import begin
from stellarbyte_jax.training.loss import batch_loss
from stellarbyte_jax.training.run import train

MODEL = ByteConfig(
    vocab_size=300,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=32,
    tie_word_embeddings=True,
    rms_norm_eps=1e-6,
    compute_dtype="float32",
)
NO_CHANGE = OptimizerConfig(learning_rate=1e-30)  # so small that float32 weights stay as they are
CONFIG = """
from stellarbyte_jax.config import *

def config():
    return TrainConfig(
        output_dir={run!r},
        steps=2,
        global_batch_size=2,
        model=ByteConfig(vocab_size=500, hidden_size=8, num_hidden_layers=1, num_attention_heads=1),
        data=DataConfig(train=({train!r},), sequence_length=16, workers=0, cache_dir={cache!r}, tokenizer="nowhere"),
        optimizer=OptimizerConfig(learning_rate=1e-30),
        schedule=ScheduleConfig(name="constant", warmup_steps=0),
    )
"""


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax mixes float and integer types inside
        yield


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    return Path(save_byte_tokenizer(tmp_path / "bytes"))


@pytest.fixture
def config_file(tmp_path) -> Path:
    """A run of another, smaller network, with a tokenizer that does not exist."""
    (tmp_path / "a.jsonl").write_text(RIVER)
    text = CONFIG.format(run=str(tmp_path / "new"), train=str(tmp_path / "a.jsonl"), cache=str(tmp_path / "cache"))
    (tmp_path / "first.py").write_text(text)
    return tmp_path / "first.py"


@pytest.fixture
def run(tmp_path, tokenizer) -> Path:
    """A run with a window in its second layer, which no Hugging Face family has, and weights alone."""
    mixed = dataclasses.replace(MODEL, sliding_window=8, layer_types=("full_attention", "sliding_attention"))
    shutil.copytree(tokenizer, tmp_path / "old" / "tokenizer")
    save_initial(tmp_path / "old", mixed, some_weights(MODEL), str(tokenizer), add_bos=False)
    return tmp_path / "old"


@pytest.fixture
def hf(tmp_path, tokenizer) -> Path:
    save_pretrained(tmp_path / "hf", ByteTransformer(MODEL), some_weights(MODEL), tokenizer=tokenizer)
    return tmp_path / "hf"


def settings(tmp_path, tokenizer, **changes) -> TrainConfig:
    model = changes.pop("model", MODEL)
    changes = {"output_dir": str(tmp_path / "new"), "optimizer": NO_CHANGE, **changes}
    return river_run(tmp_path, model, tokenizer, **changes)


@pytest.fixture
def only_begun(monkeypatch):
    """Begins a run, and ends it where its data would be opened, after which it says nothing new of its settings."""

    class EnoughError(Exception):
        pass

    def opened(*_):
        raise EnoughError

    def begun(config):
        with monkeypatch.context() as patch, pytest.raises(EnoughError):
            patch.setattr(begin, "open_loader", opened)
            train(config)

    return begun


def test_settings_are_those_of_the_newest_checkpoint_that_can_be_read(run):
    config, weights = load_weights(run)
    later = dataclasses.replace(config, data=dataclasses.replace(config.data, add_bos=True))
    with contextlib.closing(Checkpointer(run, CheckpointConfig())) as checkpointer:
        checkpointer.save(3, {"params": weights}, {"config": later.to_dict()}, frozen=[])
    assert begin.inherit("nowhere", str(run))["data.add_bos"]
    shutil.rmtree(run / "checkpoints" / "3" / "config")
    assert not begin.inherit("nowhere", str(run))["data.add_bos"]


def test_a_run_begins_with_another_ones_weights_and_goes_on_with_its_own(run, tmp_path, config_file, capsys):
    command = ["--config", str(config_file), "--init-from", str(run), "--set", "model.hidden_dropout=0.5"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"starting from the weights in {run}\n" in printed
    assert f"init_from={run} steps=4" in printed.partition("next:")[2]
    stored, weights = load_weights(tmp_path / "new")
    assert_same_tree(weights, some_weights(MODEL))
    expected = dataclasses.replace(
        MODEL, sliding_window=8, layer_types=("full_attention", "sliding_attention"), hidden_dropout=0.5
    )
    assert stored.model == expected
    resolved = json.loads((tmp_path / "new" / "train_config.json").read_text())
    assert TrainConfig.from_dict(resolved) == stored
    assert (resolved["data"]["tokenizer"], resolved["data"]["add_bos"]) == (str(run / "tokenizer"), False)
    assert resolved["init_from"] == str(run)

    shutil.rmtree(run)  # what it began with is not needed any more
    command += ["steps=3", "optimizer.learning_rate=0.01", "model.compute_dtype=bfloat16"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"resumed at step 2 from {tmp_path / 'new'}\n" in printed and "starting from" not in printed
    changed = [line for line in printed.splitlines() if line.startswith("setting changed: ")]
    assert changed == [
        "setting changed: steps 2 -> 3",
        "setting changed: model.compute_dtype 'float32' -> 'bfloat16'",
        "setting changed: optimizer.learning_rate 1e-30 -> 0.01",
    ]
    later = load_weights(tmp_path / "new")[1]
    assert not np.array_equal(later["embed"]["embedding"], weights["embed"]["embedding"])


def test_another_init_from_on_a_run_with_checkpoints_is_told_to_count_for_nothing(hf, tmp_path, config_file, capsys):
    assert main(["--config", str(config_file), "--init-from", str(hf)]) == 0
    capsys.readouterr()
    assert main(["--config", str(config_file), "--init-from", "elsewhere"]) == 0
    told = f"setting changed: init_from '{hf}' -> 'elsewhere' (without effect: the run goes on with its own weights)"
    assert told in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("kind", ["hf", "old", "old/checkpoints/0"])
def test_a_model_that_is_left_out_is_that_of_the_weights(kind, hf, run, tmp_path):
    source = str(tmp_path / kind)
    config = settings(tmp_path, None, init_from=source, model=ByteConfig(), steps=1)
    assert train(config).exit_code == 0
    stored, weights = load_weights(tmp_path / "new")
    assert_same_tree(weights, some_weights(MODEL))
    assert (stored.model.rms_norm_eps, stored.model.max_position_embeddings) == (1e-6, 32)
    assert Path(stored.data.tokenizer) == (hf if kind == "hf" else run / "tokenizer")


def test_settings_with_a_model_must_fit_the_weights(hf, tmp_path, tokenizer):
    wide = dataclasses.replace(MODEL, hidden_size=32, sliding_window=4)
    with pytest.raises(CheckpointError) as caught:
        train(settings(tmp_path, tokenizer, init_from=str(hf), model=wide))
    assert str(caught.value) == (
        f"{hf} holds another model: model.hidden_size is 16 there and 32 here; model.head_dim is 8 there and 16 here. "
        "Leave these settings out: a run keeps the weights, and so the shape, of the model in init_from"
    )
    assert not (tmp_path / "new").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path, tokenizer):
    weights = some_weights(MODEL)
    weights["final_norm"]["scale"][0] = np.nan
    save_initial(tmp_path / "old", MODEL, weights, str(tokenizer))
    with pytest.raises(CheckpointError, match=r"old cannot begin a run: params of it hold numbers that are not finite"):
        train(settings(tmp_path, tokenizer, init_from=str(tmp_path / "old")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.train": ("nothing.jsonl",)}, r"^data\.train: nothing\.jsonl does not exist \(looked from {cwd}\)$"),
        ({"data.train": ()}, r"^data\.train is empty: "),
        ({"data.validation": ("no/*.jsonl",)}, r"^data\.validation: no file matches 'no/\*\.jsonl' \(looked from"),
        ({"data.tokenizer": "no"}, r"^tokenizer directory no does not exist \(looked from {cwd}\): give"),
        ({"init_from": "runs/none"}, r"^runs/none does not exist \(looked from {cwd}\): give a local directory"),
    ],
    ids=str,
)
def test_nothing_is_written_before_what_the_run_needs_was_found(changes, message, tmp_path, tokenizer):
    config = settings(tmp_path, tokenizer)
    data = {name.removeprefix("data."): value for name, value in changes.items() if name.startswith("data.")}
    top = {name: value for name, value in changes.items() if not name.startswith("data.")}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data), **top)
    with pytest.raises((DataError, ValueError), match=message.format(cwd=os.getcwd())):
        train(config)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("held", ["pyproject.toml", ".git"])
def test_a_project_is_no_place_for_a_run(held, tmp_path, tokenizer, monkeypatch):
    place = tmp_path / "project"
    place.mkdir()
    (place / held).touch()
    monkeypatch.chdir(place)
    message = (
        rf"^output_dir \. \({place}\) holds a project \({held}\): name a directory of the run's own, such as runs/"
    )
    with pytest.raises(ConfigError, match=message):
        train(settings(tmp_path, tokenizer, output_dir="."))
    assert [p.name for p in place.iterdir()] == [held]
    (place / "train_config.json").touch()  # a run that somebody keeps under version control
    begin._check_place(place)


def test_neither_home_nor_the_root_is_a_place_for_a_run(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "link"))
    for place, what in ((tmp_path, "is your home directory"), (Path("/"), "is the root of the file system")):
        with pytest.raises(ConfigError, match=what):
            begin.check(settings(tmp_path, tokenizer, output_dir=str(place)))


def test_a_folder_of_the_system_is_no_place_for_a_run(monkeypatch, tmp_path):
    """An empty volume is one, and one that holds a run."""
    for place in ("/usr", "/etc/"):
        with pytest.raises(
            ConfigError, match=r"^output_dir /\w+ \(/\w+\) is a folder of the system, or a volume, that"
        ):
            begin._check_place(Path(place))
    held = []
    monkeypatch.setattr(begin.os, "listdir", lambda place: held)
    for names in ([], ["lost+found"], ["run.lock"]):
        held[:] = names
        begin._check_place(Path("/usr"))
    held[:] = ["x"]
    begin._check_place(Path("/not/there"))
    begin._check_place(tmp_path)
    monkeypatch.setattr(begin, "holds_run", lambda place: True)
    begin._check_place(Path("/usr"))


@pytest.mark.parametrize(
    ("rows", "multiple", "tokens", "told"),
    [
        (32000, 1, 8000, True),
        (8000, 1, 8000, False),
        (8128, 1, 8000, False),  # padding by hand
        (8129, 1, 8000, True),
        (8256, 256, 8000, False),
        (50304, 1, 49800, True),
        (50304, 1, 49900, False),  # less than one in a hundred
    ],
)
def test_rows_that_no_token_uses_are_told(rows, multiple, tokens, told, tmp_path, monkeypatch):
    class Counted:
        vocab_size = tokens

    monkeypatch.setattr(begin, "load_tokenizer", lambda path: Counted)
    said: list[str] = []
    model = ByteConfig(vocab_size=rows, vocab_size_multiple=multiple)
    begin.tell_unused_rows(settings(tmp_path, "words", model=model), said.append)
    assert said == [
        f"warning: the tokenizer in words has {tokens:,} tokens, model.vocab_size is {rows:,}: {rows - tokens:,} "
        f"rows of embedding and head are never used; model.vocab_size={tokens} leaves them out"
    ] * int(told)


def test_a_run_of_its_own_vocabulary_tells_unused_rows_and_one_of_given_weights_does_not(
    tmp_path, tokenizer, capsys, only_begun
):
    wide = dataclasses.replace(MODEL, vocab_size=500)
    only_begun(settings(tmp_path, tokenizer, model=wide))
    assert "model.vocab_size=288 leaves them out" in capsys.readouterr().out
    save_initial(tmp_path / "old", wide, some_weights(wide), str(tokenizer))
    only_begun(settings(tmp_path, tokenizer, model=wide, init_from=str(tmp_path / "old")))
    printed = capsys.readouterr().out
    assert "starting from the weights" in printed and "leaves them out" not in printed


ONE_WEIGHT = (
    "warning: model.moe.num_experts_per_tok=1 and norm_topk_prob=true: the weight of a token's expert is always 1, so "
    "routers learn from losses of balance alone; model.moe.norm_topk_prob=false lets them learn from the text"
)


@pytest.mark.parametrize(
    ("moe", "told", "slope"),
    [
        ({"num_experts": 3, "num_experts_per_tok": 1}, True, False),
        ({"num_experts": 3, "num_experts_per_tok": 1, "norm_topk_prob": False}, False, True),
        ({"num_experts": 3}, False, None),
        ({"num_experts": 1, "num_experts_per_tok": 1}, False, None),  # has nothing to learn
    ],
)
def test_routers_that_the_text_does_not_reach_are_told(moe, told, slope, tmp_path):
    model = dataclasses.replace(MODEL, moe=moe)
    said: list[str] = []
    begin.tell_routers_without_slope(settings(tmp_path, "words", model=model), said.append)
    assert said == [ONE_WEIGHT] * told
    if slope is None:
        return
    network, batch = ByteTransformer(model), {"tokens": jnp.arange(12, dtype=jnp.int32).reshape(1, 12)}

    def loss(params):
        return batch_loss(network, params, batch, LossConfig(), train=True)[0]

    router = jax.jit(jax.grad(loss))(some_weights(model))["layers"]["0"]["moe"]["router"]
    assert (np.abs(router["kernel"]).max() > 1e-6) == slope


def test_a_run_tells_of_routers_that_the_text_does_not_reach(tmp_path, tokenizer, capsys, only_begun):
    model = dataclasses.replace(MODEL, moe={"num_experts": 3, "num_experts_per_tok": 1, "intermediate_size": 8})
    only_begun(settings(tmp_path, tokenizer, model=model))
    assert capsys.readouterr().out.count(ONE_WEIGHT) == 1


def test_a_run_in_a_thread_trains_without_signals(tmp_path, tokenizer):
    ended = []

    def act():
        with jax.numpy_dtype_promotion("standard"):  # which is of a thread, and of its programs
            ended.append(train(settings(tmp_path, tokenizer)))

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    assert [(end.exit_code, end.step) for end in ended] == [(0, 2)]


@pytest.mark.parametrize("given", ["configs/quickstart.py", Path("quickstart"), None])
def test_what_is_no_config_is_told_how_one_is_read(given):
    with pytest.raises(ConfigError, match=r"^train\(\) takes a TrainConfig, not .*: stellarbyte_jax\.config\.load\("):
        train(given)


def test_the_folder_of_the_command_is_no_place_for_a_run(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")
    for place in (Path("."), tmp_path):
        with pytest.raises(ConfigError, match="is the folder in which the command was typed, or one above it"):
            begin._check_place(place)
    begin._check_place(Path("b"))
    (tmp_path / "a" / "train_config.json").touch()
    begin._check_place(Path("."))  # a run that stands there already
