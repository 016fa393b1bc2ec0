"""Whole directories read and written: where each weight goes, what comes along, and what does not fit."""

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.hf_models import assert_same_tree, edit_config, edit_tensors, random_model, save_words, tensors
from helpers.training import flat
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

from stellarbyte_jax.config import CacheConfig, RopeScaling
from stellarbyte_jax.hf.directory import from_pretrained, round_params, save_pretrained
from stellarbyte_jax.hf.families import LLAMA
from stellarbyte_jax.model.decoder import ByteTransformer

LAYER = "model.layers.1.mlp.up_proj.weight"
Model = tuple[ByteTransformer, dict[str, Any]]


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model()


@pytest.fixture
def directory(tmp_path: Path, model: Model) -> Path:
    save_pretrained(tmp_path / "hf", *model)
    return tmp_path / "hf"


def by_hand(directory: Path) -> dict[str, np.ndarray]:
    """A directory of a Llama of two layers with biases, written without our code; returns its tensors."""
    settings = {
        "model_type": "llama",
        "vocab_size": 10,
        "hidden_size": 6,
        "intermediate_size": 5,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "attention_bias": True,
        "mlp_bias": True,
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (10, 6),
        "model.norm.weight": (6,),
        "lm_head.weight": (10, 6),
    }
    for i in range(2):
        at = f"model.layers.{i}."
        shapes |= {f"{at}{name}_layernorm.weight": (6,) for name in ("input", "post_attention")}
        projections = {
            "self_attn.q": (12, 6),
            "self_attn.k": (4, 6),
            "self_attn.v": (4, 6),
            "self_attn.o": (6, 12),
            "mlp.gate": (5, 6),
            "mlp.up": (5, 6),
            "mlp.down": (6, 5),
        }
        shapes |= {f"{at}{name}_proj.weight": shape for name, shape in projections.items()}
        shapes |= {f"{at}{name}_proj.bias": shape[:1] for name, shape in projections.items()}
    random = np.random.default_rng(0)
    made = {name: random.standard_normal(shape, "f4") for name, shape in shapes.items()}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(settings))
    save_file(made, directory / "model.safetensors")
    return made


def test_each_weight_goes_to_its_place(tmp_path: Path) -> None:
    theirs = by_hand(tmp_path / "hand")

    def layers(name: str) -> np.ndarray:
        return np.stack([theirs[f"model.layers.{i}.{name}"] for i in range(2)])

    def matrices(name: str) -> np.ndarray:
        return layers(f"{name}_proj.weight").swapaxes(1, 2)

    expected = {
        "embed/embedding": theirs["model.embed_tokens.weight"],
        "final_norm/scale": theirs["model.norm.weight"],
        "lm_head/kernel": theirs["lm_head.weight"].T,
        "layers/0/attn_norm/scale": layers("input_layernorm.weight"),
        "layers/0/mlp_norm/scale": layers("post_attention_layernorm.weight"),
        "layers/0/attn/o": matrices("self_attn.o").reshape(2, 3, 4, 6),
        "layers/0/attn/o_bias": layers("self_attn.o_proj.bias"),
        "layers/0/mlp/gate_up": np.stack([matrices("mlp.gate"), matrices("mlp.up")], axis=2),
        "layers/0/mlp/gate_up_bias": np.stack([layers("mlp.gate_proj.bias"), layers("mlp.up_proj.bias")], axis=1),
        "layers/0/mlp/down": matrices("mlp.down"),
        "layers/0/mlp/down_bias": layers("mlp.down_proj.bias"),
    }
    for name, heads in (("q", 3), ("k", 1), ("v", 1)):
        expected[f"layers/0/attn/{name}"] = matrices(f"self_attn.{name}").reshape(2, 6, heads, 4)
        expected[f"layers/0/attn/{name}_bias"] = layers(f"self_attn.{name}_proj.bias").reshape(2, heads, 4)
    made, params = from_pretrained(tmp_path / "hand")
    found = flat(params)
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        assert isinstance(leaf, jax.Array) and leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    save_pretrained(tmp_path / "back", made, params)
    back = tensors(tmp_path / "back")
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_in_memory_and_on_disk(dtype: str, tmp_path: Path, model: Model) -> None:
    made, params = model
    save_pretrained(tmp_path / "hf", made, params, dtype=dtype)
    assert {str(t.dtype) for t in tensors(tmp_path / "hf").values()} == {dtype}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == dtype
    _, read = from_pretrained(tmp_path / "hf", dtype=dtype)
    assert_same_tree(read, jax.tree.map(lambda x: x.astype(dtype), params))


