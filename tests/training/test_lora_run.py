"""Runs of adapters: what they begin with, keep, go on from and leave behind."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hf_models import assert_same_tree, edit_tensors
from helpers.runs import same_weights
from helpers.tiny_documents import save_byte_tokenizer
from helpers.training import flat, river_run

from stellarbyte_jax.checkpoint.bundle import load_bundle
from stellarbyte_jax.checkpoint.source import find_source
from stellarbyte_jax.checkpoint.store import CheckpointError
from stellarbyte_jax.checkpoint.weights import load_config, load_weights, save_initial
from stellarbyte_jax.cli.convert import main as convert
from stellarbyte_jax.cli.train import main
from stellarbyte_jax.config import ByteConfig, CheckpointConfig, ConfigError, MeshConfig, OptimizerConfig
from stellarbyte_jax.hf.directory import from_pretrained, save_pretrained
from stellarbyte_jax.lora import merge_adapters, split
from stellarbyte_jax.model.decoder import ByteTransformer, init_params
from stellarbyte_jax.model.trees import merge, paths
from stellarbyte_jax.training import placement
from stellarbyte_jax.training.run import train

MODEL = ByteConfig(
    vocab_size=300,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=32,
    rms_norm_eps=1e-6,
    compute_dtype="float32",
)
LORA = {"r": 2, "target_modules": ("q", "down", "head"), "layers": (1,), "base_dtype": "bfloat16", "dropout": 0.1}


@functools.cache
def weights():
    return jax.tree.map(np.asarray, jax.jit(lambda: init_params(ByteTransformer(MODEL), jax.random.key(0)))())


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax mixes float and integer types inside
        yield


@pytest.fixture
def hf(tmp_path) -> Path:
    tokenizer = save_byte_tokenizer(tmp_path / "bytes")
    save_pretrained(tmp_path / "hf", ByteTransformer(MODEL), weights(), tokenizer=tokenizer)
    return tmp_path / "hf"


def settings(tmp_path, source, name="run", lora=LORA, **changes):
    """A run of two steps whose model is that of ``source``."""
    changes = {"ema_decay": 0.5, "optimizer": OptimizerConfig(learning_rate=0.05), **changes}
    changes = {"model": ByteConfig(lora=lora), "init_from": str(source), **changes}
    config = river_run(tmp_path, **changes)
    return dataclasses.replace(config, output_dir=str(tmp_path / name))


def stored(run, step=None):
    """All weights of a run with the adapters beside them."""
    return find_source(run, step).stored()


def test_a_run_is_exact_keeps_adapters_alone_and_leaves_merged_weights(hf, tmp_path, capsys):
    assert train(settings(tmp_path, hf, "straight", steps=4)).exit_code == 0
    assert train(settings(tmp_path, hf, steps=2)).exit_code == 0
    assert train(settings(tmp_path, hf, steps=4, export_at_end=True)).exit_code == 0
    printed = capsys.readouterr().out
    adapters = 2 * (2 * (16 + 16) + 2 * (24 + 16)) + 2 * (16 + 300)
    assert f", {adapters:,} trained" in printed and f"resumed at step 2 from {tmp_path / 'run'}\n" in printed
    (config, params), (_, expected) = stored(tmp_path / "run"), stored(tmp_path / "straight")
    assert same_weights(params, expected)

    held = load_weights(tmp_path / "run")[1]
    assert all("_lora_" in path for path in paths(held)) and config.lora.r == 2
    found, base = split(params)
    assert_same_tree(jax.tree.map(np.asarray, base), weights())
    scale = held["layers"]["0"]["attn"]["q_lora_scale"]
    np.testing.assert_array_equal(scale, np.asarray([0, 8], np.float32))
    learnt = held["layers"]["0"]["attn"]["q_lora_b"]
    assert np.any(learnt[1]) and not np.any(learnt[0])

    bundle = load_bundle(tmp_path / "run")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 and x.shape != (2, 16) else x, base)
    _, merged = merge_adapters(ByteTransformer(config), merge(found, rounded))
    assert bundle.model.config == dataclasses.replace(config.without_adapters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), bundle.params, merged)
    exported = flat(from_pretrained(tmp_path / "run" / "hf")[1])
    for path, x in flat(bundle.params).items():
        np.testing.assert_allclose(exported[path], x, rtol=1e-6, err_msg=path)
    convert(["to-hf", str(tmp_path / "run"), str(tmp_path / "again")])
    again = flat(from_pretrained(tmp_path / "again")[1])
    for path, x in exported.items():
        np.testing.assert_array_equal(again[path], x, err_msg=path)


@pytest.mark.slow
def test_a_run_goes_to_peft_and_another_begins_with_what_is_written(hf, tmp_path, capsys):
    lora = {"r": 2, "target_modules": ("q", "gate_up", "head"), "layers": (1,)}
    assert train(settings(tmp_path, hf, lora=lora)).exit_code == 0
    run, adapter = tmp_path / "run", tmp_path / "adapter"
    assert convert(["to-peft", str(run), str(adapter)]) == 0
    assert f"wrote {adapter}: adapters of {hf}\n" in capsys.readouterr().out
    bundle, expected = load_bundle(adapter), load_bundle(run)
    assert (bundle.stop_ids, bundle.add_bos) == (expected.stop_ids, expected.add_bos)
    assert bundle.tokenizer.is_same(expected.tokenizer) and bundle.tokenizer.path == str(adapter)
    assert same_weights(bundle.params, expected.params)

    assert train(settings(tmp_path, adapter, "next", lora=lora)).exit_code == 0
    (_, begun), (_, there) = stored(tmp_path / "next"), find_source(adapter).weights()
    assert_same_tree(split(begun)[1], there)
    capsys.readouterr()
    assert convert(["to-peft", str(tmp_path / "next"), str(tmp_path / "more")]) == 1
    assert "of these adapters is an adapter itself" in capsys.readouterr().err
    assert train(settings(tmp_path, run, "third", lora=lora)).exit_code == 0
    assert convert(["to-peft", str(tmp_path / "third"), str(tmp_path / "more")]) == 1
    assert "is a run, which PEFT cannot read: write it with convert to-hf" in capsys.readouterr().err


def test_a_base_that_moved_or_changed_is_told_and_named_anew(hf, tmp_path):
    assert train(settings(tmp_path, hf)).exit_code == 0
    before = stored(tmp_path / "run")[1]
    moved = tmp_path / "moved"
    hf.rename(moved)
    why = rf"{tmp_path}/run holds adapters of the weights that lay in {hf}: {hf} cannot be read: .*Put those back"
    with pytest.raises(CheckpointError, match=why):
        load_bundle(tmp_path / "run")
    with pytest.raises(CheckpointError, match="init_from set to where they are now"):
        train(settings(tmp_path, hf, steps=3))
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()  # it is not what is broken
    assert train(settings(tmp_path, moved, steps=3)).exit_code == 0
    assert_same_tree(split(stored(tmp_path / "run")[1])[1], split(before)[1])
    edit_tensors(moved, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].__setitem__((3, 4), 9.0))
    with pytest.raises(CheckpointError, match=rf"{moved} holds other weights now"):
        load_bundle(tmp_path / "run")


def test_a_run_with_adapters_is_a_base_of_others(hf, tmp_path):
    """Of a run of all weights, and of one with adapters of its own: with the merged weights."""
    assert train(settings(tmp_path, hf, "first")).exit_code == 0
    expected = find_source(tmp_path / "first").weights()[1]
    nothing = OptimizerConfig(learning_rate=1e-30)
    assert train(settings(tmp_path, tmp_path / "first", "whole", lora={}, optimizer=nothing)).exit_code == 0
    found = load_weights(tmp_path / "whole")[1]
    assert_same_tree(jax.tree.map(np.asarray, expected), found)
    lora = {"r": 1, "target_modules": ("v",)}
    assert train(settings(tmp_path, tmp_path / "first", "second", lora=lora, optimizer=nothing)).exit_code == 0
    assert load_config(tmp_path / "second").model.lora.r == 1
    assert_same_tree(jax.tree.map(np.asarray, find_source(tmp_path / "second").weights()[1]), found)
    base = json.loads((tmp_path / "second" / "checkpoints" / "2" / "base" / "metadata").read_text())
    assert base["path"] == str(tmp_path / "first" / "checkpoints" / "2")
    train(settings(tmp_path, hf, "first", steps=3))  # its newest step is another one now
    find_source(tmp_path / "second").weights()


def test_what_routers_keep_goes_on_beside_a_frozen_base(hf, tmp_path):
    """It is the run's own, and in its checkpoints."""
    moe = {"num_experts": 4, "intermediate_size": 8, "bias_update_rate": 0.1}
    model = dataclasses.replace(MODEL, moe=moe, num_hidden_layers=1)
    network = ByteTransformer(model)
    initial = jax.tree.map(np.asarray, jax.jit(lambda: init_params(network, jax.random.key(1)))())
    save_initial(tmp_path / "base", model, initial, str(tmp_path / "bytes"))
    lora = {"r": 2, "target_modules": ("experts", "router"), "base_dtype": "bfloat16"}
    given = {"model": dataclasses.replace(model, lora=lora), "tokenizer": tmp_path / "bytes"}
    for name, steps in (("straight", 3), ("run", 2), ("run", 3)):
        assert train(settings(tmp_path, tmp_path / "base", name, steps=steps, **given)).exit_code == 0
    (config, params), (_, expected) = stored(tmp_path / "run"), stored(tmp_path / "straight")
    assert same_weights(params, expected) and config.moe.num_experts == 4
    learnt, base = split(params)
    tracked = base["layers"]["0"]["moe"]["router"].pop("tracked")
    assert np.any(tracked["bias"]) and np.all(tracked["steps"] == 3) and learnt
    before = jax.tree.map(lambda x: x, initial)
    before["layers"]["0"]["moe"]["router"].pop("tracked")
    assert_same_tree(jax.tree.map(np.asarray, base), before)
    with pytest.raises(ConfigError, match=r"moe.rebalance_interval changes weights of experts, which are frozen"):
        dataclasses.replace(config, moe={**config.moe.to_dict(), "rebalance_interval": 5})


