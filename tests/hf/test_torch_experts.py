"""Layers with experts in the modelling file: the numbers of this package, in transformers."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.grids import mostly_slow
from helpers.hf_models import NEEDS_TORCH, assert_same_tree, edit_config, edit_tensors, tensors
from helpers.torch_exports import PARTS, Exports, load, logits_of, modules_in
from helpers.variants import BASE, VARIANTS, make_model, run, with_twins

from stellarbyte_jax import generate
from stellarbyte_jax.config import LossConfig
from stellarbyte_jax.hf.directory import from_pretrained, round_params, save_pretrained
from stellarbyte_jax.hf.export import export_family
from stellarbyte_jax.hf.families import STELLARBYTE
from stellarbyte_jax.training.loss import batch_loss

torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
transformers = pytest.importorskip("transformers")

# Those of the network's own tests, whose gates read no history here, and what they leave out.
MODELS: dict[str, dict[str, Any]] = {
    name: settings | {"moe": {key: x for key, x in settings["moe"].items() if key != "history_decay"}}
    for name, settings in VARIANTS.items()
    if "moe" in settings
}
CONTEXT = next(name for name, settings in MODELS.items() if settings["moe"].get("gate") == "context")
SHARED = next(name for name, settings in MODELS.items() if settings["moe"].get("n_shared_experts"))
POOL = next(name for name, settings in MODELS.items() if settings["moe"].get("shared_pool"))
BESIDE = "a pool beside dense layers, shared experts, groups of one"
MODELS |= {
    "all that is of training, deepnorm, gelu": {
        "moe": {
            "num_experts": 6,
            "noise": "noisy_topk",
            "noise_scale": 0.5,
            "router_warmup_steps": 7,
            "dispatch": "capacity",
            "overflow": ("cold", "random"),
            "bias_update_rate": 0.1,
            "scoring_func": "sigmoid",
            "dynamic_k": 0.6,
        },
        "residual_scaling": "deepnorm",
        "hidden_act": "gelu",
        "tie_word_embeddings": True,
    },
    BESIDE: {
        "moe": {
            "num_experts": 3,
            "n_group": 3,
            "topk_group": 2,
            "decoder_sparse_step": 2,
            "n_shared_experts": 2,
            "intermediate_size": 20,
            "shared_pool": True,
            "adaptive_temperature": True,
            "temperature": 0.1,
        },
        "sliding_window": 4,
        "sink_tokens": 1,
        "layer_scale_init": 0.5,
        "vocab_size_multiple": 16,
    },
}
TRAINING = "all that is of training, deepnorm, gelu"
TOKENS_BT = np.random.default_rng(0).integers(1, 61, (2, 24), dtype=np.int32)
TOKENS = torch.from_numpy(TOKENS_BT.astype(np.int64))
THEIR_WARNINGS = pytest.mark.filterwarnings("ignore::FutureWarning")  # of one part of transformers about another


@pytest.fixture(autouse=True, scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exports]:
    with modules_in(tmp_path_factory.mktemp("exports")) as folder:
        yield Exports(folder, export)


def made(name: str, **changes: Any) -> tuple[Any, Any]:
    model, params = make_model(dataclasses.replace(BASE, **(MODELS[name] | changes)))
    return model, params if model.config.moe.rebalance_interval is None else with_twins(params, ((1, 4), (2, 5)))


def export(name: str, directory: Path, dtype: str = "float32", **changes: Any) -> tuple[Any, Any]:
    """A model of ours and its directory."""
    model, params = made(name, **changes)
    save_pretrained(directory, model, params, ids={"pad_token_id": 0}, family="stellarbyte", dtype=dtype)
    return model, params


def ours_of(name: str) -> np.ndarray:
    return np.asarray(run(*made(name), TOKENS_BT))


def routers(peer: Any) -> list[Any]:
    return [layer.mlp.router for layer in peer.model.layers if hasattr(layer.mlp, "router")]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_ours_whole_and_with_every_cache(name: str, exports: Exports) -> None:
    peer, ours = exports.peer(name), ours_of(name)
    assert np.abs(ours).max() > 1
    np.testing.assert_allclose(logits_of(peer, TOKENS_BT), ours, atol=1e-5, rtol=0)
    static = transformers.StaticCache(config=peer.config, max_cache_len=30)
    for cache in (transformers.DynamicCache(config=peer.config), static):
        parts = [logits_of(peer, TOKENS_BT[:, start:end], past_key_values=cache) for start, end in PARTS]
        np.testing.assert_allclose(np.concatenate(parts, axis=1), ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_it_comes_back_equal(name: str, dtype: str, exports: Exports) -> None:
    """What routers keep, too, and in files of 16 bits the whole router."""
    (model, params), hf = made(name), exports.directory(name, dtype=dtype)
    back, back_params = from_pretrained(hf, compute_dtype="float32")
    assert back.config == dataclasses.replace(model.config, head_dim=8, vocab_size_multiple=1)
    cut = params | {"embed": {"embedding": params["embed"]["embedding"][:61]}}
    if "lm_head" in params:
        cut["lm_head"] = {"kernel": params["lm_head"]["kernel"][:, :61]}
    assert_same_tree(back_params, round_params(cut, dtype, STELLARBYTE))
    for stack, layer in back_params["layers"].items():
        if "router" in layer.get("moe", {}):
            assert_same_tree(layer["moe"]["router"], params["layers"][stack]["moe"]["router"])
    held = [tensor for tensor in tensors(hf) if is_of_experts(tensor)]
    assert len(held) == (2 if model.config.moe.shared_pool else 2 * len(model.config.moe_layers))


def is_of_experts(name: str) -> bool:
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


@pytest.mark.parametrize("name", mostly_slow(MODELS, CONTEXT, POOL))
def test_greedy_texts_of_a_ragged_batch_are_ours(name: str, exports: Exports) -> None:
    prompts = [TOKENS_BT[0, :5].tolist(), TOKENS_BT[1, :9].tolist()]
    ours = [list(row) for row in generate(*made(name), prompts, max_new_tokens=48).sequences]
    padded = torch.tensor([[0] * (9 - len(prompt)) + prompt for prompt in prompts])
    theirs = exports.peer(name).generate(padded, attention_mask=(padded > 0).long(), max_new_tokens=48, do_sample=False)
    assert theirs[:, 9:].tolist() == ours


@pytest.mark.parametrize("name", [CONTEXT, SHARED])
def test_padding_on_either_side_changes_nothing(name: str, exports: Exports) -> None:
    peer = exports.peer(name)
    whole = logits_of(peer, TOKENS_BT)
    for left, right in ((6, 0), (2, 3)):
        tokens = np.pad(TOKENS_BT, ((0, 0), (left, right)))
        found = logits_of(peer, tokens, attention_mask=torch.from_numpy((tokens > 0).astype(np.int64)))
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found[:, left : left + 24], whole, atol=1e-5, rtol=0)


def test_a_gate_counts_positions_in_each_text_of_a_row_and_clips_them(tmp_path: Path) -> None:
    model, params = export(CONTEXT, tmp_path / "hf", max_position_embeddings=12)
    peer = load(tmp_path / "hf")
    ours = np.asarray(run(model, params, TOKENS_BT))
    np.testing.assert_allclose(logits_of(peer, TOKENS_BT), ours, atol=1e-5, rtol=0)
    first, second = TOKENS_BT[:1, :10], TOKENS_BT[1:, :14]
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    found = logits_of(peer, np.concatenate([first, second], axis=1), position_ids=positions)
    np.testing.assert_allclose(found[:, 10:], logits_of(peer, second), atol=1e-5, rtol=0)


@THEIR_WARNINGS
@pytest.mark.parametrize("name", [name for name in MODELS if name != TRAINING])  # whose noise is not drawn there
def test_loss_and_gradients_are_ours_with_and_without_checkpointing(
    name: str, exports: Exports, tmp_path: Path
) -> None:
    """Of every weight, those of routers among them, by way of our own export."""
    model, params = made(name)
    batch = {"tokens": jax.device_put(TOKENS_BT)}

    @jax.jit
    @jax.value_and_grad
    def step(params: Any) -> Any:
        return batch_loss(model, params, batch, LossConfig(router_load=0.0))[0] / (2 * 23)

    loss, grads = step(params)
    save_pretrained(tmp_path / "grads", model, grads, family="stellarbyte")
    expected = tensors(tmp_path / "grads")
    peer = load(exports.directory(name)).train()
    kept = {key: buffer.clone() for key, buffer in peer.named_buffers()}
    for checkpointed in (False, True):
        if checkpointed:
            peer.gradient_checkpointing_enable()
        peer.zero_grad()
        found = peer(TOKENS, labels=TOKENS).loss
        found.backward()
        assert found.item() == pytest.approx(float(loss), abs=1e-5)
        for key, weight in peer.named_parameters():
            np.testing.assert_allclose(weight.grad.numpy(), expected[key], atol=2e-5, err_msg=key)
    assert all(router.weight.grad.abs().max() > 1e-5 for router in routers(peer))
    assert all(torch.equal(buffer, kept[key]) for key, buffer in peer.named_buffers())


@THEIR_WARNINGS
def test_it_trains_where_every_setting_of_our_training_is_set(exports: Exports) -> None:
    """Nothing that is not used there asks for a gradient."""
    peer = load(exports.directory(TRAINING)).train()
    peer(TOKENS, labels=TOKENS).loss.backward()
    assert all(weight.grad is not None for weight in peer.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of one part of torch about another
@pytest.mark.parametrize("name", mostly_slow([CONTEXT, BESIDE], CONTEXT))
def test_few_tokens_compile_as_one_graph_and_many_with_breaks(name: str, exports: Exports) -> None:
    """Of one layer with experts, since each layer is compiled anew; other tests compile those without."""
    peer = load(exports.directory(name))
    first = next(i for i, layer in enumerate(peer.model.layers) if hasattr(layer.mlp, "router"))
    peer.model.layers = peer.model.layers[first : first + 1]
    expected = logits_of(peer, TOKENS_BT)
    whole = torch.compile(peer, fullgraph=True, backend="eager")
    np.testing.assert_allclose(logits_of(whole, TOKENS_BT, use_cache=False), expected, atol=1e-5, rtol=0)
    torch._dynamo.reset()
    parts = torch.compile(peer, backend="eager")
    found = logits_of(parts, TOKENS_BT.repeat(2, axis=0), use_cache=False)
    np.testing.assert_allclose(found, expected.repeat(2, axis=0), atol=1e-5, rtol=0)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [CONTEXT, TRAINING])
def test_routers_are_float32_in_models_of_16_bits(name: str, exports: Exports) -> None:
    _, params = made(name)
    peer = load(exports.directory(name, dtype="bfloat16"), dtype=torch.bfloat16)
    assert peer.model.embed_tokens.weight.dtype == routers_experts(peer).dtype == torch.bfloat16
    stored = [*routers(peer)[0].parameters(), *routers(peer)[0].buffers()]
    assert {tensor.dtype for tensor in stored} == {torch.float32} and len(stored) > 7
    stack = peer.config.moe["decoder_sparse_step"] - 1  # dense ones are the first where they take turns
    ours = np.asarray(params["layers"][str(stack)]["moe"]["router"]["kernel"])
    np.testing.assert_array_equal(routers(peer)[0].weight.detach().numpy(), ours[0].T)
    assert np.isfinite(logits_of(peer, TOKENS_BT)).all()


def routers_experts(peer: Any) -> Any:
    return next(layer.mlp.experts.down_proj for layer in peer.model.layers if hasattr(layer.mlp, "experts"))


def test_weights_in_16_bits_are_read_with_routers_in_float32(tmp_path: Path) -> None:
    """Biases as those of published models: far from zero and close to each other, which bfloat16 cannot tell apart."""

    def with_biases(path: tuple[Any, ...], leaf: jax.Array) -> np.ndarray:
        near_7 = 7 + 0.02 * np.arange(leaf.size, dtype="f4").reshape(leaf.shape) % 0.2
        return near_7.astype("f4") if path[-1].key == "bias" else np.asarray(leaf)

    def rounded(path: tuple[Any, ...], leaf: np.ndarray) -> np.ndarray:
        return leaf if any(key.key == "router" for key in path) else leaf.astype(jnp.bfloat16)

    model, params = made(SHARED)
    params = jax.tree_util.tree_map_with_path(with_biases, params)
    save_pretrained(tmp_path / "hf", model, params, dtype="bfloat16")
    _, found = from_pretrained(tmp_path / "hf", dtype="bfloat16", compute_dtype="float32")
    expected = jax.tree_util.tree_map_with_path(rounded, params)
    assert jax.tree.map(lambda leaf: leaf.dtype, found) == jax.tree.map(lambda leaf: leaf.dtype, expected)
    assert_same_tree(found, expected)
    read, all_rounded = (
        jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype).astype("f4"), found)  # noqa: B023
        for dtype in ("f4", jnp.bfloat16)
    )
    away = np.abs(run(model, read, TOKENS_BT) - run(model, all_rounded, TOKENS_BT)).max()
    assert away > 0.1, "other experts"


def test_layers_and_a_pool_may_lie_on_several_devices(exports: Exports, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="device_map needs it")
    ours, hf = ours_of(POOL), exports.directory(POOL)
    np.testing.assert_allclose(logits_of(load(hf, device_map="auto"), TOKENS_BT), ours, atol=1e-5)
    places = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "lm_head")}
    places |= {"model.experts": "disk"} | {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(4)}
    peer = load(hf, device_map=places, offload_folder=str(tmp_path / "offload"))
    np.testing.assert_allclose(logits_of(peer, TOKENS_BT), ours, atol=1e-5)


def test_it_is_saved_again_by_transformers(exports: Exports, tmp_path: Path) -> None:
    for name in (CONTEXT, POOL):
        model, params = made(name)
        exports.peer(name).save_pretrained(tmp_path / "again" / name)
        back, back_params = from_pretrained(tmp_path / "again" / name, compute_dtype="float32")
        assert back.config.moe == model.config.moe
        assert_same_tree(back_params, params)


def test_what_a_checkpoint_lacks_begins_as_fresh(tmp_path: Path) -> None:
    """Of every kind, beside others that are read."""
    _, params = export(CONTEXT, tmp_path)
    lacking = {"load", "priority", "steps", "weight", "temperature", "context.mlp_up", "context.norm.weight"}
    edit_tensors(tmp_path, lambda held: [held.pop(f"model.layers.1.mlp.router.{name}") for name in lacking])
    second, fourth = routers(load(tmp_path))
    assert (second.load == 1 / 5).all() and (second.priority == 1).all() and second.steps.item() == 0
    assert second.temperature.item() == 1 and (second.context.norm.weight == 1).all()
    assert second.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert second.context.mlp_up.std().item() == pytest.approx(0.02, rel=0.2)
    held = params["layers"]["1"]["moe"]["router"]
    for tensor, row in ((second.bias, 0), (fourth.bias, 1)):
        np.testing.assert_array_equal(tensor.numpy(), held["tracked"]["bias"][row])
    np.testing.assert_array_equal(second.context.mlp_down.detach().numpy(), held["mlp_down"][0].T)


def test_the_model_card_counts_weights_as_transformers_does(exports: Exports) -> None:
    card = (exports.directory(CONTEXT) / "README.md").read_text()
    assert f"| parameters | {exports.peer(CONTEXT).num_parameters():,} (float32), " in card


@THEIR_WARNINGS
@pytest.mark.parametrize("experts", [False, True])
def test_lora_of_peft_trains_it(experts: bool, exports: Exports) -> None:
    """Linear layers alone, as ever, or experts too, by the names of their tensors."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    peer = load(exports.directory(SHARED))
    more: dict[str, Any] = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]} if experts else {}
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=4, **more)
    tuned = peft.get_peft_model(peer, config)
    trained = [name for name, weight in tuned.named_parameters() if weight.requires_grad]
    assert not [name for name in trained if "router" in name]
    assert any("mlp.shared_experts.up_proj" in name for name in trained)
    assert any(".mlp.experts." in name for name in trained) == experts
    optimizer = torch.optim.Adam([weight for weight in tuned.parameters() if weight.requires_grad], 1e-2)
    losses = []
    for _ in range(4):
        loss = tuned(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    before = logits_of(tuned.eval(), TOKENS_BT)
    np.testing.assert_allclose(logits_of(tuned.merge_and_unload(), TOKENS_BT), before, atol=1e-4)


def test_a_gate_that_reads_history_is_not_exported() -> None:
    moe = MODELS[CONTEXT]["moe"] | {"history_decay": 0.5}
    with pytest.raises(ValueError) as caught:
        export_family(dataclasses.replace(BASE, moe=moe))
    assert str(caught.value) == (
        "a Hugging Face directory of the family stellarbyte cannot express this model: moe.history_decay is not 0, and "
        "no cache of transformers keeps the mean of earlier tokens that it reads. Keep it as a checkpoint of this "
        "project"
    )


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ([8], r"config\.json: moe must be an object with the settings of experts, got \[8\]"),
        ({"num_experts": 4, "top_k": 2}, "config.json: MoEConfig: there is no setting 'top_k'"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, r"moe\.num_experts_per_tok 5 is above moe\.num_experts 4"),
    ],
)
def test_what_config_json_says_of_experts_is_checked(moe: Any, message: str, tmp_path: Path) -> None:
    export("experts", tmp_path)
    edit_config(tmp_path, moe=moe)
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)