def test_weights_are_rounded_as_a_directory_rounds_them() -> None:
    params = {"a": {"b": np.float32([1 + 2**-8, 3.0])}, "c": jax.numpy.asarray([1 + 2**-11], "f4")}
    for dtype, b, c in (("float32", 1 + 2**-8, 1 + 2**-11), ("bfloat16", 1.0, 1.0), ("float16", 1 + 2**-8, 1.0)):
        rounded = round_params(params, dtype, LLAMA)
        assert {str(x.dtype) for x in jax.tree.leaves(rounded)} == {"float32"}
        assert_same_tree(rounded, {"a": {"b": np.float32([b, 3.0])}, "c": np.float32([c])})
    with pytest.raises(ValueError, match=r"^a/b holds 70000, which float16 cannot represent"):
        round_params({"a": {"b": np.float32([7e4])}}, "float16", LLAMA)


def test_runtime_settings_are_given_when_reading(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "hf", *random_model(remat="full"))
    config = from_pretrained(tmp_path / "hf", remat="dots", scan_unroll=None)[0].config
    assert (config.compute_dtype, config.remat, config.scan_unroll) == ("bfloat16", "dots", None)
    with pytest.raises(ValueError, match=r"scan_unrol.*did you mean scan_unroll"):
        from_pretrained(tmp_path / "hf", scan_unrol=2)


def test_sections_are_given_when_reading(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "hf", *random_model(rope_scaling={"name": "linear", "factor": 3.0}))
    as_objects = {"rope_scaling": RopeScaling(name="yarn", factor=2.0), "cache": CacheConfig(dtype="int8")}
    as_mappings = {"rope_scaling": {"name": "yarn", "factor": 2.0}, "cache": {"dtype": "int8"}}
    configs = [from_pretrained(tmp_path / "hf", **given)[0].config for given in (as_objects, as_mappings)]
    assert configs[0] == configs[1]
    assert (configs[0].rope_scaling.name, configs[0].cache.dtype) == ("yarn", "int8")
    config = from_pretrained(tmp_path / "hf", memory={"length": 6, "recent_share": 0.5})[0].config
    assert config.memory.length == 6
    assert config.rope_scaling == RopeScaling(name="linear", factor=3.0)
    with pytest.raises(ValueError, match=r"RopeScaling: there is no setting 'kind'"):
        from_pretrained(tmp_path / "hf", rope_scaling={"kind": "yarn"})


def test_settings_that_need_other_weights_are_named(directory: Path) -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM does not have: layers/0/attn_scale.*\(layer_scale_init\)"):
        from_pretrained(directory, layer_scale_init=0.1)
    with pytest.raises(ValueError, match=r"missing model\.layers\.0\.self_attn\.q_proj\.bias"):
        from_pretrained(directory, attention_bias=True)
    with pytest.raises(ValueError, match=r"unknown model\.layers\.0\.post_attention_layernorm\.weight"):
        from_pretrained(directory, parallel_residual=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(LAYER), f"missing {LAYER}$"),
        (lambda t: t.pop("lm_head.weight"), r"missing lm_head\.weight$"),
        (lambda t: t.update(surplus=np.zeros(2, "f4")), "unknown surplus$"),
        (
            lambda t: t.update({LAYER: t[LAYER][:5].copy()}),
            rf"{LAYER} has shape \(5, 32\), the settings ask for \(56, 32\)$",
        ),
        (
            lambda t: t.update({f"extra.{i}": np.zeros(1, "f4") for i in range(9)} | {LAYER: t[LAYER][:5].copy()}),
            r"unknown extra\.0; .*unknown extra\.7; and 2 more$",
        ),
    ],
    ids=["missing", "missing head", "unknown", "shape", "many"],
)
def test_tensors_that_do_not_fit_are_named(directory: Path, change: Any, message: str) -> None:
    edit_tensors(directory, change)
    with pytest.raises(ValueError, match=rf"^{directory}: the tensors do not fit config\.json: {message}"):
        from_pretrained(directory)


def test_integers_are_no_weights(directory: Path) -> None:
    edit_tensors(directory, lambda t: t.update({LAYER: t[LAYER].astype("i4")}))
    with pytest.raises(ValueError, match=f"tensor {LAYER} is stored as I32"):
        from_pretrained(directory)


def test_rotary_buffers_of_old_checkpoints_are_ignored(directory: Path, model: Model) -> None:
    edit_tensors(directory, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, "f4")}))
    assert_same_tree(from_pretrained(directory)[1], model[1])


