"""Adapters at run time: does each row get its own, does nothing compile, and does nobody disturb anybody?"""

import dataclasses
import functools
import threading
from itertools import chain

import jax
import numpy as np
import pytest
from helpers.adapters import DENSE, EXPERTS, TIED, merged_by_hand
from helpers.variants import make_model

from stellarbyte_jax import AdapterBank, generate, make_mesh, place_weights
from stellarbyte_jax.inference.api import remember, stream_generate, warm_up
from stellarbyte_jax.lora import split
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes
from stellarbyte_jax.model.trees import merge, paths

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [3, 4]]
LINEAR = ("q", "k", "v", "o", "gate_up", "down")
SETTINGS = {"max_new_tokens": 6, "log_probs": True}
HALF = {"a": 0.5, "b": 1.0}
SMALL = dataclasses.replace(DENSE, num_hidden_layers=2)
DENSE_KIND, TABLE, ROUTERS = "attention, MLP and head", "a tied table", "routers and shared experts"
# Base, targets of the bank, and what two adapters of it have.
KINDS = {
    DENSE_KIND: (
        SMALL,
        (*LINEAR, "head"),
        {"r": 2, "target_modules": ("q", "v", "head")},
        {"r": 3, "rslora": True, "lora_alpha": 5.0, "layers": (1,)},
    ),
    TABLE: (
        TIED,
        ("embed", "q"),
        {"r": 2, "target_modules": ("embed",)},
        {"r": 3, "target_modules": ("embed", "q")},
    ),
    ROUTERS: (
        EXPERTS,
        ("router", "shared", "o", "down"),
        {"r": 2, "target_modules": ("router", "shared")},
        {"r": 3, "target_modules": ("router", "o", "down")},
    ),
}


def learnt(config, seed=0, **lora):
    """The network with adapters of settings, and such ones that are random; nothing is compiled for them."""
    model = ByteTransformer(dataclasses.replace(config, lora={"r": 3, **lora}))
    numbers, lora = np.random.default_rng(seed), model.config.lora

    def drawn(path, leaf):
        if path[-1].key.endswith("_m"):
            return 1 + numbers.random(leaf.shape, np.float32)
        if not path[-1].key.endswith("_scale"):
            return np.float32(0.2) * numbers.standard_normal(leaf.shape, np.float32)
        has = [not leaf.shape or lora.layers is None or layer in lora.layers for layer in range(leaf.size)]
        return np.float32(lora.scale) * np.asarray(has, np.float32).reshape(leaf.shape)

    return model, jax.tree_util.tree_map_with_path(drawn, split(param_shapes(model))[0])


def empty(kind, **settings):
    config, targets, *_ = KINDS[kind]
    return AdapterBank(*make_model(config), max_rank=5, target_modules=targets, **settings)


def networks(kind):
    config, _, *loras = KINDS[kind]
    return {name: learnt(config, seed, **lora) for seed, (name, lora) in enumerate(zip("ab", loras, strict=True), 1)}


@functools.cache
def bank_of(kind):
    """A bank of adapters a and b that nobody changes, and weights with each merged by hand, none, and a sum."""
    bank, weights = empty(kind), {None: make_model(KINDS[kind][0])[1]}
    for name, (model, adapters) in networks(kind).items():
        bank.add(name, (model, adapters))
        weights[name] = merged_by_hand(merge(adapters, weights[None]))
    weights["sum"] = jax.tree.map(lambda base, a, b: base + 0.5 * (a - base) + (b - base), *weights.values())
    return bank, weights


def texts(bank, choice, weights=None):
    return generate(bank.model, bank if weights is None else weights, PROMPTS, adapter=choice, **SETTINGS)


def same(found, expected, rows=range(4)):
    """Rows have the tokens, and nearly the log-probabilities, of the same rows of another call."""
    for row in rows:
        np.testing.assert_array_equal(found.tokens[row], expected.tokens[row])
        np.testing.assert_allclose(found.log_probs[row], expected.log_probs[row], atol=3e-5)


@pytest.mark.parametrize("kind", [DENSE_KIND, TABLE, pytest.param(ROUTERS, marks=pytest.mark.slow)])
def test_each_row_is_that_of_its_adapter_merged_and_run_alone(kind):
    bank, weights = bank_of(kind)
    found, base = texts(bank, ["a", "b", None, HALF]), texts(bank, None, weights[None])
    np.testing.assert_array_equal(found.tokens[2], base.tokens[2])
    np.testing.assert_array_equal(found.log_probs[2], base.log_probs[2])  # to the last bit
    for row, name in ((0, "a"), (1, "b"), (3, "sum")):
        same(found, texts(bank, None, weights[name]), [row])
        assert np.abs(found.log_probs[row] - base.log_probs[row]).max() > 0.01


