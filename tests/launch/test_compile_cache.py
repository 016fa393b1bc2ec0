"""A cache that is broken costs time once: a program that was killed, or a full disk, leaves parts of entries."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from stellarbyte_jax.launch.compile_cache import CompileCache, forget_parts


@pytest.fixture
def folder(tmp_path):
    before = jax.config.values["jax_compilation_cache_dir"]
    compilation_cache.set_cache_dir(str(tmp_path))
    compilation_cache.reset_cache()
    yield tmp_path
    compilation_cache.set_cache_dir(before)
    compilation_cache.reset_cache()


def run():
    jax.clear_caches()
    assert jax.jit(lambda x: jnp.sin(x) + 1)(jnp.float32(0)) == 1


@pytest.mark.parametrize("kept", [0, 10, -1])
def test_a_part_of_an_entry_is_compiled_again_and_replaced(folder, kept):
    cache = CompileCache()
    run()
    files = {file: file.read_bytes() for file in folder.glob("*lambda*-cache")}
    assert files
    for file, content in files.items():
        file.write_bytes(content[:kept])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.misses = 0
        run()
        assert cache.misses == len(files)
        assert all(len(file.read_bytes()) > len(content) - 100 for file, content in files.items())
        run()
        assert cache.misses == len(files)


def test_it_is_asked_for_once():
    forget_parts()
    from jax._src.lru_cache import LRUCache

    assert not hasattr(LRUCache.get.__wrapped__, "__wrapped__")


def test_other_entries_stay(folder):
    CompileCache()
    run()
    jax.jit(lambda x: jnp.cos(x))(jnp.ones(3))
    file, *others = sorted(folder.glob("*lambda*-cache"))
    whole = {other: other.read_bytes() for other in others}
    assert whole
    file.write_bytes(b"")
    run()
    assert all(other.read_bytes() == content for other, content in whole.items())
