"""The modelling file that goes with our own networks: the same numbers in transformers, whatever is done there."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.grids import REPEATS, mostly_slow
from helpers.hf_models import NEEDS_TORCH, SMALL, assert_same_tree, random_model
from helpers.torch_exports import PARTS, Exports, load, logits_of, modules_in
from helpers.training import settings, start
from helpers.variants import run

from stellarbyte_jax import generate
from stellarbyte_jax.config import DataConfig, LossConfig, OptimizerConfig, ScheduleConfig
from stellarbyte_jax.config.files import shipped
from stellarbyte_jax.hf.directory import from_pretrained, save_pretrained
from stellarbyte_jax.hf.families import FAMILIES
from stellarbyte_jax.training.loss import batch_loss

torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
transformers = pytest.importorskip("transformers")

MIXED = ("full_attention", "sliding_attention", "full_attention")
# Between them every feature that the file implements; heads, layers and lengths differ from each other.
MODELS: dict[str, dict[str, Any]] = {
    "xpos": {"position_embedding": "xpos", "xpos_scale_base": 20.0, "attention_output_bias": True},
    "the project's own config": {
        "position_embedding": "xpos",
        "xpos_learnable": True,
        "xpos_scale_base": 20.0,
        "parallel_residual": True,
        "layer_scale_init": 0.5,
        "qk_norm": True,
    },
    "the original": {
        "position_embedding": "stellarbyte",
        "mlp_style": "stellarbyte",
        "rms_norm_eps_rule": "clamp",
        "rms_norm_eps": 0.1,
        "residual_scaling": "branch",
    },
    "the original, learned": {"position_embedding": "stellarbyte", "xpos_learnable": True, "xpos_scale_base": 30.0},
    "deepnorm, cap": {"residual_scaling": "deepnorm", "attention_logit_softcap": 2.0, "attention_bias": True},
    "sinks": {"sliding_window": 4, "sink_tokens": 2},
    "sinks, mixed": {"sliding_window": 5, "sink_tokens": 1, "layer_types": MIXED, "layer_scale_init": 0.3},
    "windows, interleaved": {"sliding_window": 5, "layer_types": MIXED, "rope_pairing": "interleaved"},
    "interleaved xpos": {"rope_pairing": "interleaved", "position_embedding": "xpos", "qk_norm": True},
    "window, biases": {"sliding_window": 5, "mlp_bias": True, "attention_bias": True},
    "tied, padded, geglu": {
        "tie_word_embeddings": True,
        "vocab_size_multiple": 64,
        "hidden_act": "gelu",
        "parallel_residual": True,
        "head_dim": 6,
        "num_key_value_heads": 1,
    },
    "yarn": {"rope_scaling": {"name": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "yarn, all": {
        "rope_scaling": {"name": "yarn", "factor": 4.0, "beta_fast": 3.0, "beta_slow": 0.5, "attention_factor": 0.8},
        "max_position_embeddings": 16,
    },
    "llama3": {
        "rope_scaling": {"name": "llama3", "factor": 8.0, "original_max_position_embeddings": 8},
        "rope_theta": 500.0,
    },
    "linear": {"rope_scaling": {"name": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"name": "dynamic", "factor": 4.0}, "max_position_embeddings": 8},
}
OWN = {"yarn", "yarn, all", "llama3", "linear", "dynamic"}  # that another family expresses without this
CACHED = [name for name in MODELS if name != "dynamic"]  # whose cache agrees with a full pass in the first layer alone
THEIR_WARNINGS = pytest.mark.filterwarnings("ignore::FutureWarning")  # of one part of transformers about another
# Of which greedy texts are compared every time.
GREEDY = ("the project's own config", "windows, interleaved", "the original")
# Texts of many tokens: one model for each position scheme, scaling and kind of window.
LONG = ("the original, learned", "sinks, mixed", "interleaved xpos", "tied, padded, geglu", "yarn, all", "llama3")
LONG += ("linear",)
TOKENS_BT = np.random.default_rng(0).integers(1, 96, (2, 24), dtype=np.int32)


@pytest.fixture(autouse=True, scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exports]:
    with modules_in(tmp_path_factory.mktemp("exports")) as folder:
        yield Exports(folder, export)


def make(name: str, **changes: Any) -> tuple[Any, Any]:
    return random_model(**({"parallel_residual": True} if name in OWN else {}), **(MODELS[name] | changes))


def export(name: str, directory: Path, **changes: Any) -> tuple[Any, Any]:
    """A model of ours and its directory."""
    model, params = make(name, **changes)
    save_pretrained(directory, model, params, ids={"pad_token_id": 0})
    return model, params


def ours_of(name: str) -> np.ndarray:
    return np.asarray(run(*make(name), TOKENS_BT))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_ours(name: str, exports: Exports) -> None:
    ours = ours_of(name)
    assert np.abs(ours).max() > 1
    for attention in ("sdpa", "eager"):
        peer = exports.peer(name, attention)
        np.testing.assert_allclose(logits_of(peer, TOKENS_BT), ours, atol=1e-5, rtol=0)
        np.testing.assert_allclose(logits_of(peer, TOKENS_BT, use_cache=False), ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_it_comes_back_equal(name: str, exports: Exports) -> None:
    model, params = make(name)
    back, back_params = from_pretrained(exports.directory(name), compute_dtype="float32")
    expected = dataclasses.replace(model.config, head_dim=model.config.head_size, vocab_size_multiple=1)
    scaling = expected.rope_scaling
    if scaling.name in ("yarn", "llama3") and scaling.original_max_position_embeddings is None:
        scaling = dataclasses.replace(scaling, original_max_position_embeddings=expected.max_position_embeddings)
    assert back.config == dataclasses.replace(expected, rope_scaling=scaling)
    cut = dict(params)
    cut["embed"] = {"embedding": params["embed"]["embedding"][: model.config.vocab_size]}
    assert_same_tree(back_params, cut)


@pytest.mark.parametrize("name", CACHED)
def test_every_cache_continues_a_text(name: str, exports: Exports) -> None:
    """Token by token, in parts, and from the end of a window on."""
    peer, ours = exports.peer(name), ours_of(name)
    caches = (
        transformers.DynamicCache(config=peer.config),
        transformers.DynamicCache(),
        transformers.StaticCache(config=peer.config, max_cache_len=30),
    )
    for cache in caches:
        parts = [logits_of(peer, TOKENS_BT[:, start:end], past_key_values=cache) for start, end in PARTS]
        np.testing.assert_allclose(np.concatenate(parts, axis=1), ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("the project's own config", 128),
        ("windows, interleaved", 20),
        ("the original", 20),
        *(pytest.param(name, 20, marks=REPEATS) for name in CACHED if name not in {*OWN, *GREEDY}),
        *(pytest.param(name, 128, marks=pytest.mark.slow) for name in LONG),
    ],
)
def test_greedy_texts_of_a_ragged_batch_are_ours(name: str, length: int, exports: Exports, tmp_path: Path) -> None:
    changes = {"max_position_embeddings": 160} if length > 50 else {}
    model, params = make(name, **changes)
    if changes:
        export(name, tmp_path / "hf", **changes)
    peer = load(tmp_path / "hf" if changes else exports.directory(name))
    prompts = [TOKENS_BT[0, :5].tolist(), TOKENS_BT[1, :9].tolist()]
    ours = [list(row) for row in generate(model, params, prompts, max_new_tokens=length).sequences]
    padded = torch.tensor([[0] * (9 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (9 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    for options in ({}, {"cache_implementation": "static"}):
        theirs = peer.generate(padded, attention_mask=mask, max_new_tokens=length, do_sample=False, **options)
        assert theirs[:, 9:].tolist() == ours


def test_padding_on_either_side_changes_nothing(exports: Exports) -> None:
    whole = logits_of(exports.peer("sinks, mixed"), TOKENS_BT)
    for left, right in ((6, 0), (0, 6), (2, 3)):
        tokens = np.pad(TOKENS_BT, ((0, 0), (left, right)))
        mask = torch.from_numpy((tokens > 0).astype(np.int64))
        for attention in ("sdpa", "eager"):
            found = logits_of(exports.peer("sinks, mixed", attention), tokens, attention_mask=mask)
            assert np.isfinite(found).all()
            np.testing.assert_allclose(found[:, left : left + 24], whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["sinks", "the original", "dynamic", "the project's own config"])
def test_positions_that_begin_anew_are_another_text(name: str, exports: Exports) -> None:
    peer = exports.peer(name)
    first, second = TOKENS_BT[:1, :10], TOKENS_BT[1:, :14]
    packed = np.concatenate([first, second], axis=1)
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    for options in ({}, {"use_cache": False}):
        found = logits_of(peer, packed, position_ids=positions, **options)
        np.testing.assert_allclose(found[:, :10], logits_of(peer, first), atol=1e-5, rtol=0)
        np.testing.assert_allclose(found[:, 10:], logits_of(peer, second), atol=1e-5, rtol=0)
    tokens = torch.from_numpy(packed.astype(np.int64))
    assert peer(tokens, position_ids=positions).past_key_values is None
    assert peer(tokens, position_ids=torch.arange(24)[None]).past_key_values is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of one part of torch about another
@pytest.mark.parametrize(
    "name", mostly_slow(["the project's own config", "windows, interleaved"], "windows, interleaved")
)
def test_it_compiles_as_one_graph(name: str, exports: Exports) -> None:
    """Of two layers, with and without a window, since each is compiled anew."""
    peer = load(exports.directory(name))
    peer.model.layers = peer.model.layers[:2]
    whole = logits_of(peer, TOKENS_BT)
    compiled = torch.compile(peer, fullgraph=True, backend="eager")
    np.testing.assert_allclose(logits_of(compiled, TOKENS_BT, use_cache=False), whole, atol=1e-5, rtol=0)
    cache = transformers.StaticCache(config=peer.config, max_cache_len=30)
    parts = [logits_of(peer, TOKENS_BT[:, :9], past_key_values=cache)]
    for t in range(9, 16):
        position = torch.full((2, 1), t)
        parts.append(logits_of(compiled, TOKENS_BT[:, t : t + 1], past_key_values=cache, position_ids=position))
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole[:, :16], atol=1e-5, rtol=0)
    torch._dynamo.reset()


def test_compiled_generation_has_masks_of_one_length(exports: Exports) -> None:
    peer = exports.peer("deepnorm, cap")
    cache = transformers.StaticCache(config=peer.config, max_cache_len=30)
    mask = peer.create_masks_for_generate(attention_mask=torch.ones(2, 7, dtype=torch.long), past_key_values=cache)
    assert mask.shape == (2, 30) and mask.sum() == 14
    assert peer.create_masks_for_generate(attention_mask=None, past_key_values=cache) is None


@THEIR_WARNINGS
@pytest.mark.parametrize("name", ["the project's own config", "deepnorm, cap", "the original, learned"])
def test_gradients_are_ours_with_and_without_checkpointing(name: str, exports: Exports, tmp_path: Path) -> None:
    """Of every weight, by way of our own export."""
    model, params = make(name)
    batch = {"tokens": jax.device_put(TOKENS_BT)}
    grads = jax.jit(jax.grad(lambda p: batch_loss(model, p, batch, LossConfig())[0] / (2 * 23)))(params)
    save_pretrained(tmp_path / "grads", model, grads)
    expected = load(tmp_path / "grads").state_dict()
    peer = load(exports.directory(name)).train()
    tokens = torch.from_numpy(TOKENS_BT.astype(np.int64))
    for checkpointed in (False, True):
        if checkpointed:
            peer.gradient_checkpointing_enable()
        peer.zero_grad()
        peer(tokens, labels=tokens).loss.backward()
        for key, weight in peer.named_parameters():
            np.testing.assert_allclose(weight.grad.numpy(), expected[key].numpy(), atol=2e-5, err_msg=key)


@pytest.mark.slow
@THEIR_WARNINGS
def test_twenty_steps_of_the_trainer_are_ours(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs it")
    model, params = export("the project's own config", tmp_path / "hf")
    data = np.random.default_rng(3).integers(1, 9, (80, 16), dtype=np.int64)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        max_steps=20,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rows = [{"input_ids": torch.from_numpy(row), "labels": torch.from_numpy(row)} for row in data]
    trainer = InOrder(model=load(tmp_path / "hf").train(), args=arguments, train_dataset=rows)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    config = settings(
        model=model.config,
        data=DataConfig(sequence_length=16),
        optimizer=OptimizerConfig(learning_rate=1e-2, b2=0.999, weight_decay=0.0, gradient_clip_norm=None),
        schedule=ScheduleConfig(name="constant", warmup_steps=0),
    )
    state, step = start(config)
    state = state.replace(params=params)
    ours = []
    for i in range(20):
        state, metrics = step(state, {"tokens": jax.device_put(data[4 * i : 4 * i + 4].astype(np.int32))})
        ours.append(float(metrics["loss"]))
    assert len(theirs) == 20 and ours[-1] < ours[0] - 1
    np.testing.assert_allclose(theirs, ours, atol=1e-3)


@THEIR_WARNINGS
def test_lora_of_peft_trains_it(exports: Exports) -> None:
    peft = pytest.importorskip("peft", reason="pip install peft")
    peer = load(exports.directory("the project's own config"))
    tuned = peft.get_peft_model(peer, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=4))
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[1] for name, w in tuned.named_parameters() if w.requires_grad}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    tokens = torch.from_numpy(TOKENS_BT.astype(np.int64))
    optimizer = torch.optim.Adam([w for w in tuned.parameters() if w.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        loss = tuned(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    before = logits_of(tuned.eval(), TOKENS_BT)
    np.testing.assert_allclose(logits_of(tuned.merge_and_unload(), TOKENS_BT), before, atol=1e-4)


def test_layers_may_lie_on_several_devices(exports: Exports, tmp_path: Path) -> None:
    """What every layer reads is brought to where the layer is; ``meta`` stands for another device."""
    pytest.importorskip("accelerate", reason="device_map needs it")
    ours, hf = ours_of("sinks, mixed"), exports.directory("sinks, mixed")
    np.testing.assert_allclose(logits_of(load(hf, device_map="auto"), TOKENS_BT), ours, atol=1e-5)
    spread = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    spread |= {f"model.layers.{i}": "cpu" if i != 1 else "disk" for i in range(3)}
    peer = load(hf, device_map=spread, offload_folder=str(tmp_path / "offload"))
    np.testing.assert_allclose(logits_of(peer, TOKENS_BT), ours, atol=1e-5)


def test_it_is_saved_again_by_transformers(exports: Exports, tmp_path: Path) -> None:
    """Fine-tuned elsewhere, read here."""
    model, params = make("sinks, mixed")
    exports.peer("sinks, mixed").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_stellarbyte.py").is_file()
    back, back_params = from_pretrained(tmp_path / "again", compute_dtype="float32")
    assert back.config.windows == model.config.windows and back.config.sink_tokens == 1
    assert_same_tree(back_params, params)


def test_learned_rates_stay_float32(tmp_path: Path) -> None:
    model, params = make("the original, learned")
    save_pretrained(tmp_path / "hf", model, params, dtype="bfloat16")
    expected = np.asarray(params["layers"]["0"]["attn"]["xpos_rate"])
    for peer in (load(tmp_path / "hf", dtype=torch.bfloat16), load(tmp_path / "hf").to(torch.bfloat16)):
        rates = [weight for name, weight in peer.named_parameters() if name.endswith("xpos_rate")]
        assert len(rates) == 3 and {weight.dtype for weight in rates} == {torch.float32}
        np.testing.assert_array_equal(torch.stack(rates).detach().numpy(), expected)
        assert peer.model.embed_tokens.weight.dtype == torch.bfloat16
    found = from_pretrained(tmp_path / "hf", dtype="bfloat16")[1]["layers"]["0"]["attn"]
    assert (found["xpos_rate"].dtype, found["q"].dtype) == ("float32", "bfloat16")
    np.testing.assert_array_equal(found["xpos_rate"], expected)


def test_fresh_weights_are_those_of_the_settings(exports: Exports) -> None:
    config = transformers.AutoConfig.from_pretrained(
        exports.directory("the project's own config"), trust_remote_code=True
    )
    peer = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    layer = peer.model.layers[0]
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (layer.attn_scale == 0.5).all() and (layer.input_layernorm.weight == 1).all()
    share = torch.arange(0, 8, 2) / 8
    torch.testing.assert_close(layer.self_attn.xpos_rate.detach(), -torch.log((share + 0.4) / 1.4))


def test_dropout_and_drop_path_act_in_training_alone(tmp_path: Path) -> None:
    for name in ("hidden_dropout", "residual_dropout", "attention_dropout", "drop_path"):
        export("xpos", tmp_path / name, **{name: 0.5})
        peer = load(tmp_path / name)
        tokens = torch.from_numpy(TOKENS_BT.astype(np.int64))
        with torch.no_grad():
            quiet = [peer(tokens).logits for _ in range(2)]
            peer.train()
            noisy = [peer(tokens).logits for _ in range(2)]
        assert torch.equal(*quiet) and not torch.equal(*noisy), name


def test_hidden_states_and_weights_are_given_where_asked(exports: Exports) -> None:
    peer = exports.peer("xpos")
    tokens = torch.from_numpy(TOKENS_BT.astype(np.int64))
    with torch.no_grad():
        found = peer(tokens, output_hidden_states=True, output_attentions=True)
        plain = peer(tokens, return_dict=False)
        last = peer(tokens, logits_to_keep=1).logits
    assert len(found.hidden_states) == 4 and found.hidden_states[-1].shape == (2, 24, 32)
    torch.testing.assert_close(peer.lm_head(found.hidden_states[-1]), found.logits)
    assert len(found.attentions) == 3 and found.attentions[0].shape == (2, 4, 24, 24)
    torch.testing.assert_close(found.attentions[2].sum(-1), torch.ones(2, 4, 24))
    assert isinstance(plain, tuple) and torch.equal(plain[0], peer(tokens).logits)
    torch.testing.assert_close(last, peer(tokens).logits[:, -1:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda peer, x: peer(), "give input_ids or inputs_embeds"),
        (lambda peer, x: peer(x, attention_mask=torch.ones(2, 1, 24, 24)), r"attention_mask must be \[batch, tokens\]"),
        (lambda peer, x: peer(x, attention_mask=torch.ones(2, 20)), "attention_mask has 20 tokens of 24, those of the"),
        (lambda peer, x: peer(x.repeat(1, 200)), "4800 tokens are more than the 1277 that XPos can rotate at once"),
    ],
)
def test_what_it_cannot_do_is_an_error(call: Any, message: str, exports: Exports) -> None:
    with pytest.raises(ValueError, match=message):
        call(exports.peer("the project's own config"), torch.from_numpy(TOKENS_BT.astype(np.int64)))


def test_a_setting_of_another_value_is_refused(tmp_path: Path) -> None:
    export("xpos", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    stated = json.loads(path.read_text())
    for changes, message in (
        ({"mlp_style": "moe"}, "mlp_style must be one of gated, stellarbyte, got 'moe'"),
        ({"attention_windows": [None]}, "attention_windows names 1 of 3 layers"),
    ):
        path.write_text(json.dumps(stated | changes))
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "hf")


def test_defaults_here_and_there_are_equal(tmp_path: Path) -> None:
    """An absent field means the same to both."""
    family = FAMILIES["stellarbyte"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "stellarbyte", "auto_map": family.auto_map}))
    model, params = random_model(parallel_residual=True)
    save_pretrained(tmp_path / "hf", model, params)
    (tmp_path / "modeling_stellarbyte.py").write_bytes((tmp_path / "hf" / "modeling_stellarbyte.py").read_bytes())
    theirs = transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    derived = {"num_key_value_heads": 12, "head_dim": 64, "intermediate_size": 3072, "initialization": None}
    derived |= {"attention_windows": [None] * 12, "layer_types": ["full_attention"] * 12}
    expected = family.defaults | derived
    assert {name: getattr(theirs, name, None) for name in expected} == expected
    assert SMALL["vocab_size"] != theirs.vocab_size


def test_a_tokenizer_is_read_without_trust(tmp_path: Path) -> None:
    """Nothing of the modelling file is needed for it; its chat template goes along."""
    model, params = make("the project's own config", vocab_size=32000)
    save_pretrained(tmp_path / "hf", model, params, tokenizer=shipped("tokenizer"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.decode(tokenizer("The whale 春風").input_ids, skip_special_tokens=True) == "The whale 春風"
    talk = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True).count("<|SBOS|>") == 2
    write = transformers.pipeline("text-generation", model=load(tmp_path / "hf"), tokenizer=tokenizer)
    texts = write(["The whale", "A"], max_new_tokens=3, do_sample=False, batch_size=2)
    assert texts[0][0]["generated_text"].startswith("The whale")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of torch about its compiler
@pytest.mark.parametrize("name", ["the project's own config", "sinks, mixed", "deepnorm, cap"])
def test_on_a_gpu(name: str, tmp_path: Path) -> None:
    """Both attentions, in float32 and bfloat16; texts of a ragged batch, of its compiled program too; gradients."""
    model, params = export(name, tmp_path / "hf", max_position_embeddings=160)
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(run(model, params, TOKENS_BT))
        prompts = [TOKENS_BT[0, :5].tolist(), TOKENS_BT[1, :9].tolist()]
        texts = [list(row) for row in generate(model, params, prompts, max_new_tokens=24).sequences]
    for attention in ("sdpa", "eager"):
        peer = load(tmp_path / "hf", attn_implementation=attention, device_map="auto")
        assert peer.device.type == "cuda"
        np.testing.assert_allclose(logits_of(peer, TOKENS_BT), ours, atol=1e-4, rtol=0)
        half = load(tmp_path / "hf", attn_implementation=attention, device_map="cuda", dtype=torch.bfloat16)
        agreement = logits_of(half, TOKENS_BT).argmax(-1) == ours.argmax(-1)
        assert agreement.mean() > 0.9
    peer = load(tmp_path / "hf", device_map="cuda")
    padded = torch.tensor([[0] * (9 - len(prompt)) + prompt for prompt in prompts], device="cuda")
    for options in ({}, {"cache_implementation": "static"}):  # the static one is compiled
        mask = (padded > 0).long()
        theirs = peer.generate(padded, attention_mask=mask, max_new_tokens=24, do_sample=False, **options)
        assert theirs[:, 9:].tolist() == texts, options
    tokens = torch.from_numpy(TOKENS_BT.astype(np.int64)).cuda()
    expected = load(tmp_path / "hf").train()
    expected(tokens.cpu(), labels=tokens.cpu()).loss.backward()
    wanted = {key: weight.grad for key, weight in expected.named_parameters()}
    compiled = torch.compile(peer.train())
    compiled(tokens, labels=tokens, use_cache=False).loss.backward()
    for key, weight in peer.named_parameters():
        np.testing.assert_allclose(weight.grad.cpu().numpy(), wanted[key].numpy(), atol=2e-5, err_msg=key)
    torch._dynamo.reset()