@pytest.mark.slow
def test_rows_without_an_adapter_are_the_base_in_bfloat16_too():
    model, params = make_model(dataclasses.replace(SMALL, compute_dtype="bfloat16"))
    bank = AdapterBank(model, params, max_rank=3)
    bank.add("b", learnt(model.config, 2))
    found, base = texts(bank, [None, "b", None, None]), texts(bank, None)
    for row in (0, 2, 3):
        np.testing.assert_array_equal(found.log_probs[row], base.log_probs[row])
    assert np.abs(found.log_probs[1] - base.log_probs[1]).max() > 0.01


@pytest.mark.slow
def test_rows_may_have_dora():
    """Beside rows without it; layers without an adapter keep their lengths."""
    model, params = make_model(SMALL)
    loras = {
        "a": {"r": 2, "dora": True, "target_modules": ("q", "gate_up", "head"), "layers": (1,)},
        "b": {"target_modules": ("k", "down")},
        "c": {"r": 1, "dora": True, "target_modules": ("o",)},
    }
    both = {name: learnt(SMALL, seed, **lora) for seed, (name, lora) in enumerate(loras.items())}
    bank = AdapterBank.holding(model, params, both)
    weights = {name: merged_by_hand(merge(adapters, params)) for name, (_, adapters) in both.items()}
    found, base = texts(bank, ["a", "b", None, "c"]), texts(bank, None)
    for row, name in ((0, "a"), (1, "b"), (3, "c")):
        same(found, texts(bank, None, weights[name]), [row])
        assert np.abs(found.log_probs[row] - base.log_probs[row]).max() > 0.01
    np.testing.assert_array_equal(found.log_probs[2], base.log_probs[2])
    same(texts(bank, {"b": 1}), texts(bank, None, weights["b"]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), bank.merge("a"), weights["a"])
    with pytest.raises(ValueError, match="adapter 'c' has DoRA, which multiplies outputs and is no sum: choose it"):
        texts(bank, {"b": 1, "c": 1})


@pytest.mark.parametrize("name", ["a", "b", "sum"])
def test_one_adapter_of_all_rows_is_that_merged(name):
    bank, weights = bank_of(DENSE_KIND)
    same(texts(bank, HALF if name == "sum" else name), texts(bank, None, weights[name]))


@pytest.mark.slow
def test_adapters_of_experts_are_the_same_for_all_rows():
    network, (model, params) = learnt(EXPERTS, 1, dora=True, target_modules=("experts", "q")), make_model(EXPERTS)
    bank = AdapterBank.holding(model, params, {"a": network})
    expected = texts(bank, None, merged_by_hand(merge(network[1], params)))
    same(texts(bank, "a"), expected)
    same(texts(bank, ["a"] * 4), expected)
    same(texts(bank, None, bank.merge("a")), expected)


@pytest.fixture
def compiled():
    """Names of what is compiled."""
    found = []

    def listen(event, duration, **more):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(more)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_is_compiled_for_other_adapters(compiled):
    """After one call with a list, a name and a sum: adapters come, go and are replaced by those of any rank."""
    bank = empty(DENSE_KIND, slots=2)
    others = {r: learnt(SMALL, r, r=r, target_modules=LINEAR[: r + 1]) for r in (1, 2, 3, 4)}
    bank.add("x", others[2])
    before = texts(bank, ["x", None, "x", {"x": 0.5}])
    texts(bank, "x"), texts(bank, None), bank.merge("x")
    jax.jit(lambda x: x - 3)(np.float32(1))
    assert compiled  # it is counted
    compiled.clear()
    bank.add("y", others[1])
    texts(bank, ["y", "x", {"x": 1.0, "y": -2.0}, None]), texts(bank, "y"), texts(bank, {"x": 0.1, "y": 3})
    bank.add("x", others[4])  # the swap
    swapped = texts(bank, ["x", None, "x", {"x": 0.5}])
    bank.remove("y")
    bank.add("z", others[3])
    texts(bank, ["z", "x", "z", "z"]), texts(bank, "z"), bank.merge("z")
    assert compiled == [] and bank.names == ("x", "z")
    assert np.abs(swapped.log_probs[0] - before.log_probs[0]).max() > 0.01
    np.testing.assert_array_equal(swapped.log_probs[1], before.log_probs[1])


def test_merging_changes_a_copy_alone():
    bank, weights = bank_of(DENSE_KIND)
    leaves, before = jax.tree.leaves(bank.params), jax.tree.map(np.array, bank.params)
    merged = bank.merge("a")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), merged, weights["a"])
    assert all(x is y for x, y in zip(leaves, jax.tree.leaves(bank.params), strict=True))
    jax.tree.map(np.testing.assert_array_equal, bank.params, before)  # to unmerge is to use these
    assert merged["embed"]["embedding"] is bank.params["embed"]["embedding"]  # no adapter, no copy
    assert paths(merged) == paths(bank.params)
    cast = AdapterBank(bank.model, jax.tree.map(lambda x: x.astype("bfloat16"), bank.params))
    cast.add("b", learnt(SMALL, 2))
    assert {x.dtype.name for x in jax.tree.leaves(cast.merge("b"))} == {"bfloat16"}


