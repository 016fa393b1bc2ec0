"""Adapters of files at run time: PEFT's own mixed batches, runs and their bases, and what a bank refuses."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from helpers.hf_models import NEEDS_TORCH, random_model, small_config
from helpers.tiny_documents import save_byte_tokenizer
from helpers.variants import call

from stellarbyte_jax import AdapterBank, from_pretrained, generate, save_pretrained
from stellarbyte_jax.checkpoint.source import identity
from stellarbyte_jax.checkpoint.store import BASE, Checkpointer, CheckpointError
from stellarbyte_jax.cli.generate import main
from stellarbyte_jax.config import CheckpointConfig, DataConfig, ScheduleConfig, TrainConfig
from stellarbyte_jax.hf.peft import load_adapter, save_adapter
from stellarbyte_jax.lora import merge_adapters, split
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes
from stellarbyte_jax.model.io import Inputs
from stellarbyte_jax.model.trees import merge

PEER = [
    pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning"),
]
SIZES = {"num_hidden_layers": 2, "vocab_size": 288}
TOKENS = np.random.default_rng(0).integers(0, 288, (4, 9), dtype=np.int32)
# Ranks differ between the adapters, and in one of them between modules.
THEIRS = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "lm_head"], "rank_pattern": {"v_proj": 2}},
    "b": {"r": 3, "use_rslora": True, "target_modules": ["embed_tokens", "o_proj", "gate_proj", "down_proj"]},
}
NO_WARMUP = ScheduleConfig(warmup_steps=0)
CHOICES = ["a", "b", None, "a"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Hugging Face directory with a tokenizer."""
    path = tmp_path_factory.mktemp("bank")
    save_pretrained(path / "base", *random_model(**SIZES), tokenizer=save_byte_tokenizer(path / "bytes"))
    return path / "base"


def network(config, seed=0, **lora):
    """A network with adapters of settings, and random ones."""
    model = ByteTransformer(dataclasses.replace(config, lora={"r": 2, **lora}))
    numbers = np.random.default_rng(seed)

    def drawn(path, leaf):
        if path[-1].key.endswith("_scale"):
            return np.full(leaf.shape, model.config.lora.scale, np.float32)
        return np.float32(0.2) * numbers.standard_normal(leaf.shape, np.float32)

    return model, jax.tree_util.tree_map_with_path(drawn, split(param_shapes(model))[0])


def save_run(path, model, adapters, base_params):
    """A run of adapters as training keeps it: these alone, and what they are of."""
    data = DataConfig(sequence_length=16)
    config = TrainConfig(output_dir=str(path), steps=9, model=model.config, data=data, schedule=NO_WARMUP)
    checkpointer = Checkpointer(path, CheckpointConfig())
    of = {"config": config.to_dict(), BASE: identity("base", base_params)}
    checkpointer.save(3, {"params": adapters}, of, frozen=[])
    checkpointer.close()


@pytest.mark.filterwarnings(*[mark.args[0] for mark in PEER])
def test_rows_are_those_of_a_mixed_batch_of_peft(base, tmp_path):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    peft = pytest.importorskip("peft", reason="pip install peft")
    transformers = pytest.importorskip("transformers")

    def plain():
        return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    for seed, (name, settings) in enumerate(THEIRS.items()):
        tuned = peft.get_peft_model(plain(), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        generator = torch.Generator().manual_seed(seed)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        tuned.save_pretrained(tmp_path / name)
    peer = peft.PeftModel.from_pretrained(plain(), tmp_path / "a", adapter_name="a")
    peer.load_adapter(tmp_path / "b", "b")
    peer.eval()
    named = {"adapter_names": [name or "__base__" for name in CHOICES]}
    tokens = torch.tensor(TOKENS, dtype=torch.long)
    with torch.no_grad():
        mixed = peer(tokens, **named).logits.numpy()
        texts = peer.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0, **named)

    model, params = from_pretrained(base, compute_dtype="float32")
    bank = AdapterBank.holding(model, params, {name: tmp_path / name for name in THEIRS})
    assert bank.max_rank == 4
    with_adapters, adapters = bank.chosen(model, CHOICES, 4)
    found = jax.jit(lambda weights: call(with_adapters, weights, Inputs(jax.device_put(TOKENS)))[0])
    np.testing.assert_allclose(found(merge(adapters, params)), mixed, rtol=0, atol=1e-5 * np.abs(mixed).max())
    ours = generate(model, bank, TOKENS, adapter=CHOICES, max_new_tokens=6)
    np.testing.assert_array_equal(ours.tokens, texts[:, TOKENS.shape[1] :].numpy())


