"""Parts of the modelling file: training, fresh weights, generation's hooks and corners of positions, one by one."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.hf_models import NEEDS_TORCH, edit_config, edit_tensors, random_model, small_config
from helpers.torch_exports import load, modules_in
from helpers.variants import run

from stellarbyte_jax.hf.directory import save_pretrained
from stellarbyte_jax.hf.families import STELLARBYTE
from stellarbyte_jax.hf.settings import settings_json
from stellarbyte_jax.model.positions import position_scheme
from stellarbyte_jax.ops.rotary.scaling import scaled_frequencies

torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
transformers = pytest.importorskip("transformers")

import stellarbyte_jax.hf.torch_model.modeling_stellarbyte as modelling  # noqa: E402 (it imports torch)

CPU = torch.device("cpu")
TOKENS_BT = np.random.default_rng(0).integers(1, 96, (2, 24), dtype=np.int32)
TOKENS = torch.from_numpy(TOKENS_BT.astype(np.int64))


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with modules_in(tmp_path_factory.mktemp("modules")):
        yield


def settings_of(**settings: Any) -> Any:
    return modelling.StellarByteConfig(**settings_json(STELLARBYTE, small_config(**settings)))


def fresh(**settings: Any) -> Any:
    torch.manual_seed(0)
    return modelling.StellarByteForCausalLM._from_config(settings_of(**settings)).eval()


def exported(directory: Path, **settings: Any) -> tuple[Any, Any]:
    model, params = random_model(**settings)
    save_pretrained(directory, model, params, family="stellarbyte", ids={"pad_token_id": 0})
    return model, params


@pytest.mark.parametrize(
    ("scaling", "others"),
    [
        ({"name": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, {"head_dim": 32}),
        ({"name": "yarn", "factor": 4.0, "original_max_position_embeddings": 300}, {"rope_theta": 4.0}),  # a ramp cut
        ({"name": "yarn", "factor": 4.0, "original_max_position_embeddings": 2}, {}),  # a ramp of no width
        ({"name": "yarn", "factor": 2.0, "beta_fast": 9.0, "beta_slow": 2.0}, {"head_dim": 32, "rope_theta": 99.0}),
        ({"name": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}, {"head_dim": 32}),
        ({"name": "linear", "factor": 3.0}, {}),
    ],
    ids=str,
)
def test_frequencies_are_ours(scaling: dict[str, Any], others: dict[str, Any]) -> None:
    config = small_config(rope_scaling=scaling, **others)
    ours, factor = scaled_frequencies(config.head_size, config.rope_theta, position_scheme(config).scaling)
    peer = settings_of(rope_scaling=scaling, **others)
    for name in ("", "beta_fast", "beta_slow"):  # absent ones have a default
        if name not in scaling:
            peer.rope_parameters.pop(name, None)
        theirs, their_factor = modelling.rotary_frequencies(peer, None, CPU)
        np.testing.assert_allclose(theirs.numpy(), np.asarray(ours), rtol=1e-6)
        assert their_factor == pytest.approx(factor)


def test_dynamic_frequencies_of_one_pair_are_finite() -> None:
    config = settings_of(rope_scaling={"name": "dynamic", "factor": 2.0}, head_dim=2)
    frequencies, _ = modelling.rotary_frequencies(config, torch.tensor([[500]]), CPU)
    assert frequencies.tolist() == [[[1.0]]]


def test_another_scaling_is_refused() -> None:
    config = settings_of()
    config.rope_parameters = config.rope_parameters | {"rope_type": "longrope"}
    with pytest.raises(ValueError, match="rope_type must be default, linear, dynamic, llama3 or yarn, got 'longrope'"):
        modelling.rotary_frequencies(config, None, CPU)


@pytest.mark.parametrize(
    "name", ["position_embedding", "rope_pairing", "mlp_style", "residual_scaling", "rms_norm_eps_rule"]
)
def test_every_choice_is_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'x'"):
        modelling.StellarByteConfig(**{name: "x"})


def test_a_cache_of_dynamic_rope_grows_as_the_text_does(tmp_path: Path) -> None:
    """One layer, whose keys depend on no length but that of the rotation."""
    scaling = {"name": "dynamic", "factor": 4.0}
    model, params = exported(tmp_path, num_hidden_layers=1, rope_scaling=scaling, max_position_embeddings=8)
    peer, cache = load(tmp_path), transformers.DynamicCache()
    for start, end in ((0, 9), (9, 10), (10, 24)):
        with torch.no_grad():
            found = peer(TOKENS[:, start:end], past_key_values=cache).logits[:, -1]
        ours = np.asarray(run(model, params, TOKENS_BT[:, :end]))[:, -1]
        np.testing.assert_allclose(found.numpy(), ours, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "length", "longest"),
    [
        ({"position_embedding": "xpos", "xpos_scale_base": 1.0}, 126, 127),
        ({"position_embedding": "xpos", "xpos_scale_base": 1.0, "xpos_learnable": True}, 60, 63),
        # Factors of the original's first keys grow with the trained length, and are clipped.
        ({"position_embedding": "stellarbyte", "xpos_scale_base": 0.8, "max_position_embeddings": 200}, 30, None),
    ],
    ids=["xpos", "learned", "the original"],
)
def test_factors_of_the_longest_texts_are_ours(
    settings: dict[str, Any], length: int, longest: int | None, tmp_path: Path
) -> None:
    model, params = random_model(**settings)
    if settings.get("xpos_learnable"):  # beyond the fastest that is computed with
        rates = params["layers"]["0"]["attn"]["xpos_rate"]
        params["layers"]["0"]["attn"]["xpos_rate"] = rates + np.float32(4)
    save_pretrained(tmp_path, model, params)
    tokens_BT = np.random.default_rng(1).integers(1, 96, (1, length), dtype=np.int32)
    peer, tokens = load(tmp_path), torch.from_numpy(tokens_BT.astype(np.int64))
    ours = np.asarray(run(model, params, tokens_BT))
    assert np.isfinite(ours).all()
    with torch.no_grad():
        np.testing.assert_allclose(peer(tokens).logits.numpy(), ours, atol=2e-5)
        if longest is not None:
            message = f"{longest + 1} tokens are more than the {longest} that XPos can rotate at once: use a cache"
            peer(torch.ones(1, longest, dtype=torch.long))
            with pytest.raises(ValueError, match=message):
                peer(torch.ones(1, longest + 1, dtype=torch.long))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of one part of torch about another
def test_packed_texts_are_apart_with_a_mask_of_ones_and_where_compiled(tmp_path: Path) -> None:
    exported(tmp_path, parallel_residual=True)
    peer = load(tmp_path)
    packed, positions = TOKENS[:1], torch.cat([torch.arange(10), torch.arange(14)])[None]
    with torch.no_grad():
        second = peer(packed[:, 10:]).logits
        options: dict[str, Any] = {"position_ids": positions, "use_cache": False}
        masked = peer(packed, attention_mask=torch.ones_like(packed), **options).logits
        compiled = torch.compile(peer, fullgraph=True, backend="eager")(packed, **options).logits
    torch._dynamo.reset()
    for found in (masked, compiled):
        torch.testing.assert_close(found[:, 10:], second, atol=1e-5, rtol=0)


def test_positions_of_a_part_do_not_begin_a_text_where_there_is_a_cache() -> None:
    peer = fresh()
    with torch.no_grad():
        expected = peer(TOKENS[:, :9]).logits[:, 6:]
        cache = peer(TOKENS[:, :6]).past_key_values
        found = peer(TOKENS[:, 6:9], past_key_values=cache, position_ids=torch.tensor([[6, 7, 8]])).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        cache = peer(TOKENS[:, :6]).past_key_values
        jumped = peer(TOKENS[:, 6:9], past_key_values=cache, position_ids=torch.tensor([[6, 17, 18]])).logits
    torch.testing.assert_close(jumped[:, 0], expected[:, 0], atol=1e-5, rtol=0)


def test_a_window_begins_to_hide_with_the_first_token_beyond_it(tmp_path: Path) -> None:
    model, params = exported(tmp_path, sliding_window=5)
    peer, cache = load(tmp_path), transformers.DynamicCache()
    for length in range(1, 9):
        ours = np.asarray(run(model, params, TOKENS_BT[:, :length]))
        with torch.no_grad():
            whole = peer(TOKENS[:, :length]).logits
            step = peer(TOKENS[:, length - 1 : length], past_key_values=cache).logits
        np.testing.assert_allclose(whole.numpy(), ours, atol=1e-5)
        np.testing.assert_allclose(step.numpy(), ours[:, -1:], atol=1e-5)


def test_drop_path_grows_with_depth_and_keeps_the_mean() -> None:
    peer = fresh(drop_path=0.5).train()
    assert [layer.drop_path for layer in peer.model.layers] == [0.0, 0.25, 0.5]
    assert fresh(drop_path=0.5, num_hidden_layers=1).model.layers[0].drop_path == 0.0
    dropped = peer.model.layers[1]._drop(torch.ones(4000, 2, 3))
    assert ((dropped == 0) | (dropped == 1 / 0.75)).all() and (dropped == dropped[:, :1, :1]).all()  # whole texts
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    "settings", [{}, {"parallel_residual": True}, {"residual_scaling": "deepnorm"}], ids=["pre", "parallel", "deepnorm"]
)
def test_a_layer_that_is_dropped_is_its_residual_path(settings: dict[str, Any]) -> None:
    peer = fresh(**settings).train()
    layer, states = peer.model.layers[1], []
    layer.drop_path = 1.0
    layer.register_forward_hook(lambda module, given, got: states.extend((given[0], got[0])))
    peer(TOKENS)
    x_BTD, found_BTD = states
    if settings.get("residual_scaling") == "deepnorm":
        alpha = 6**0.25
        x_BTD = layer.post_attention_layernorm(alpha * layer.input_layernorm(alpha * x_BTD))
    torch.testing.assert_close(found_BTD, x_BTD)


def test_each_dropout_acts_where_it_is_said(tmp_path: Path) -> None:
    def share_of_zeros(x: Any) -> float:
        return (x == 0).float().mean().item()

    peer = fresh(hidden_dropout=0.5).train()
    embedded = peer(TOKENS, output_hidden_states=True).hidden_states[0]
    assert share_of_zeros(embedded) == pytest.approx(0.5, abs=0.1)
    x_BTD = torch.randn(2, 24, 32)
    assert share_of_zeros(peer.model.layers[0].mlp(x_BTD)) == pytest.approx(0.5, abs=0.1)
    for attention in ("eager", "sdpa"):
        peer = fresh(attention_dropout=0.5)
        peer.config._attn_implementation = attention
        layer, ones = peer.model.layers[0].self_attn, torch.ones(2, 4, 24, 8)
        torch.testing.assert_close(layer._attend(ones, ones, ones, None, False)[0], ones)
        dropped = layer.train()._attend(ones, ones, ones, None, False)[0]
        assert dropped.std() > 0.1 and dropped.mean().item() == pytest.approx(1, abs=0.2)


def test_weights_that_a_checkpoint_lacks_begin_as_fresh_ones(tmp_path: Path) -> None:
    """Of every kind, beside others that are read."""
    settings = {"position_embedding": "xpos", "xpos_learnable": True, "layer_scale_init": 0.5, "attention_bias": True}
    _, params = exported(tmp_path, **settings)
    lacking = {"self_attn.xpos_rate", "input_layernorm.weight", "attn_scale", "mlp_scale", "self_attn.q_proj.bias"}
    edit_tensors(tmp_path, lambda held: [held.pop(f"model.layers.1.{name}") for name in lacking])
    peer = load(tmp_path)
    layer, first = peer.model.layers[1], peer.model.layers[0]
    assert (layer.input_layernorm.weight == 1).all() and (layer.self_attn.q_proj.bias == 0).all()
    assert (layer.attn_scale == 0.5).all() and (layer.mlp_scale == 0.5).all()
    share = torch.arange(0, 8, 2) / 8
    torch.testing.assert_close(layer.self_attn.xpos_rate.detach(), -torch.log((share + 0.4) / 1.4))
    held = params["layers"]["0"]["attn"]["xpos_rate"]
    np.testing.assert_array_equal(first.self_attn.xpos_rate.detach().numpy(), held[0])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of one part of transformers about another
def test_checkpointing_computes_each_layer_again_in_training_alone() -> None:
    peer = fresh()
    calls: list[int] = []
    for i, layer in enumerate(peer.model.layers):
        layer.register_forward_pre_hook(lambda module, given, i=i: calls.append(i))
    peer.gradient_checkpointing_enable()
    found = peer.train()(TOKENS, labels=TOKENS)
    assert calls == [0, 1, 2] and found.past_key_values is None
    found.loss.backward()
    assert sorted(calls) == [0, 0, 1, 1, 2, 2]
    with torch.no_grad():  # such as texts that are written between two steps
        assert peer(TOKENS).past_key_values is not None
    assert peer.eval()(TOKENS).past_key_values is not None


def test_what_a_call_leaves_open_is_the_configs() -> None:
    peer = fresh()
    peer.config._attn_implementation = "eager"
    plain = peer(TOKENS)
    assert plain.past_key_values is not None and plain.hidden_states is None and plain.attentions is None
    peer.config.use_cache, peer.config.output_hidden_states, peer.config.output_attentions = False, True, True
    found = peer(TOKENS)
    assert found.past_key_values is None and len(found.hidden_states) == 4 and len(found.attentions) == 3
    asked = peer(TOKENS, use_cache=True, output_hidden_states=False, output_attentions=False)
    assert asked.past_key_values is not None and asked.hidden_states is None and asked.attentions is None


def test_keys_are_repeated_for_query_heads_only_beside_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of keys cost time and memory; with a mask, the quick kernels of torch take nothing else."""
    heads, compute = [], torch.nn.functional.scaled_dot_product_attention

    def note(q: Any, k: Any, v: Any, **options: Any) -> Any:
        heads.append((k.shape[1], v.shape[1], options.get("attn_mask") is None))
        return compute(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    peer = fresh(num_hidden_layers=1, num_key_value_heads=2)
    mask = torch.ones(2, 24).index_fill(1, torch.tensor([0]), 0)
    with torch.no_grad():
        plain = peer(TOKENS).logits
        peer(TOKENS, attention_mask=mask)
        monkeypatch.setattr(modelling, "_GROUPED", False)  # as before torch 2.5
        torch.testing.assert_close(peer(TOKENS).logits, plain, atol=1e-5, rtol=0)
    grouped = 2 if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 5) else 4
    assert heads == [(grouped, grouped, True), (4, 4, False), (4, 4, True)]


