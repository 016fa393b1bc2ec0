"""Whole runs of models with memory and of the other ideas: exact resume, evaluation that remembers, new positions."""

import contextlib
import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from helpers.runs import cli, log_of, same_weights, write_config
from helpers.training import MODEL, settings, some_weights

from stellarbyte_jax.checkpoint.store import Checkpointer
from stellarbyte_jax.checkpoint.weights import load_weights, save_initial
from stellarbyte_jax.config import ByteConfig, DataConfig, MemoryConfig, RopeScaling
from stellarbyte_jax.inference.api import generate, remember
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.io import State
from stellarbyte_jax.model.state.memory import Memory
from stellarbyte_jax.training import resume
from stellarbyte_jax.training.optimizer import make_optimizer
from stellarbyte_jax.training.run import evaluate
from stellarbyte_jax.training.state import state_shapes

SETTINGS = (
    "data.arrangement=contiguous",
    "model.memory.length=[24, 0]",
    "model.memory.recent_share=0.75",
    "model.position_embedding=xpos",
    "model.xpos_learnable=true",
    "model.parallel_residual=true",
    "model.layer_scale_init=0.1",
    "model.drop_path=0.2",
    "loss.xpos_regularization=0.1",
    "gradient_accumulation_steps=2",
    "model.vocab_size_multiple=64",
    "model.moe.num_experts=3",
    "model.moe.intermediate_size=8",
    "model.moe.bias_update_rate=0.01",
    "model.moe.first_k_dense_replace=1",
    "steps=10",
    "checkpoint.interval=4",
    "checkpoint.keep_latest=9",
    "evaluation.interval=5",
)


def test_resume_with_memory_is_exact(tmp_path, capsys):
    """10 steps against 4, a lost run, and 6 more: documents go on in the middle, and so does what is remembered.

    In a dense layer and in one with experts.
    """
    straight = write_config(tmp_path)
    assert cli(straight, *SETTINGS) == 0
    run = tmp_path / "run"
    wanted, weights = log_of(run), load_weights(run)[1]
    for step in (run / "checkpoints").iterdir():
        if step.name != "4":
            shutil.rmtree(step)
    assert cli(straight, *SETTINGS) == 0
    said = capsys.readouterr().out
    assert "resumed at step 4" in said
    assert "scripts/generate.py" in said and "scripts/convert.py" not in said  # no family expresses this model
    assert log_of(run) == wanted
    assert same_weights(load_weights(run)[1], weights)
    rates = [weights["layers"][stack]["attn"]["xpos_rate"] for stack in ("0", "1")]
    assert np.shape(rates) == (2, 1, 4) and np.all(np.isfinite(rates))


def test_memory_needs_rows_that_continue(tmp_path, capsys):
    assert cli(write_config(tmp_path), "model.memory.length=8") == 2
    assert "set data.arrangement=contiguous" in capsys.readouterr().err


def test_evaluation_remembers_from_batch_to_batch():
    class Silent:
        def validation(self, *_):
            pass

    seen = []

    def run_eval(params, batch, memory):
        seen.append((batch, memory))
        return {
            "tokens": jnp.ones(()),
            "cross_entropy": jnp.ones(()),
            "correct": jnp.ones(()),
            "bytes": jnp.ones(()),
        }, (f"after {batch}")

    evaluate(run_eval, {}, ["a", "b", "c"], 2, Silent(), "nothing", lambda: False)
    assert seen == [("a", "nothing"), ("b", "after a")]


def test_converted_weights_may_get_other_positions(tmp_path, capsys):
    """A run that begins with weights of another one stretches them, and says so; another shape it refuses."""
    config_file = write_config(tmp_path)
    model = ByteConfig(
        vocab_size=1280,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    save_initial(tmp_path / "run", model, some_weights(model))
    longer = ("model.max_position_embeddings=256", "model.rope_scaling.name=linear", "model.rope_scaling.factor=4")
    windows = ("model.sliding_window=16", "model.layer_types=sliding_attention,full_attention")
    assert cli(config_file, *longer, "model.parallel_residual=true") == 1
    assert "holds another model: model.parallel_residual is False there" in capsys.readouterr().err
    no_validation = ("data.validation=[]", "evaluation.interval=500", "evaluation.batches=50")
    assert cli(config_file, *longer, *windows, *no_validation, "steps=4", "schedule.warmup_steps=1") == 0
    out = capsys.readouterr().out
    assert "get other positions: model.layer_types is " in out
    assert "get other positions: model.max_position_embeddings is 64 there and 256 here" in out
    assert load_weights(tmp_path / "run")[0].model.rope_scaling == RopeScaling(name="linear", factor=4.0)
    assert cli(config_file, "steps=6", "model.max_position_embeddings=64") == 1
    assert "max_position_embeddings is 256 there" in capsys.readouterr().err


def test_a_model_with_memory_can_begin_a_run_and_generate(tmp_path):
    model = ByteTransformer(
        ByteConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            memory=MemoryConfig(length=12),
            compute_dtype="float32",
        )
    )
    save_initial(tmp_path / "run", model.config, some_weights(model.config))
    config, loaded = load_weights(tmp_path / "run")
    assert config.data.arrangement == "contiguous" and config.model == model.config
    memory = remember(model, loaded, list(range(1, 40)), segment_length=16)
    assert isinstance(memory, Memory) and int(memory.lengths_B[0]) == 39
    made = generate(model, loaded, [[5, 6]], max_new_tokens=6, memory=memory)
    assert made.tokens.shape == (1, 6)
    assert dataclasses.replace(model.config, memory=MemoryConfig(length=13)) != model.config


def test_a_run_from_weights_begins_with_an_empty_memory(tmp_path):
    model = dataclasses.replace(MODEL, memory={"length": (0, 6)})
    config = settings(model=model, data=DataConfig(sequence_length=16, arrangement="contiguous"))
    network = ByteTransformer(model)
    optimizer = make_optimizer(config, network)
    params = some_weights(model)
    save_initial(tmp_path / "run", model, params)
    with contextlib.closing(Checkpointer(tmp_path / "run", config.checkpoint)) as checkpointer:
        found = resume.restore(checkpointer, config, state_shapes(config, network, optimizer), optimizer, print)
    assert found is not None and found.data is None
    jax.tree.map(np.testing.assert_array_equal, found.state.params, params)
    jax.tree.map(np.testing.assert_array_equal, found.state.carried, State.initial(model, config.global_batch_size))
    assert found.state.carried.memory.slots == (0, 6)