@pytest.mark.slow
def test_a_run_goes_on_on_a_mesh(hf, tmp_path, monkeypatch):
    lora = {**LORA, "target_modules": ("q", "down", "embed", "head"), "dropout": 0.0}
    model = dataclasses.replace(MODEL, lora=lora)  # float32, which the model of the directory is not
    steady = {"model": model, "tokenizer": hf, "optimizer": OptimizerConfig(learning_rate=0.05, eps=1e-2)}
    assert train(settings(tmp_path, hf, "one", steps=3, **steady)).exit_code == 0
    monkeypatch.setattr(placement, "devices", lambda: jax.devices()[:4])
    mesh = MeshConfig(data=1, fsdp=2, tensor=2)
    assert train(settings(tmp_path, hf, mesh=mesh, **steady)).exit_code == 0
    assert train(settings(tmp_path, hf, mesh=mesh, steps=3, **steady)).exit_code == 0
    found, expected = load_weights(tmp_path / "run")[1], load_weights(tmp_path / "one")[1]
    for path, x in flat(expected).items():
        np.testing.assert_allclose(flat(found)[path], x, atol=1e-4, err_msg=path)
    mesh = placement.mesh_of(settings(tmp_path, hf, mesh=mesh, **steady))
    with jax.set_mesh(mesh):
        split_weights = find_source(tmp_path / "run").weights()[1]
    kernel = split_weights["lm_head"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (8, 150)
    whole = flat(find_source(tmp_path / "run").weights()[1])
    for path, x in flat(split_weights).items():
        np.testing.assert_allclose(x, whole[path], atol=1e-6, err_msg=path)


REFUSED = {
    "no base": ({"init_from": None, "model": dataclasses.replace(MODEL, lora=LORA)}, "name these by init_from"),
    "a target": ({"lora": {"r": 2, "target_modules": ("experts",)}}, "names experts, which the model does not have"),
    "layers": ({"lora": {"r": 2, "layers": (7,)}}, "lora.layers names 7, there are 2 layers from 0"),
    "an export": (
        {"lora": {"r": 2, "activation": "silu"}, "export_at_end": True},
        "with model.lora.activation=silu cannot be",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_settings_are_told_before_anything_is_written(kind, hf, tmp_path):
    changes, why = REFUSED[kind]
    changes = dict(changes)
    with pytest.raises(ConfigError, match=why):
        config = settings(tmp_path, hf, **({"lora": changes.pop("lora")} if "lora" in changes else {}))
        train(dataclasses.replace(config, **changes))
    assert not (tmp_path / "run").exists()


def test_an_unknown_target_is_one_line_of_the_command(hf, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("")
    config = tmp_path / "c.py"
    config.write_text(
        "from stellarbyte_jax.config import *\n"
        "def config():\n"
        f"    return TrainConfig(output_dir={str(tmp_path / 'run')!r}, steps=200, init_from={str(hf)!r})\n"
    )
    assert main(["--config", str(config), "--set", "model.lora.r=4", "model.lora.target_modules=q_proj,wq"]) == 2
    told = capsys.readouterr().err
    assert (
        told.startswith("error: lora.target_modules names wq; there are q, k, v, o, gate_up") and told.count("\n") == 1
    )


def test_what_a_run_of_adapters_may_change_when_it_goes_on(hf, tmp_path, capsys):
    lora = {**LORA, "activation": "relu", "dropout": 0.0}
    config = settings(tmp_path, hf, lora=lora, checkpoint=CheckpointConfig(interval=1))
    assert train(config).exit_code == 0
    for name, value in (
        ("r", 3),
        ("lora_alpha", 8.0),
        ("rslora", True),
        ("layers", (0, 1)),
        ("target_modules", ("q",)),
    ):
        with pytest.raises(CheckpointError, match=rf"model.lora.{name} is .* there and .* here"):
            train(settings(tmp_path, hf, lora={**lora, name: value}, steps=3))
    with pytest.raises(CheckpointError, match=r"model.lora.r is 2 there and 0 here"):
        train(settings(tmp_path, hf, lora={}, steps=3))
    capsys.readouterr()
    assert train(settings(tmp_path, hf, lora={**lora, "regularization": 0.1}, steps=3)).exit_code == 0
    assert "setting changed: model.lora.regularization 0.0 -> 0.1" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"adapters with model.lora.activation=relu, which cannot be merged"):
        train(settings(tmp_path, tmp_path / "run", "other", lora={}))
    bundle = load_bundle(tmp_path / "run")  # adapters beside the weights
    assert bundle.model.config.lora.activation == "relu" and "q_lora_a" in bundle.params["layers"]["0"]["attn"]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3" / "base")
    with pytest.raises(CheckpointError, match="base of it is missing"):
        load_bundle(tmp_path / "run")
