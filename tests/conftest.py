"""Strict settings and eight CPU devices for every test; set before jax is imported."""

import datetime
import gc
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.xla import QUICK

ON_GPU = os.environ.get("STELLARBYTE_TEST_GPU") == "1"

ROOT = Path(__file__).parents[1]
STARTED = time.monotonic()

if ON_GPU:
    # Several processes share the GPU: compiling, on the CPU, takes most of the time.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()
else:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax  # noqa: E402
from helpers.array_types import check_imports_of  # noqa: E402

if not ON_GPU:
    jax.config.update("jax_num_cpu_devices", 8)  # of this process: those that tests start have one
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Tracing makes millions of objects that live long; looking through all of them each time costs a tenth of a run.
gc.set_threshold(100_000, 50, 100)
# They are the same programs every time.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

check_imports_of("stellarbyte_jax.ops", "stellarbyte_jax.model")

from stellarbyte_jax.launch.compile_cache import forget_parts  # noqa: E402

forget_parts()  # some tests kill programs, which share the cache


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Each compiled program maps memory, and a process may map only so many pieces: 65,530 where nobody raised that."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture(autouse=True, scope="session")
def devices_of_runs() -> Iterator[None]:
    """Runs in the tests' process use one device, unless a test gives them more."""
    from stellarbyte_jax.training import placement

    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            patch.setattr(placement, "devices", lambda: jax.devices()[:1])
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: make test-gpu"))
        elif "gpu" not in item.keywords and ON_GPU:
            item.add_marker(pytest.mark.skip(reason="a CPU test: make test"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Keeps the report of a whole run on a GPU in benchmarks/test-gpu.json."""
    ran = {outcome: terminalreporter.stats.get(outcome, []) for outcome in ("passed", "failed", "error")}
    narrowed = terminalreporter.config.option.keyword or terminalreporter.config.args_source.name == "ARGS"
    if not ON_GPU or narrowed or not any(ran.values()):
        return
    gpu = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    report = {
        "what": "make test-gpu",
        "date": datetime.date.today().isoformat(),
        "on": f"jax {jax.__version__}, Python {platform.python_version()}, {gpu.stdout.strip()}",
        **{outcome: len(tests) for outcome, tests in ran.items()},
        "seconds": round(time.monotonic() - STARTED),
        "tests": sorted(test.nodeid for test in ran["passed"]),
    }
    (ROOT / "benchmarks" / "test-gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