def test_a_stored_copy_of_a_tied_head_must_be_equal(directory: Path) -> None:
    edit_config(directory, tie_word_embeddings=True)
    message = r"tie_word_embeddings is true, but lm_head\.weight differs from model\.embed_tokens\.weight\. Set tie_"
    with pytest.raises(ValueError, match=message):
        from_pretrained(directory)
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    _, params = from_pretrained(directory)
    assert "lm_head" not in params
    # One table, stored under the head's name.
    edit_tensors(directory, lambda t: t.pop("model.embed_tokens.weight"))
    assert_same_tree(from_pretrained(directory)[1], params)


def test_broken_directories(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere does not exist: give a local directory, or a name of the Hugging"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"dtype must be one of float32, bfloat16, float16, got 'int8'"):
        from_pretrained(directory, dtype="int8")
    edit_config(directory, hidden_act="relu")
    with pytest.raises(ValueError, match=r"config\.json: hidden_act is 'relu'"):
        from_pretrained(directory)
    (directory / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        from_pretrained(directory)


@pytest.mark.parametrize("tied", [False, True])
def test_the_padding_of_the_vocabulary_stays_here(tied: bool, tmp_path: Path) -> None:
    model, params = random_model(vocab_size_multiple=64, tie_word_embeddings=tied)
    assert params["embed"]["embedding"].shape == (128, 32)
    save_pretrained(tmp_path / "hf", model, params)
    written = tensors(tmp_path / "hf")
    np.testing.assert_array_equal(written["model.embed_tokens.weight"], params["embed"]["embedding"][:96])
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 96
    trimmed = params | {"embed": {"embedding": params["embed"]["embedding"][:96]}}
    padded = params | {"embed": {"embedding": np.pad(trimmed["embed"]["embedding"], ((0, 32), (0, 0)))}}
    if not tied:
        np.testing.assert_array_equal(written["lm_head.weight"], params["lm_head"]["kernel"][:, :96].T)
        trimmed["lm_head"] = {"kernel": params["lm_head"]["kernel"][:, :96]}
        padded["lm_head"] = {"kernel": np.pad(trimmed["lm_head"]["kernel"], ((0, 0), (0, 32)))}
    assert_same_tree(from_pretrained(tmp_path / "hf")[1], trimmed)
    back, back_params = from_pretrained(tmp_path / "hf", vocab_size_multiple=64)
    assert back.config.padded_vocab_size == 128
    assert_same_tree(back_params, padded)


def test_hostile_names_of_tensors_stay_one_line(directory: Path) -> None:
    edit_tensors(directory, lambda held: held.update({"x\n" * 100_000: np.zeros(1, "f4")}))
    with pytest.raises(ValueError, match=r"unknown x\\nx") as caught:
        from_pretrained(directory)
    assert len(str(caught.value)) < 2000 and "\n" not in str(caught.value)


def test_shards_hold_every_tensor_once(tmp_path: Path, model: Model) -> None:
    save_pretrained(tmp_path / "hf", *model, max_shard_bytes=16_000)
    files = sorted(p.name for p in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(tmp_path / "hf").keys()
    assert index["metadata"]["total_size"] == 4 * sum(x.size for x in jax.tree.leaves(model[1]))
    assert_same_tree(from_pretrained(tmp_path / "hf")[1], model[1])


def test_weights_of_another_model_are_named(tmp_path: Path, model: Model) -> None:
    made, params = model
    wrong = params | {"final_norm": {"scale": np.ones(9, "f4")}, "more": np.ones(1, "f4")}
    del wrong["lm_head"]
    message = (
        r"^the weights do not fit the model's settings: missing lm_head/kernel; unknown more; "
        r"final_norm/scale has shape \(9,\), the settings ask for \(32,\)$"
    )
    with pytest.raises(ValueError, match=message):
        save_pretrained(tmp_path / "hf", made, wrong)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"max_shard_bytes": 0}, "max_shard_bytes must be positive, got 0"),
        ({"tokenizer": "nowhere"}, r"tokenizer directory nowhere does not exist"),
    ],
    ids=["dtype", "shard", "tokenizer"],
)
def test_bad_arguments_leave_nothing(settings: dict[str, Any], message: str, tmp_path: Path, model: Model) -> None:
    with pytest.raises(ValueError, match=message):
        save_pretrained(tmp_path / "hf", *model, **settings)
    assert os.listdir(tmp_path) == []


def test_a_model_of_no_family_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot express this model: attention_prune_below is 0.1"):
        save_pretrained(tmp_path / "hf", *random_model(attention_prune_below=0.1))
    assert os.listdir(tmp_path) == []


