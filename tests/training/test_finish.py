"""The end of a run: an export in which every number is the run's, and what is done once, or made up for later."""

import dataclasses
import functools
import json
import shutil
import sys

import jax
import numpy as np
import pytest
from helpers.tiny_documents import save_byte_tokenizer
from helpers.training import one_layer
from safetensors.numpy import load_file

from stellarbyte_jax.config import DataConfig
from stellarbyte_jax.hf import directory
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes
from stellarbyte_jax.tokenizer.codec import load_tokenizer
from stellarbyte_jax.training import finish, heatmap, plots
from stellarbyte_jax.training.samples import Sampler
from stellarbyte_jax.training.tasks import TaskRounds


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def run(tmp_path, tokenizer):
    """Settings of a run with a vocabulary of bytes and one layer."""
    return functools.partial(one_layer, tmp_path / "run", tokenizer)


def weights(config, seed=0):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: random.normal(size=leaf.shape).astype(np.float32), param_shapes(ByteTransformer(config.model))
    )


def test_an_export_holds_the_weights_and_the_tokenizer(run, tokenizer, tmp_path):
    config = run(export_at_end=True)
    model, target = ByteTransformer(config.model), tmp_path / "run" / "hf"
    for seed in (0, 1):
        params = weights(config, seed)
        finish.export(config, model, params)
        tensors = load_file(target / "model.safetensors")
        np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], params["embed"]["embedding"])
        np.testing.assert_array_equal(tensors["lm_head.weight"], params["lm_head"]["kernel"].T)
        np.testing.assert_array_equal(
            tensors["model.layers.0.mlp.down_proj.weight"], params["layers"]["0"]["mlp"]["down"][0].T
        )
    written = json.loads((target / "config.json").read_text(encoding="utf-8"))
    assert (written["vocab_size"], written["eos_token_id"]) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert load_tokenizer(target).fingerprint == tokenizer.fingerprint
    assert [path.name for path in target.parent.iterdir()] == ["hf"]


def test_an_export_that_was_killed_while_it_took_its_place_leaves_the_one_before(run, tmp_path, monkeypatch):
    config, target = run(export_at_end=True), tmp_path / "run" / "hf"
    finish.recover(config)  # a run that is new has no folder
    model, rename = ByteTransformer(config.model), type(target).rename
    finish.export(config, model, weights(config, 0))

    def killed(self, to):
        if ".partial-" in self.name:
            raise KeyboardInterrupt
        return rename(self, to)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(target), "rename", killed)
        finish.export(config, model, weights(config, 1))
    (old,) = target.parent.glob(".hf.old-*")
    old.rename(old.with_name(".hf.old-1"))  # the number is another living process's now
    finish.recover(config)
    assert [path.name for path in target.parent.iterdir()] == ["hf"]
    stored = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(stored, weights(config, 0)["embed"]["embedding"])


def test_a_folder_that_is_moved_while_an_export_is_written_gets_none_in_its_place(run, tmp_path, monkeypatch):
    config = run(export_at_end=True)
    copied = directory.copy_tokenizer

    def moving(source, partial, ids):
        (tmp_path / "run").rename(tmp_path / "moved")
        return copied(source, partial, ids)

    monkeypatch.setattr(directory, "copy_tokenizer", moving)
    with pytest.raises(FileNotFoundError):
        finish.export(config, ByteTransformer(config.model), weights(config))
    assert not list((tmp_path / "run").iterdir())


def finished(config, step=5, params=None, loss=None, stopped=False):
    """What is said, and what is exported, at the end of a run."""
    said, model = [], ByteTransformer(config.model)
    sampler = Sampler(config, model, step, lambda: stopped)
    rounds = TaskRounds(config, model, step, lambda: stopped)
    made = finish.finish(config, model, params or weights(config), step, said.append, sampler, rounds, loss)
    return said, made