def test_a_call_goes_on_with_what_it_began_with():
    bank = empty(DENSE_KIND)
    both = networks(DENSE_KIND)
    bank.add("a", both["a"])
    arrays = bank._held["a"].arrays
    before = jax.tree.map(np.array, arrays)
    expected = texts(bank, ["a", None, "a", "a"])
    stream = stream_generate(bank.model, bank, PROMPTS, adapter=["a", None, "a", "a"], max_new_tokens=6)
    bank.add("a", both["b"])
    found = [next(stream)]
    bank.remove("a")
    found += list(stream)
    jax.tree.map(np.testing.assert_array_equal, arrays, before)
    assert [list(chain.from_iterable(block[row] for block in found)) for row in range(4)] == expected.sequences


def test_threads_generate_while_another_one_adds_and_removes():
    bank = empty(DENSE_KIND, slots=3)
    for name, network in networks(DENSE_KIND).items():
        bank.add(name, network)
    choices = [["a", "b", None, HALF], ["b", "a", "a", None], "a", [None, HALF, "b", "b"]]
    expected = [texts(bank, choice) for choice in choices]
    others = [learnt(SMALL, seed) for seed in (5, 6)]
    found, failures, ended = {}, [], threading.Event()

    def caught(function):
        def run(*arguments):
            try:
                function(*arguments)
            except Exception as error:
                failures.append(error)

        return run

    @caught
    def generated(number):
        found[number] = [texts(bank, choices[number]) for _ in range(6)]

    @caught
    def change():
        while not ended.is_set():
            for other in others:
                bank.add("c", other)
            bank.remove("c")

    threads = [threading.Thread(target=generated, args=(number,)) for number in range(4)]
    changing = threading.Thread(target=change)
    for thread in (*threads, changing):
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    changing.join()
    assert failures == [] and bank.names == ("a", "b")
    for number, calls in found.items():
        for each in calls:
            np.testing.assert_array_equal(each.tokens, expected[number].tokens)
            np.testing.assert_array_equal(each.log_probs, expected[number].log_probs)


@pytest.mark.slow
def test_warm_up_compiles_what_the_call_needs(compiled):
    model, params = make_model(dataclasses.replace(SMALL, num_hidden_layers=1))
    bank = AdapterBank.holding(model, params, {"a": learnt(model.config, 1, target_modules=("q",))})
    assert warm_up(model, bank, PROMPTS, adapter=["a", None, None, "a"], **SETTINGS) > 0
    compiled.clear()
    texts(bank, [None, "a", "a", "a"])
    assert compiled == []


@pytest.mark.slow
def test_what_a_model_remembers_is_read_with_the_adapter_of_its_row():
    config = dataclasses.replace(SMALL, memory={"length": 4})
    network, (model, params) = learnt(config, 1), make_model(config)
    bank = AdapterBank.holding(model, params, {"a": network})

    def continued(weights, adapter=None):
        read = remember(model, weights, [[5, 6, 7, 8, 9, 10], [11, 12, 13]], segment_length=4, adapter=adapter)
        return generate(model, weights, PROMPTS[:2], memory=read, adapter=adapter, **SETTINGS)

    found = continued(bank, ["a", None])
    same(found, continued(merged_by_hand(merge(network[1], params))), [0])
    same(found, continued(params), [1])


MESHES = [
    pytest.param({"tensor": 2}, DENSE_KIND, id="tensor"),
    pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, DENSE_KIND, id="three axes", marks=pytest.mark.slow),
    pytest.param({"fsdp": 2, "tensor": 2}, TABLE, id="a tied table", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("sizes", "kind"), MESHES)
def test_texts_on_a_mesh_are_those_of_one_device(sizes, kind):
    """The arrays of a bank lie where those of a network with adapters do, rows where activations do."""
    single, _ = bank_of(kind)
    choices = ["a", "b", None, HALF]
    expected, mesh = texts(single, choices), make_mesh(sizes)
    with jax.set_mesh(mesh):
        placed = place_weights(single.model, single.params, mesh)
        bank = AdapterBank(single.model, placed, max_rank=5, target_modules=KINDS[kind][1])
        for name, network in networks(kind).items():
            bank.add(name, network)
        same(texts(bank, choices), expected)
        if len(sizes) == 1:
            same(texts(bank, "b"), texts(bank, None, bank.merge("b")))
        _, rows = bank.chosen(bank.model, choices, 4)
    for tree, heads in ((bank._held["b"].arrays, 2), (rows, 3)):  # [L, R, N, H] and [L, B, R, N, H]
        b = tree["layers"]["0"]["attn"]["q_lora_b"]
        assert b.sharding.shard_shape(b.shape)[heads] == b.shape[heads] // 2
    assert b.sharding.shard_shape(b.shape)[1] == 4 // sizes.get("data", 1) // sizes.get("fsdp", 1)