def test_adapters_of_runs_and_of_peft_and_those_of_another_base(base, tmp_path):
    model, params = from_pretrained(base, compute_dtype="float32")
    ours = network(model.config, 1, target_modules=("q", "down"))
    save_run(tmp_path / "run", *ours, params)
    save_adapter(tmp_path / "peft", *ours, base=base)
    bank = AdapterBank(model, params, slots=4, max_rank=2)
    bank.add("run", tmp_path / "run")
    bank.add("step", tmp_path / "run", step=3)
    bank.add("checkpoint", tmp_path / "run" / "checkpoints" / "3")
    bank.add("run", tmp_path / "peft")  # takes the place of the other one: the bank is not full
    loaded = load_adapter(tmp_path / "peft")
    bank.add("loaded", loaded)
    held = [each.arrays for each in bank._held.values()]
    for other in held[1:]:
        jax.tree.map(np.testing.assert_array_equal, held[0], other)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), bank.merge("run"), merge_adapters(*loaded)[1]
    )
    with pytest.raises(CheckpointError, match="no checkpoint of step 4"):
        bank.add("run", tmp_path / "run", step=4)
    with pytest.raises(ValueError, match="base holds a whole model and no adapter"):
        bank.add("run", base)

    moved = {**params, "embed": {"embedding": params["embed"]["embedding"] + 1}}
    other = AdapterBank(model, moved, max_rank=2)
    with pytest.raises(
        ValueError, match=r"'run' was trained on another base: 1 weights differ, such as embed/emb.* Make"
    ):
        other.add("run", tmp_path / "run")
    save_run(tmp_path / "second", *ours, load_adapter(tmp_path / "peft")[1])
    other.add("run", tmp_path / "second")  # whose base had adapters itself, merged since
    other.add("run", tmp_path / "peft")  # which says nothing of the weights
    cast = AdapterBank(model, jax.tree.map(lambda x: x.astype("bfloat16"), params), max_rank=2)
    cast.add("run", tmp_path / "run")

    # A base that lies elsewhere now.
    shutil.copytree(base, tmp_path / "moved")
    settings = (tmp_path / "peft" / "adapter_config.json").read_text()
    (tmp_path / "peft" / "adapter_config.json").write_text(settings.replace(str(base), "/no/such"))
    with pytest.raises(ValueError, match=r"/no/such does not exist: let it name the directory of the model"):
        bank.add("run", tmp_path / "peft")
    bank.add("run", tmp_path / "peft", base=tmp_path / "moved")


def refused(config=None, **settings):
    return network(config or small_config(**SIZES), **settings)


BAD = {
    "rank": (lambda: refused(r=5), r"'x' has rank 5, and max_rank of the bank is 4: make it with max_rank=5"),
    "target": (
        lambda: refused(target_modules=("q", "head")),
        r"has adapters of head, and the bank of down, .*: make it with target_modules=\('all-linear', 'head'\)",
    ),
    "width": (
        lambda: refused(small_config(**SIZES, hidden_size=16, head_dim=8)),
        r"'x' is an adapter of another base: layers/0/attn/k_lora_a has shape \(2, 16, 2\), the base asks for "
        r"\(2, 32, 2\); .*and \d+ more. Make a bank of the base that it was trained on",
    ),
    "depth": (
        lambda: refused(small_config(**(SIZES | {"num_hidden_layers": 3}))),
        r"another base: layers/0/attn/k_lora_a has shape \(3, 32, 2\), the base asks for \(2, 32, 2\)",
    ),
    "experts": (
        lambda: refused(small_config(**SIZES, moe={"num_experts": 2, "first_k_dense_replace": 1})),
        "another base: .*layers/1/attn/k_lora_a is none of the base's",
    ),
    "dora": (
        lambda: refused(dora=True),
        "'x' has DoRA, which multiplies outputs besides: make the bank with dora=True",
    ),
    "activation": (lambda: refused(activation="silu"), "lora.activation=silu, and all adapters of a bank are linear"),
    "saved": (lambda: refused(modules_to_save=("norms",)), r"trained with norms whole \(lora.modules_to_save\)"),
    "none": (lambda: (ByteTransformer(small_config(**SIZES)), {}), r"'x' has no adapters \(lora.r is 0\)"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_a_bank_cannot_hold_is_refused(kind):
    model = ByteTransformer(small_config(**SIZES))
    bank = AdapterBank(model, zeros(model), max_rank=4)
    made, message = BAD[kind]
    with pytest.raises(ValueError, match=message):
        bank.add("x", made())
    assert bank.names == ()


def zeros(model):
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), param_shapes(model))