def test_without_the_settings_nothing_is_read_or_written(run, tmp_path):
    config = dataclasses.replace(run(), data=DataConfig(sequence_length=16, tokenizer="nowhere"))
    finish.check(config)
    assert finished(config) == ([], None)
    assert not (tmp_path / "run").exists()


def test_what_is_done_is_not_repeated_for_the_same_step(run, tmp_path):
    (tmp_path / "run").mkdir()
    config = run(export_at_end=True, sample_prompts=("a",))
    target = tmp_path / "run" / "hf"
    said, made = finished(config)
    assert len(said) == 1 and made == target
    written = (target / "model.safetensors").stat().st_mtime_ns
    assert finished(config) == ([], target)
    assert (target / "model.safetensors").stat().st_mtime_ns == written
    assert len(finished(dataclasses.replace(config, sample_prompts=("a", "b")))[0]) == 2
    assert len(finished(config, step=6)[0]) == 1
    assert (target / "model.safetensors").stat().st_mtime_ns > written


def test_the_model_card_tells_the_run(run, tmp_path):
    (tmp_path / "run").mkdir()
    config = run(export_at_end=True)
    for step, loss in ((1234, 2.5), (1235, None)):
        _, target = finished(config, step, loss=loss)
        card = (target / "README.md").read_text(encoding="utf-8")
        assert f"| steps | {step:,} |" in card and f"| tokens | {step * 4 * 16:,} (padding included) |" in card
        assert ("| validation loss | 2.5000 nats a token |" in card) == (loss is not None)
        assert "AutoTokenizer" in card


def test_what_is_missing_is_done_later(run, tmp_path, monkeypatch):
    """An export that failed or was removed, or that nobody asked for before; samples that came to nothing."""
    (tmp_path / "run").mkdir()
    config, target = run(export_at_end=True, sample_prompts=("a",)), tmp_path / "run" / "hf"

    def fail(*_):
        raise OSError("no space")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(Sampler, "sample", fail)
        finished(config)
    assert target.is_dir()  # samples that fail keep no export from being made
    with monkeypatch.context() as patch:
        patch.setattr(finish, "export", fail)
        assert len(finished(config)[0]) == 1
    shutil.rmtree(target)
    assert finished(config) == ([], target)
    assert target.is_dir()
    (tmp_path / "run" / "finished.json").write_text("[broken")
    written = (target / "model.safetensors").stat().st_mtime_ns
    assert finished(config) == ([], target), "samples.jsonl says what was sampled"
    assert (target / "model.safetensors").stat().st_mtime_ns > written
    (tmp_path / "run" / "samples.jsonl").unlink()
    assert len(finished(config)[0]) == 1


