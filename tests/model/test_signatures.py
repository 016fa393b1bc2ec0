"""Signatures of the model say what they take, and every test checks that they get it."""

import ast
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from beartype.roar import BeartypeCallHintViolation
from helpers.variants import BASE, init

import stellarbyte_jax.model
from stellarbyte_jax.model.decoder import ByteTransformer, logits
from stellarbyte_jax.model.state.cache import make_cache
from stellarbyte_jax.model.state.memory import Memory
from stellarbyte_jax.ops.norm import rms_norm

FILES = sorted(Path(stellarbyte_jax.model.__path__[0]).rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_signature_or_field_says_any(file):
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        hints = []
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            hints = [a.annotation for a in every if a is not None] + [node.returns]
        elif isinstance(node, ast.AnnAssign):
            hints = [node.annotation]
        elif isinstance(node, ast.Assign) and file.name != "trees.py":  # an alias; trees of weights have open leaves
            hints = [node.value]
        hints = [hint for hint in hints if hint is not None]
        for hint in hints:
            names = [x.id for x in ast.walk(hint) if isinstance(x, ast.Name)]
            if "Any" in names or ("object" in names and isinstance(hint, ast.Subscript)):
                found.append(hint.lineno)
    assert not found, f"{file}: name the type in lines {found}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_argument_and_result_has_a_type(file):
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            found += [f"{node.name}: {', '.join([*bare, *['its result'] * (node.returns is None)])}"] * bool(
                bare or node.returns is None
            )
    assert not found, f"{file}: {found}"


def test_arrays_of_another_shape_or_dtype_are_refused_in_tests():
    model = ByteTransformer(BASE)
    params = init(model)
    with pytest.raises(BeartypeCallHintViolation, match="hidden"):
        logits(model, params, jnp.ones((2, 3, 32), jnp.int32))
    with pytest.raises(BeartypeCallHintViolation, match="scale_D"):
        rms_norm(jnp.ones((2, 3)), jnp.ones((4,)), eps=1e-6)
    with pytest.raises(BeartypeCallHintViolation, match="rows_B"):
        make_cache(BASE, 2, 8).groups[0][0].reset(jnp.zeros(2, jnp.int32))


def test_states_are_trees_that_take_any_leaves():
    config = dataclasses.replace(BASE, memory={"length": (3, 0, 7, 0), "recent_share": 0.5})
    for tree in (Memory.create(config, 2), make_cache(config, 2, 8)):
        shapes = jax.tree.map(lambda x: x.shape, tree)
        assert jax.tree.structure(jax.eval_shape(lambda tree=tree: tree)) == jax.tree.structure(tree)
        assert shapes.lengths_B == (2,)
