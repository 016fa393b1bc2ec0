"""Vocabularies of another size: old tokens keep their logits, new ones take little, and convert.py resize."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers.variants import call
from tokenizers import Tokenizer, models, processors

from stellarbyte_jax.checkpoint.weights import load_weights, save_initial
from stellarbyte_jax.cli.convert import main
from stellarbyte_jax.cli.generate import main as generate_main
from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.hf.directory import from_pretrained, save_pretrained
from stellarbyte_jax.model.decoder import ByteTransformer, head_kernel, param_shapes
from stellarbyte_jax.model.io import Inputs
from stellarbyte_jax.tokenizer.codec import load_tokenizer
from stellarbyte_jax.vocabulary import fit_tokenizer, resize_vocabulary

SMALL = ByteConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    compute_dtype="float32",
)
VARIANTS = {
    "untied": SMALL,
    "tied": dataclasses.replace(SMALL, tie_word_embeddings=True),
    "padded": dataclasses.replace(SMALL, vocab_size=37, vocab_size_multiple=16),
    "padded, tied, capped": dataclasses.replace(
        SMALL, vocab_size=37, vocab_size_multiple=16, tie_word_embeddings=True, attention_logit_softcap=5.0
    ),
}


def _params(config, dtype=np.float32):
    numbers = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: numbers.standard_normal(leaf.shape).astype(dtype), param_shapes(ByteTransformer(config))
    )


def _outputs(config, params, highest):
    """Logits of a text, the hidden states that they are made of, and the head."""
    tokens = np.random.default_rng(1).integers(0, highest, (3, 24)).astype(np.int32)
    params = jax.device_put(params)
    model = ByteTransformer(config)
    logits, out = call(model, params, Inputs(jax.device_put(tokens)))
    return [np.asarray(x) for x in (logits, out.hidden_BTD, head_kernel(model, params))]


@pytest.mark.parametrize(
    ("variant", "multiple"),
    [
        *(("untied", multiple) for multiple in (None, 1, 64)),
        ("tied", 64),
        ("padded", None),
        ("padded", 1),
        ("padded, tied, capped", None),
        ("padded, tied, capped", 64),
    ],
)
def test_growing_leaves_the_logits_of_old_tokens_as_they_are(variant, multiple):
    config, params = VARIANTS[variant], _params(VARIANTS[variant])
    V = config.vocab_size
    before, hidden, kernel = _outputs(config, params, V)
    resized, grown = resize_vocabulary(config, params, 71, vocab_size_multiple=multiple)
    rows_of = multiple or config.vocab_size_multiple
    assert (resized.vocab_size, resized.vocab_size_multiple) == (71, rows_of)
    assert resized.padded_vocab_size == -(-71 // rows_of) * rows_of
    assert jax.tree.map(np.shape, grown) == jax.tree.map(lambda s: s.shape, param_shapes(ByteTransformer(resized)))
    after, hidden_after, kernel_after = _outputs(resized, grown, V)
    assert after.shape[-1] == 71
    # The same numbers are multiplied; a matrix product of another width may add them in another order.
    np.testing.assert_array_equal(hidden_after, hidden)
    np.testing.assert_array_equal(kernel_after[:, :V], kernel[:, :V])
    np.testing.assert_allclose(after[..., :V], before, rtol=1e-5, atol=1e-5)

    # A new token gets at most an equal share of the old vocabulary, however peaked its predictions are.
    probabilities = np.asarray(jax.nn.softmax(after, axis=-1))
    assert probabilities.max() > 0.8
    assert probabilities[..., V:].max() < 1 / V
    expected = np.broadcast_to(before.mean(-1, keepdims=True), after[..., V:].shape)
    np.testing.assert_allclose(after[..., V:], expected, atol=2e-3)

    # And back: the model that it was.
    again, back = resize_vocabulary(resized, grown, V, vocab_size_multiple=config.vocab_size_multiple)
    assert again == config
    np.testing.assert_array_equal(_outputs(again, back, V)[0], before)


def test_new_rows_lie_around_the_mean_of_the_old_ones_and_differ():
    config = dataclasses.replace(SMALL, vocab_size=50, vocab_size_multiple=60, hidden_size=4, num_attention_heads=1)
    params = _params(config)
    params["embed"]["embedding"][:50] = params["embed"]["embedding"][:50] @ np.float32([[5, 1, 0, 0]] * 4) + 3
    params["embed"]["embedding"][50:] = 1e6  # padding is no token
    _, grown = resize_vocabulary(config, params, 5000, vocab_size_multiple=512)
    table = grown["embed"]["embedding"]
    assert table.shape == (5120, 4) and table.dtype == np.float32
    np.testing.assert_array_equal(table[:50], params["embed"]["embedding"][:50])
    np.testing.assert_array_equal(table[5000:], 0)
    np.testing.assert_array_equal(grown["lm_head"]["kernel"][:, 5000:], 0)
    new, old = table[50:5000].astype(np.float64), table[:50].astype(np.float64)
    np.testing.assert_allclose(new.mean(0), old.mean(0), rtol=1e-5)
    np.testing.assert_allclose(np.cov(new.T)[:2, :2], 1e-9 * np.cov(old.T, bias=True)[:2, :2], rtol=0.1)
    assert len(np.unique(new[:, 0])) > 500  # float32 has no more values there
    for seed, same in ((0, True), (1, False)):
        other = resize_vocabulary(config, params, 5000, seed=seed, vocab_size_multiple=512)[1]
        assert np.array_equal(other["embed"]["embedding"], table) == same


def test_the_arrays_keep_their_kind_and_the_given_ones_are_not_changed():
    for dtype in (np.float32, ml_dtypes.bfloat16):
        params = _params(SMALL, dtype)
        copy = jax.tree.map(np.copy, params)
        _, grown = resize_vocabulary(SMALL, params, 45)
        assert {leaf.dtype for leaf in jax.tree.leaves(grown)} == {np.dtype(dtype)}
        jax.tree.map(np.testing.assert_array_equal, params, copy)
        assert grown["layers"] is params["layers"]
        _, on_device = resize_vocabulary(SMALL, jax.device_put(params), 45)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(on_device))
        jax.tree.map(np.testing.assert_array_equal, on_device, grown)


def test_sizes_and_weights_that_do_not_fit_are_refused():
    params = _params(SMALL)
    with pytest.raises(ValueError, match=r"vocab_size must be int \(positive, below 2.(31|63)\), got 0"):
        resize_vocabulary(SMALL, params, 0)
    with pytest.raises(ValueError, match=r"vocab_size_multiple must be int \(positive, below 2.(31|63)\), got 0"):
        resize_vocabulary(SMALL, params, 50, vocab_size_multiple=0)
    other = dataclasses.replace(SMALL, vocab_size=41)
    with pytest.raises(ValueError, match=r"embed/embedding has shape \(40, 16\), vocab_size 41, .* for \(41, 16\)"):
        resize_vocabulary(other, params, 50)
    del params["lm_head"]
    with pytest.raises(ValueError, match=r"lm_head/kernel is missing, .* ask for \(16, 40\)"):
        resize_vocabulary(SMALL, params, 50)


def _tokenizer(path, size):
    path.mkdir()
    words = {"<e>": 0} | {f"w{i}": i for i in range(1, size)}
    Tokenizer(models.WordLevel(words, unk_token="w1")).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"bos_token": "<e>", "eos_token": "<e>"}')
    return path


def test_fitting_grows_only_what_is_too_small(tmp_path):
    params = _params(SMALL)
    for size in (39, 40):
        same = fit_tokenizer(SMALL, params, load_tokenizer(_tokenizer(tmp_path / str(size), size)))
        assert same[0] is SMALL and same[1] is params
    large = load_tokenizer(_tokenizer(tmp_path / "large", 43))
    config, grown = fit_tokenizer(SMALL, params, large)
    assert config == dataclasses.replace(SMALL, vocab_size=43)
    assert grown["lm_head"]["kernel"].shape == (16, 43)
    config, padded = fit_tokenizer(SMALL, params, large, vocab_size_multiple=32)
    assert (config.vocab_size, padded["embed"]["embedding"].shape) == (43, (64, 16))
    np.testing.assert_array_equal(padded["embed"]["embedding"][:43], grown["embed"]["embedding"])
    small = load_tokenizer(tmp_path / "39")
    config, padded = fit_tokenizer(SMALL, params, small, vocab_size_multiple=32)
    assert (config.vocab_size, padded["embed"]["embedding"].shape) == (40, (64, 16))


@pytest.fixture
def convert():
    def run(*arguments):
        return main([*map(str, arguments)])

    return run


@pytest.fixture
def directories(tmp_path):
    """The same weights as a run and as a Hugging Face directory, and tokenizers of 30 and of 50 tokens."""
    for size in (30, 50):
        _tokenizer(tmp_path / f"t{size}", size)
    save_initial(tmp_path / "run", SMALL, _params(SMALL), str(tmp_path / "t30"))
    save_pretrained(tmp_path / "hf", ByteTransformer(SMALL), _params(SMALL), tokenizer=tmp_path / "t30")
    return tmp_path


@pytest.mark.parametrize("source", ["run", "run/checkpoints/0", "hf"])
def test_resize_makes_a_run_that_fits_the_tokenizer(source, convert, directories, capsys):
    target = directories / "new"
    assert convert("resize", directories / source, target, "--tokenizer", directories / "t50", "--multiple", 64) == 0
    assert "vocabulary: 40 tokens in 40 rows before, 50 in 64 now; the tokenizer has 50" in capsys.readouterr().out
    config, params = load_weights(target)
    assert (config.model.vocab_size, config.model.padded_vocab_size) == (50, 64)
    assert config.data.tokenizer == str(target / "tokenizer")
    assert load_tokenizer(target / "tokenizer").vocab_size == 50
    expected = resize_vocabulary(SMALL, _params(SMALL), 50, vocab_size_multiple=64)[1]
    jax.tree.map(np.testing.assert_array_equal, params, expected)

    # What was made can be used: exported, read again, and made smaller.
    assert convert("to-hf", target, directories / "hf2") == 0
    model, _ = from_pretrained(directories / "hf2")
    assert model.config.vocab_size == 50
    back = directories / "back"
    smaller = ("--tokenizer", directories / "t30", "--vocab-size", 40, "--multiple", 1)
    assert convert("resize", target, back, *smaller) == 0
    jax.tree.map(np.testing.assert_array_equal, load_weights(back)[1], _params(SMALL))
    assert convert("resize", target, back, *smaller) == 1
    assert convert("resize", target, back, *smaller, "--overwrite") == 0


@pytest.mark.parametrize("add_bos", [False, True])
def test_resize_keeps_whether_texts_begin_with_bos(add_bos, convert, directories):
    """A run says so itself; of a Hugging Face directory the new tokenizer does: this one puts none, its own does."""
    library = Tokenizer.from_file(str(directories / "hf" / "tokenizer.json"))
    library.post_processor = processors.TemplateProcessing(single="<e> $A", special_tokens=[("<e>", 0)])
    library.save(str(directories / "hf" / "tokenizer.json"))
    run = directories / "with"
    save_initial(run, SMALL, _params(SMALL), str(directories / "t30"), add_bos=add_bos)
    for source, expected in ((run, add_bos), (directories / "hf", False)):
        target = directories / f"{source.name}-new"
        assert convert("resize", source, target, "--tokenizer", directories / "t30") == 0
        assert load_weights(target)[0].data.add_bos == expected


def test_resize_leaves_a_model_that_is_large_enough(convert, directories, capsys):
    assert convert("resize", directories / "run", directories / "new", "--tokenizer", directories / "t30") == 0
    assert "40 tokens in 40 rows before, 40 in 40 now; the tokenizer has 30" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, load_weights(directories / "new")[1], _params(SMALL))


def test_resize_says_what_is_wrong(convert, directories, capsys):
    run, new, t50 = directories / "run", directories / "new", directories / "t50"
    (run / "tokenizer").mkdir()
    cases = [
        ((run, new, "--tokenizer", t50, "--vocab-size", 45), "--vocab-size 45 is less than the 50 tokens of"),
        (
            (run, new, "--tokenizer", t50, "--multiple", 0),
            "vocab_size_multiple must be int (positive, below 2^31), got 0",
        ),
        ((run, new, "--tokenizer", directories), "holds no tokenizer.json"),
        (
            (directories, new, "--tokenizer", t50),
            "is neither a Hugging Face directory (config.json) nor a run directory",
        ),
        ((directories / "hf", new, "--tokenizer", t50, "--step", 0), "a step belongs to a run directory"),
        ((run, run, "--tokenizer", t50, "--overwrite"), "is to be written: give another target directory"),
        ((t50, run, "--tokenizer", run / "tokenizer", "--overwrite"), "is to be written: give another target"),
        ((run, directories / "hf", "--tokenizer", t50, "--overwrite"), "holds something that is no run"),
    ]
    for arguments, message in cases:
        assert convert("resize", *arguments) in (1, 2)
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("error: ") and error.count("\n") == 1
    assert not new.exists()
    assert load_weights(run)[0].model == SMALL


def test_a_tokenizer_that_is_too_large_is_refused_by_every_script(convert, directories, capsys):
    too_large = "has 50 tokens, model.vocab_size is 40"
    assert convert("to-hf", directories / "run", directories / "out", "--tokenizer", directories / "t50") == 1
    error = capsys.readouterr().err
    assert too_large in error and "`convert resize`" in error
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directories / "hf" / name).write_bytes((directories / "t50" / name).read_bytes())
    assert convert("from-hf", directories / "hf", directories / "out") == 1
    assert too_large in capsys.readouterr().err
    assert not (directories / "out").exists()
    (directories / "t50").rename(directories / "run" / "tokenizer")
    generate = generate_main
    for kind in ("run", "hf"):
        assert generate(["--model", str(directories / kind), "--prompt", "w1"]) == 1
        assert too_large in capsys.readouterr().err