def test_a_failed_save_leaves_the_earlier_export(directory: Path, model: Model) -> None:
    before = (directory / "model.safetensors").read_bytes()
    made, params = model
    with pytest.raises(ValueError, match="is not empty"):
        save_pretrained(directory, made, params)
    large = params | {"final_norm": {"scale": np.full(32, 1e5, "f4")}}
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds 100000, which float16 cannot represent"):
        save_pretrained(directory, made, large, dtype="float16", overwrite=True)
    assert (directory / "model.safetensors").read_bytes() == before
    save_pretrained(directory, made, params, dtype="bfloat16", overwrite=True)
    assert {t.dtype for t in tensors(directory).values()} == {np.dtype(bfloat16)}
    assert os.listdir(directory.parent) == ["hf"]


def test_the_tokenizer_goes_along(tmp_path: Path, model: Model) -> None:
    names = {"bos_token": "<b>", "eos_token": {"content": "<e>"}, "pad_token": "<p>", "unk_token": None}
    source = save_words(tmp_path / "tokenizer", ["<b>", "<e>", "<p>", "x"], **names)
    save_pretrained(tmp_path / "hf", *model, tokenizer=source)
    for file in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "hf" / file).read_text())
        assert [written[f"{t}_token_id"] for t in ("bos", "eos", "pad")] == [0, 1, 2]
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()

    (source / "generation_config.json").write_text('{"eos_token_id": [1, 3], "top_k": 5}')
    save_pretrained(tmp_path / "several", *model, tokenizer=source)
    assert json.loads((tmp_path / "several" / "config.json").read_text())["eos_token_id"] == [1, 3]
    assert json.loads((tmp_path / "several" / "generation_config.json").read_text())["top_k"] == 5


def test_tokenizers_that_do_not_fit(tmp_path: Path, model: Model) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        save_pretrained(tmp_path / "hf", *model, tokenizer=source)
    save_words(source, [str(i) for i in range(97)])
    with pytest.raises(ValueError, match="has 97 tokens, the model's vocab_size is 96"):
        save_pretrained(tmp_path / "hf", *model, tokenizer=source)
    save_words(source, ["x"], eos_token="<end>")
    with pytest.raises(ValueError, match=r"eos_token is '<end>', which tokenizer\.json does not hold"):
        save_pretrained(tmp_path / "hf", *model, tokenizer=source)
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer that the tokenizers library can read"):
        save_pretrained(tmp_path / "hf", *model, tokenizer=source)
    assert os.listdir(tmp_path) == ["tokenizer"]


def test_memory_holds_the_weights_once(tmp_path: Path) -> None:
    model, params = random_model(vocab_size=8192, hidden_size=128, num_hidden_layers=8)
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    tracemalloc.start()
    try:
        save_pretrained(tmp_path / "hf", model, params)
        assert tracemalloc.get_traced_memory()[1] < 0.8 * total  # the embedding is two fifths
        tracemalloc.reset_peak()
        from_pretrained(tmp_path / "hf")
        assert tracemalloc.get_traced_memory()[1] < 1.5 * total
    finally:
        tracemalloc.stop()


def test_a_run_is_told_from_a_hugging_face_directory(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "3").mkdir(parents=True)
    for path, what in ((run, "run directory"), (run / "checkpoints" / "3", "checkpoint of a run")):
        with pytest.raises(ValueError) as caught:
            from_pretrained(path)
        expected = (
            f"{path} is a {what}, not a Hugging Face directory: load it with stellarbyte_jax.load_run({str(path)!r})"
        )
        assert str(caught.value) == expected
    save_pretrained(run / "hf", *random_model())
    with pytest.raises(ValueError, match=rf"load_run\('{run}'\), or give its export {run / 'hf'}$"):
        from_pretrained(str(run))
    from_pretrained(run / "hf")


@pytest.mark.parametrize(
    ("stated", "positions", "scaling", "written"),
    [
        (32768, 64, "none", 64),
        (10**30, 64, "none", 64),  # as transformers writes that there is no limit
        (48, 64, "none", 48),
        (None, 64, "none", None),
        (32768, 64, "linear", 32768),  # longer texts are what the scaling is for
    ],
)
def test_an_export_states_no_longer_texts_than_the_model_has_positions_for(
    stated: int | None, positions: int, scaling: str, written: int | None, tmp_path: Path
) -> None:
    given = {} if stated is None else {"model_max_length": stated}
    words = save_words(tmp_path / "words", ["x", "y"], padding_side="right", **given)
    before = (words / "tokenizer_config.json").read_bytes()
    rope = RopeScaling(name=scaling, factor=2.0) if scaling != "none" else RopeScaling()  # type: ignore[arg-type]
    save_pretrained(
        tmp_path / "hf", *random_model(max_position_embeddings=positions, rope_scaling=rope), tokenizer=words
    )
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert settings.get("model_max_length") == written and settings["padding_side"] == "right"
    assert (words / "tokenizer_config.json").read_bytes() == before