@pytest.mark.parametrize(
    ("prompt", "add_bos", "message"),
    [
        ("x" * 40, True, r"sample_prompts: 'xxx.*' has 41 tokens, and with 16 new ones the model has room for 16"),
        ("", False, r"sample_prompts: '' cannot be continued: row 0: the prompt is empty"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused_at_the_start(run, prompt, add_bos, message):
    with pytest.raises(ValueError, match=message):
        finish.check(run(sample_prompts=("a", prompt), add_bos=add_bos))


def test_a_model_that_no_family_expresses_is_refused_at_the_start(run):
    config = run(export_at_end=True)
    finish.check(config)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, position_embedding="xpos", attention_prune_below=0.1)
    )
    with pytest.raises(ValueError, match=r"cannot express this model: attention_prune_below is 0\.1, there 0\.0"):
        finish.check(config)
    finish.check(dataclasses.replace(config, export_at_end=False))


def test_a_report_needs_matplotlib_at_the_start(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    finish.check(run())
    with pytest.raises(ModuleNotFoundError, match=r"report_at_end=true needs matplotlib, .*pip install matplotlib"):
        finish.check(run(report_at_end=True))


def test_what_a_signal_leaves_undone_is_done_later_and_a_report_has_what_came_after_it(run, tmp_path, monkeypatch):
    config, report = run(sample_prompts=("a",), report_at_end=True), tmp_path / "run" / "report.html"
    report.parent.mkdir()
    (report.parent / "metrics.jsonl").write_text('{"step": 5, "loss": 2.0}\n')
    monkeypatch.setattr(plots, "check", lambda asked: None)
    monkeypatch.setattr(plots, "draw", lambda *args: b"png")
    sampler = Sampler(config, ByteTransformer(config.model), 5, lambda: True)
    assert finished(config, stopped=True) == ([], None) and not report.exists()
    rounds = TaskRounds(config, ByteTransformer(config.model), 5, lambda: True)
    assert not finish.is_done(config, 5, sampler, rounds)
    assert finished(config)[0][1:] == [f"report: {report}"]
    assert finish.is_done(config, 5, Sampler(config, ByteTransformer(config.model), 5, lambda: True), rounds)
    assert "<b>a</b>" in report.read_text(encoding="utf-8")
    assert finished(config) == ([], None)
    more = dataclasses.replace(config, sample_prompts=("a", "b"))
    assert len(finished(more)[0]) == 3 and "<b>b</b>" in report.read_text(encoding="utf-8")


def drawn_by_fakes(monkeypatch):
    monkeypatch.setattr(plots, "check", lambda asked: None)
    monkeypatch.setattr(plots, "draw", lambda *args: b"png")
    monkeypatch.setattr(heatmap, "draw", lambda loads: b"heat")


@pytest.mark.parametrize("report_at_end", [False, True])
def test_the_loads_of_experts_are_drawn_with_a_report_and_without(run, tmp_path, monkeypatch, report_at_end):
    config, picture = run(report_at_end=report_at_end), tmp_path / "run" / "router_load.png"
    picture.parent.mkdir()
    (picture.parent / "metrics.jsonl").write_text('{"step": 5, "loss": 2.0}\n')
    drawn_by_fakes(monkeypatch)
    page = [f"report: {picture.parent / 'report.html'}"] * report_at_end
    told = [f"load of experts: {picture}"]
    assert finished(config) == (page, None) and not picture.exists(), "a run without experts"
    (picture.parent / "router_load.jsonl").write_text('{"step": 5, "load": {"0": [0.5, 0.5]}}\n')
    assert finished(config) == (told, None) and picture.read_bytes() == b"heat"
    assert finished(config) == ([], None), "both are there"
    assert finished(config, step=6)[0] == page + told, "there are more lines"
    picture.unlink()
    assert finished(config, step=6) == (told, None) and picture.is_file()
    picture.unlink()
    picture.mkdir()
    with pytest.raises(
        OSError, match=r"router_load\.png could not be written: Is a directory; there is a folder where"
    ):
        finished(config, step=6)


def test_loads_that_cannot_be_drawn_end_no_run_and_are_drawn_later(run, tmp_path, monkeypatch):
    config, picture = run(), tmp_path / "run" / "router_load.png"
    picture.parent.mkdir()
    (picture.parent / "router_load.jsonl").write_text('{"step": 5, "load": {"0": [0.5, 0.5]}}\n')
    model = ByteTransformer(config.model)
    sampler, rounds = Sampler(config, model, 5, lambda: True), TaskRounds(config, model, 5, lambda: True)
    assert finished(config, stopped=True) == ([], None) and not finish.is_done(config, 5, sampler, rounds)
    picture.write_bytes(b"of an earlier end")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        patch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
        (said,) = finished(config)[0]
    assert said.startswith(f"load of experts: {picture} needs matplotlib, and matplotlib")
    assert said.endswith(" is not installed: pip install matplotlib; the same command then draws it")
    assert finish.is_done(config, 5, sampler, rounds)
    drawn_by_fakes(monkeypatch)
    assert finished(config) == ([f"load of experts: {picture}"], None) and picture.read_bytes() == b"heat"
