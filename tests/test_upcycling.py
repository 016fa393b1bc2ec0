"""Dense models as models with experts: the same logits, or a refusal, and convert.py upcycle."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.grids import mostly_slow
from helpers.tiny_documents import save_byte_tokenizer
from helpers.training import river_run
from helpers.variants import call

from stellarbyte_jax.checkpoint.store import CheckpointError
from stellarbyte_jax.checkpoint.weights import load_weights, save_initial
from stellarbyte_jax.cli.convert import main
from stellarbyte_jax.config import ByteConfig, ConfigError, override
from stellarbyte_jax.hf.directory import save_pretrained
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes
from stellarbyte_jax.model.io import Inputs
from stellarbyte_jax.training import begin
from stellarbyte_jax.upcycling import upcycle, upcycled_config

DENSE = ByteConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=2,
    max_position_embeddings=32,
    layer_scale_init=0.5,
    compute_dtype="float32",
)
COPIES = {
    "two of eight": "num_experts=8 num_experts_per_tok=2",
    "one of three, sigmoid": "num_experts=3 num_experts_per_tok=1 scoring_func=sigmoid",
    "the first layer dense": "num_experts=4 first_k_dense_replace=1",
    "every second layer dense": "num_experts=4 decoder_sparse_step=2",
    "two layers dense": "num_experts=4 mlp_only_layers=[1,2]",
    "as many as needed, in groups": "num_experts=8 num_experts_per_tok=3 dynamic_k=0.3 n_group=4 topk_group=2",
    "a gate that reads contexts": "num_experts=5 gate=context context_size=6 history_decay=0.5",
}
SLICES = {
    "halves": "num_experts=8 num_experts_per_tok=2 intermediate_size=12",
    "thirds of two copies, sigmoid": "num_experts=12 num_experts_per_tok=6 intermediate_size=8 scoring_func=sigmoid",
    "halves, in groups": "num_experts=12 num_experts_per_tok=4 intermediate_size=12 n_group=3 topk_group=2",
    "quarters, a gate that reads contexts": "num_experts=20 num_experts_per_tok=4 intermediate_size=6 gate=context",
}
ALL = COPIES | SLICES
# More copies of the same kind; other dense layers; slices and sigmoids that others have.
REPEATED = ("two of eight", "every second layer dense", "thirds of two copies, sigmoid")
REFUSED = {
    "norm_topk_prob=false": "moe.norm_topk_prob=false: ",
    "routed_scaling_factor=2.5": "moe.routed_scaling_factor=2.5: ",
    "n_shared_experts=1": "moe.n_shared_experts=1: ",
    "shared_pool=true": "moe.shared_pool=true: ",
    "intermediate_size=10": "moe.intermediate_size 10 does not divide the intermediate_size 24",
    "intermediate_size=48": "moe.intermediate_size 48 does not divide",
    "intermediate_size=8": "moe.num_experts 8 must be a multiple of 3",
    "intermediate_size=12 num_experts_per_tok=3": "moe.num_experts_per_tok 3 must be a multiple of 2",
    "intermediate_size=12 n_group=8 topk_group=4": "(moe.n_group 8) are no whole copies",
    "intermediate_size=12 dynamic_k=0.5": "with moe.dynamic_k a token would get some slices",
    "intermediate_size=12 noise=gumbel": "with moe.noise a token",
    "intermediate_size=12 router_warmup_steps=5": "with moe.router_warmup_steps a token",
}


def overrides(text):
    return [f"moe.{setting}" for setting in text.split()]


def some_weights(config):
    numbers = np.random.default_rng(0)
    shapes = param_shapes(ByteTransformer(config))
    return jax.tree.map(lambda leaf: 0.5 * numbers.standard_normal(leaf.shape, np.float32), shapes)


@pytest.fixture(scope="module")
def params():
    return some_weights(DENSE)


def logits_of(config, params):
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (3, 24)).astype(np.int32)
    return np.asarray(call(ByteTransformer(config), jax.device_put(params), Inputs(jax.device_put(tokens)))[0])


def columns_of(config, params):
    """How many experts have routers of their own in each layer: of columns that differ."""
    kernels = [stack["moe"]["router"]["kernel"] for stack in params["layers"].values() if "moe" in stack]
    return {len({column.tobytes() for column in kernel.T}) for stack in kernels for kernel in stack}


@pytest.mark.parametrize("name", mostly_slow(ALL, *(name for name in ALL if name not in REPEATED)))
def test_logits_stay_as_they_are(params, name):
    config = upcycled_config(DENSE, overrides(ALL[name]))
    made = upcycle(DENSE, params, config)
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, param_shapes(ByteTransformer(config)))
    np.testing.assert_allclose(logits_of(config, made), logits_of(DENSE, params), rtol=0, atol=1e-5)
    slices = 24 // config.expert_size
    assert columns_of(config, made) == {config.moe.num_experts // slices}


def test_settings_of_experts_alone_are_applied():
    config = upcycled_config(DENSE, overrides("num_experts=4 num_experts_per_tok=1"))
    assert config == dataclasses.replace(DENSE, moe=config.moe)
    assert (config.moe.num_experts, config.moe.num_experts_per_tok) == (4, 1)


def test_experts_are_copies_and_the_seed_is_of_the_routers(params):
    config = upcycled_config(DENSE, overrides("num_experts=4 mlp_only_layers=[1]"))
    one, other = (upcycle(DENSE, params, config, seed=seed) for seed in (0, 1))
    (dense, row), (stack, at) = config.layer_places[1], config.layer_places[3]
    mlps = params["layers"]["0"]["mlp"]
    for name, source in mlps.items():
        np.testing.assert_array_equal(one["layers"][str(dense)]["mlp"][name][row], source[1])
        for expert in range(4):
            np.testing.assert_array_equal(one["layers"][str(stack)]["moe"]["experts"][name][at, expert], source[3])
    kernels = [made["layers"][str(stack)]["moe"]["router"]["kernel"] for made in (one, other)]
    assert not np.array_equal(*kernels)
    again = upcycle(DENSE, params, config)["layers"][str(stack)]["moe"]["router"]["kernel"]
    np.testing.assert_array_equal(kernels[0], again)


def test_noise_is_a_share_of_the_spread_of_each_matrix_and_parts_the_experts(params):
    config = upcycled_config(DENSE, overrides("num_experts=3"))
    plain, noisy = (upcycle(DENSE, params, config, noise=noise) for noise in (0.0, 0.1))
    for name, x in plain["layers"]["0"]["moe"]["experts"].items():
        added = noisy["layers"]["0"]["moe"]["experts"][name] - x
        assert not np.array_equal(added[:, 0], added[:, 1])
        share = np.std(added, axis=(0, 1)).mean() / np.std(x, axis=tuple(range(2, x.ndim))).mean()
        assert 0.08 < share < 0.12
    moved = np.abs(logits_of(config, noisy) - logits_of(DENSE, params)).max()
    assert 1e-3 < moved
    half = upcycle(DENSE, jax.tree.map(lambda x: x.astype("bfloat16"), params), config, noise=0.1)
    assert {x.dtype.name for x in half["layers"]["0"]["moe"]["experts"].values()} == {"bfloat16"}
    other = upcycle(DENSE, params, config, noise=0.1, seed=1)["layers"]["0"]["moe"]["experts"]
    assert not np.array_equal(other["down"], noisy["layers"]["0"]["moe"]["experts"]["down"]), "the seed is of the noise"


@pytest.mark.parametrize(("settings", "message"), REFUSED.items())
def test_what_would_compute_something_else_is_refused(settings, message):
    with pytest.raises(ConfigError) as refused:
        upcycled_config(DENSE, overrides(f"num_experts=8 {settings}"))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_groups_that_a_token_may_all_use_part_no_copy():
    config = upcycled_config(DENSE, overrides("num_experts=8 intermediate_size=12 n_group=8 topk_group=8"))
    assert config.moe.n_group == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((), "Give moe.num_experts=N"),
        (("moe.num_experts=0",), "Give moe.num_experts=N"),
        (("moe.num_experts=4", "hidden_size=8"), "setting 'hidden_size=8': upcycle takes settings of experts alone"),
        (("moe.num_expert=4",), "moe.num_experts"),
    ],
)
def test_settings_that_are_missing_or_of_something_else(settings, message):
    with pytest.raises(ConfigError, match=r"moe\.num_experts") as refused:
        upcycled_config(DENSE, settings)
    assert message in str(refused.value)


def test_a_noise_that_is_no_share_is_refused(params):
    for noise in (-1, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=f"noise {noise} is no share of the weights"):
            upcycle(DENSE, params, upcycled_config(DENSE, overrides("num_experts=3")), noise=noise)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, params):
    """A dense run, beside its tokenizer and one with experts; not to be written to."""
    folder = tmp_path_factory.mktemp("upcycling")
    save_byte_tokenizer(folder / "bytes")
    save_initial(folder / "dense", DENSE, params, str(folder / "bytes"), add_bos=False)
    assert main(["upcycle", str(folder / "dense"), str(folder / "experts"), "moe.num_experts=2"]) == 0
    return folder / "dense"


def test_the_command_makes_a_run_of_a_run_and_of_a_directory(run_dir, tmp_path, params, capsys):
    settings = overrides(COPIES["two of eight"])
    save_pretrained(tmp_path / "hf", ByteTransformer(dataclasses.replace(DENSE, layer_scale_init=None)), bare(params))
    for source, target in ((run_dir, "a"), (run_dir / "checkpoints" / "0", "b"), (tmp_path / "hf", "c")):
        assert main(["upcycle", str(source), str(tmp_path / target), *settings]) == 0
        told = capsys.readouterr().out
        assert "experts: 8 of 24 channels in 4 of 4 layers, 2 for each token" in told
        assert f"the logits are those of {source}" in told
        config, made = load_weights(tmp_path / target)
        assert config.model.moe.num_experts == 8 and config.init_from == str(source)
        dense = params if target < "c" else bare(params)
        before = DENSE if target < "c" else dataclasses.replace(DENSE, layer_scale_init=None)
        model = dataclasses.replace(config.model, compute_dtype="float32")
        np.testing.assert_allclose(logits_of(model, made), logits_of(before, dense), rtol=0, atol=1e-5)
    config, _ = load_weights(tmp_path / "a")
    assert config.data.tokenizer == str(tmp_path / "a" / "tokenizer") and not config.data.add_bos
    assert (tmp_path / "a" / "tokenizer" / "tokenizer.json").is_file()


def bare(params):
    stack = {name: x for name, x in params["layers"]["0"].items() if not name.endswith("_scale")}
    return {**params, "layers": {"0": stack}}


def test_seed_and_noise_of_the_command(run_dir, tmp_path, capsys):
    for target, *options in (("b", "--seed", "3"), ("c", "--noise", "0.1")):
        assert main(["upcycle", str(run_dir), str(tmp_path / target), "moe.num_experts=2", *options]) == 0
    assert "noise: experts differ from the MLPs by 0.1 of their spread" in capsys.readouterr().out
    places = {"a": run_dir.parent / "experts", "b": tmp_path / "b", "c": tmp_path / "c"}
    moe = {name: load_weights(place)[1]["layers"]["0"]["moe"] for name, place in places.items()}
    assert not np.array_equal(moe["a"]["router"]["kernel"], moe["b"]["router"]["kernel"])
    assert not np.array_equal(moe["a"]["experts"]["down"], moe["c"]["experts"]["down"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("DENSE", "out", "moe.num_experts=8", "moe.norm_topk_prob=false"), "moe.norm_topk_prob=false: "),
        (("DENSE", "dense", "moe.num_experts=8"), "give another target directory"),
        (("experts", "out", "moe.num_experts=8"), "the model has 2 experts already"),
    ],
)
def test_the_command_refuses_in_one_line(run_dir, capsys, arguments, message):
    source, target, *settings = arguments
    assert main(["upcycle", str(run_dir.parent / source.lower()), str(run_dir.parent / target), *settings]) != 0
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (run_dir.parent / "out").exists()


def test_a_router_that_no_task_teaches_and_capacity_are_told(run_dir, tmp_path, capsys):
    for k, more in ((1, ""), (2, " dispatch=capacity")):
        settings = overrides(f"num_experts=2 num_experts_per_tok={k}{more}")
        assert main(["upcycle", str(run_dir), str(tmp_path / str(k)), *settings]) == 0
        told = capsys.readouterr().out
        assert ("routers learn from losses of balance alone" in told) == (k == 1)
        assert ("moe.dispatch=capacity: in training" in told) == (k == 2)


@pytest.mark.parametrize("there", ["dense", "experts"])
def test_a_run_says_which_command_makes_experts_of_a_dense_model(run_dir, tmp_path, there):
    here = DENSE if there == "experts" else override(DENSE, ["moe.num_experts=2"])
    config = river_run(tmp_path, here, tokenizer=run_dir.parent / "bytes", init_from=str(run_dir.parent / there))
    with pytest.raises(CheckpointError, match="convert upcycle") as refused:
        begin.check(config)
    assert str(run_dir.parent / there) in str(refused.value) and "\n" not in str(refused.value)