@pytest.mark.parametrize(("scheme", "angles"), [("rope", 1), ("xpos", 1), ("stellarbyte", 2)])  # the last: keys too
def test_angles_are_computed_once_for_all_layers(scheme: str, angles: int) -> None:
    """Of each call, also of one token, whose time on a GPU is that of starting operations."""
    peer = fresh(position_embedding=scheme)
    cache = peer(TOKENS[:, :9]).past_key_values
    with torch.profiler.profile() as record:
        peer(TOKENS[:, 9:10], past_key_values=cache)
    assert {op.key: op.count for op in record.key_averages()}["aten::cos"] == angles


def test_weights_of_attention_have_the_dtype_of_the_model() -> None:
    found = fresh().to(torch.bfloat16)(TOKENS, output_attentions=True)
    assert {weights.dtype for weights in found.attentions} == {found.logits.dtype} == {torch.bfloat16}


def test_logits_of_chosen_tokens() -> None:
    peer = fresh()
    found = peer(TOKENS, logits_to_keep=torch.tensor([3, 5])).logits
    torch.testing.assert_close(found, peer(TOKENS).logits[:, [3, 5]])


def test_a_loss_is_divided_by_the_number_that_the_trainer_gives() -> None:
    """Of all parts of an accumulated batch."""
    peer = fresh()
    mean = peer(TOKENS, labels=TOKENS).loss
    found = peer(TOKENS, labels=TOKENS, num_items_in_batch=torch.tensor(92)).loss
    torch.testing.assert_close(found, mean * 46 / 92)


