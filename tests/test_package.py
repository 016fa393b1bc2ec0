"""The package as a user meets it: names and laziness."""

import subprocess
import sys
from pathlib import Path

import pytest

import stellarbyte_jax

ROOT = Path(__file__).parents[1]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_no_jax():
    loaded = python(
        "import sys, stellarbyte_jax; dir(stellarbyte_jax); stellarbyte_jax.ByteConfig(hidden_size=96);"
        "print([m for m in ('jax', 'flax', 'torch', 'transformers', 'grain') if m in sys.modules])"
    )
    assert loaded == "[]"


def test_importing_the_modules_starts_no_device():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "stellarbyte_jax").rglob("*.py"))
        if path.parent.name != "torch_model"  # torch's file, which is copied, not imported
    ]
    started = python(
        f"import importlib; [importlib.import_module(m) for m in {modules}];"
        "from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    )
    assert started == "False"


@pytest.mark.parametrize("name", stellarbyte_jax.__all__)
def test_public_names_exist_and_are_callable(name):
    assert name in dir(stellarbyte_jax)
    assert callable(getattr(stellarbyte_jax, name))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Bytes'"):
        stellarbyte_jax.Bytes  # noqa: B018


def test_tokens_alone_are_refused_with_what_to_give():
    told = python(
        "import jax.numpy as jnp; from stellarbyte_jax import ByteConfig, ByteTransformer\n"
        "try: ByteTransformer(ByteConfig()).apply({'params': {}}, jnp.zeros((1, 2), jnp.int32))\n"
        "except TypeError as error: print(error)"
    )
    assert told.startswith("the network takes Inputs(tokens_BT), got ")