def test_routers_that_training_moved_are_refused():
    config = small_config(**SIZES, moe={"num_experts": 2, "num_experts_per_tok": 1, "cooling_steps": 5})
    model, adapters = network(config, target_modules=("router",))
    bank = AdapterBank(ByteTransformer(config), zeros(ByteTransformer(config)), target_modules=("router",))
    tracked = zeros(ByteTransformer(config))["layers"]["0"]["moe"]["router"]["tracked"]
    for name, is_used in (("bias", True), ("coldness", True), ("priority", False)):
        moved = {"layers": {"0": {"moe": {"router": {"tracked": {**tracked, name: tracked[name] + 1}}}}}}
        if is_used:
            with pytest.raises(ValueError, match=rf"whose numbers training moved \(.*tracked/{name}\): generate with"):
                bank.add("x", (model, merge(adapters, moved)))
        else:
            bank.add("x", (model, merge(adapters, moved)))


def test_bad_banks_names_and_choices():
    model = ByteTransformer(small_config(**SIZES))
    params = zeros(model)
    for settings, message in (
        ({"slots": 0}, "slots is 0: give a whole number from 1 on"),
        ({"max_rank": True}, "max_rank is True: give a whole number"),
        ({"target_modules": ("qq",)}, "lora.target_modules names qq; there are q, k, v"),
        ({"target_modules": ("router",)}, "names router, which the model does not have; there are"),
    ):
        with pytest.raises(ValueError, match=message):
            AdapterBank(model, params, **settings)
    with pytest.raises(ValueError, match="the base of a bank has no adapters of its own: merge these"):
        AdapterBank(network(model.config)[0], params)

    bank = AdapterBank(model, params, slots=2, max_rank=4)
    with pytest.raises(ValueError, match="there is no adapter 'x'; there are none: add it"):
        bank.merge("x")
    bank.add("x", network(model.config, r=3))
    bank.add("y", network(model.config, r=2))
    with pytest.raises(
        ValueError, match=r"the bank is full: its 2 slots hold 'x', 'y'. Remove one before 'z' is added"
    ):
        bank.add("z", network(model.config))
    with pytest.raises(ValueError, match="there is no adapter 'z'; there are 'x', 'y'"):
        bank.remove("z")
    with pytest.raises(ValueError, match="the name of an adapter is '': give a text"):
        bank.add("", network(model.config))
    for choice, message in (
        ("z", "there is no adapter 'z'; there are 'x', 'y'"),
        (["x", "z"], "there is no adapter 'z'"),
        (["x"], "names 1 adapters for 2 rows: give one for each row, or one"),
        (3, "adapter is 3: give a name, or a list"),
        ([3, "x"], "an adapter is 3: give a name"),
        ({}, "an adapter is {}: give a name"),
        ({"x": 1, "y": 1}, r"have rank 5 \(3 of x \+ 2 of y\), and max_rank of the bank is 4: make it with max_rank=5"),
        ({"x": float("nan")}, "adapter 'x' is multiplied by nan: give a finite number"),
        ({"x": "1"}, "adapter 'x' is multiplied by '1'"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, bank, [[1], [2]], adapter=choice, max_new_tokens=1)
    with pytest.raises(ValueError, match="adapter names one of a bank: give an AdapterBank in place of the weights"):
        generate(model, params, [[1]], adapter="x", max_new_tokens=1)
    with pytest.raises(ValueError, match="the model is not the base of this bank: give"):
        generate(ByteTransformer(small_config(vocab_size=32)), bank, [[1]], adapter="x", max_new_tokens=1)


@pytest.mark.slow
def test_adapters_of_the_command_line(base, tmp_path, capsys):
    """One for all prompts, or one for each; texts are those of the merged models."""
    model, params = from_pretrained(base)
    merged = {}
    for seed, name in enumerate("ab"):
        made = network(model.config, seed, r=2 + seed)
        save_adapter(tmp_path / name, *made, base=base)
        merged[name] = tmp_path / f"merged {name}"
        save_pretrained(merged[name], *merge_adapters(made[0], merge(made[1], params)), tokenizer=base)

    def printed(model, *options):
        assert main(["--model", str(model), "--max-new-tokens", "5", "--prompt", "one", *options]) == 0
        return capsys.readouterr().out.removesuffix("\n").split("\n---\n")

    a, b = (str(tmp_path / name) for name in "ab")
    alone = {name: printed(path) for name, path in merged.items()} | {None: printed(base)}
    assert printed(base, "--adapter", a) == alone["a"]
    texts = printed(base, "--prompt", "one", "--prompt", "one", "--adapter", b, "none", a)
    assert texts == alone["b"] + alone[None] + alone["a"] and len(set(texts)) == 3
    assert main(["--model", str(base), "--prompt", "x", "--adapter", a, b]) == 1
    assert "--adapter names 2 for 1 prompts: give one, or one a prompt" in capsys.readouterr().err