def test_masks_are_padded_to_the_largest_layer_and_never_cut() -> None:
    mixed = {"sliding_window": 5, "layer_types": ("full_attention", "sliding_attention", "full_attention")}
    peer = fresh(**mixed)
    cache = transformers.StaticCache(config=peer.config, max_cache_len=30)
    for length, expected in ((7, 30), (30, 30), (33, 33)):
        mask = peer.create_masks_for_generate(attention_mask=torch.ones(2, length), past_key_values=cache)
        assert mask.shape == (2, expected) and mask.sum() == 2 * length


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_is_resized_by_transformers(tied: bool) -> None:
    peer = fresh(tie_word_embeddings=tied)
    before = peer(TOKENS).logits
    peer.resize_token_embeddings(100)
    assert peer.get_input_embeddings().weight.shape == peer.get_output_embeddings().weight.shape == (100, 32)
    assert peer.model.embed_tokens is peer.get_input_embeddings() and peer.lm_head is peer.get_output_embeddings()
    assert (peer.lm_head.weight is peer.model.embed_tokens.weight) == tied
    torch.testing.assert_close(peer(TOKENS).logits[..., :96], before)
    assert peer.config.vocab_size == 100 and peer.get_decoder() is peer.model
    other = torch.nn.Embedding(7, 32)
    peer.set_input_embeddings(other)
    assert peer.model.embed_tokens is other


@pytest.mark.parametrize(
    ("cap", "attention", "told"), [(2.0, "sdpa", True), (2.0, "eager", False), (None, "sdpa", False)]
)
def test_a_soft_cap_tells_how_attention_is_computed(
    cap: float | None, attention: str, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings_of(attention_logit_softcap=cap)
    modelling.logger.addHandler(caplog.handler)
    with contextlib.ExitStack() as stack:
        stack.callback(modelling.logger.removeHandler, caplog.handler)
        stack.callback(modelling.logger.setLevel, modelling.logger.level)
        modelling.logger.setLevel("INFO")
        modelling.StellarByteForCausalLM._from_config(config, attn_implementation=attention)
    assert ("attention: computed as with eager, since sdpa has no soft cap" in caplog.messages) == told


def test_predictions_of_the_trainer_are_logits_alone(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs it")
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    arguments.dataloader_pin_memory = False
    peer = fresh()
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    trainer = transformers.Trainer(model=peer, args=arguments)
    peer.config.use_cache = True
    found = trainer.predict(rows).predictions
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, peer(TOKENS).logits.detach().numpy(), atol=1e-5)


def test_a_layer_is_not_split_between_devices() -> None:
    accelerate = pytest.importorskip("accelerate", reason="device_map needs it")
    peer = fresh()
    size = sum(weight.numel() * weight.element_size() for weight in peer.model.layers[0].parameters())
    room = {0: 10 * size // 4, 1: 10 * size}
    places = accelerate.infer_auto_device_map(peer, max_memory=room, no_split_module_classes=peer._no_split_modules)
    assert set(places.values()) == {0, 1} and {"model.layers.0", "model.layers.1", "model.layers.2"} <= places.keys()


def test_generation_asks_for_the_rows_of_one_mask(tmp_path: Path) -> None:
    """A mask of ones changes nothing, whatever the cache."""
    peer = fresh(sliding_window=5, sink_tokens=1)
    with torch.no_grad():
        plain = peer(TOKENS).logits
        first = peer(TOKENS[:, :9], attention_mask=torch.ones(2, 9))
        second = peer(TOKENS[:, 9:], attention_mask=torch.ones(2, 24), past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), plain, atol=1e-5, rtol=0)


def test_a_null_of_config_json_is_the_default(tmp_path: Path) -> None:
    exported(tmp_path, num_key_value_heads=4, intermediate_size=128)
    expected = load(tmp_path)(TOKENS).logits
    edit_config(tmp_path, num_key_value_heads=None, head_dim=None, intermediate_size=None, attention_windows=None)
    assert json.loads((tmp_path / "config.json").read_text())["head_dim"] is None
    torch.testing.assert_close(load(tmp_path)(TOKENS).logits, expected)
