"""llama.cpp's converter as pip fetches it, what a GGUF file holds, and what the runtime computes of it.

The converter lies in the source package of ``llama-cpp-python`` alone. It runs unmodified, with the release of
transformers that it asks for. The runtime is the same package installed, which takes a compiler; tests of it skip.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import gguf_programs
from helpers.hf_models import NEEDS_TORCH
from helpers.once import alone

CACHE = Path(__file__).parents[2] / ".pytest_cache" / "gguf"
RELEASE = "0.3.36"  # of llama-cpp-python
PACKAGES = ("transformers==4.57.6", "tokenizers==0.22.2", "gguf==0.19.0", "sentencepiece==0.2.3")
# What releases of 4 need and later ones do not.
PACKAGES += ("huggingface_hub==0.36.2", "requests", "urllib3", "idna", "certifi", "charset-normalizer")
PARTS = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/")
CORPUS = Path(__file__).parents[2] / "data" / "tiny_bilingual_valid.jsonl"


def converter() -> Path:
    """The folder of ``convert_hf_to_gguf.py``, with the packages that it needs beside it; skips where there is none."""
    pytest.importorskip("torch", reason=NEEDS_TORCH)
    with alone(CACHE):
        if not (CACHE / "complete").exists():
            _fetch_converter()
    return CACHE / "llama.cpp"


def _fetch_converter() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)
    pip = [sys.executable, "-m", "pip"]
    _fetch([*pip, "install", "-q", "--no-deps", "--target", str(CACHE / "packages"), *PACKAGES])
    source = [*pip, "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python", "-d", str(CACHE)]
    _fetch([*source, f"llama-cpp-python=={RELEASE}"])
    prefix = f"llama_cpp_python-{RELEASE}/vendor/llama.cpp/"
    with tarfile.open(CACHE / f"llama_cpp_python-{RELEASE}.tar.gz") as archive:
        for member in archive:
            if member.isfile() and member.name.removeprefix(prefix).startswith(PARTS):
                member.name = member.name.removeprefix(prefix)
                archive.extract(member, CACHE / "llama.cpp", filter="data")
    (CACHE / f"llama_cpp_python-{RELEASE}.tar.gz").unlink()
    (CACHE / "complete").touch()


def _fetch(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"llama.cpp's converter is not available: pip cannot fetch it: {last[:300]}")


def python(*command: str | Path, given: str = "") -> subprocess.CompletedProcess[str]:
    """A program with the converter's packages, and what stands on its input."""
    converter()
    environment = os.environ | {"PYTHONPATH": str(CACHE / "packages"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, input=given)


def convert_all(
    jobs: Sequence[tuple[Path, Path, *tuple[str, ...]]], program: str = "convert_hf_to_gguf.py"
) -> list[str]:
    """Writes a float32 GGUF file of each directory, in one process, which takes long to start.

    Args:
      jobs: a directory, its file, and more options of the converter.
      program: the converter, or one that stands for it.

    Returns:
      The last line that the converter printed about each, which tells of a failure.
    """
    words = [[str(job[0]), "--outfile", str(job[1]), "--outtype", "f32", *job[2:]] for job in jobs]
    done = python(gguf_programs.__file__, "convert", converter() / program, given=json.dumps(words))
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(jobs), done.stderr[-2000:]
    for job, (good, said) in zip(jobs, answers, strict=True):
        assert good == job[1].exists(), said[-2000:]
    return [said.strip().splitlines()[-1] for _, said in answers]


def convert(directory: Path, target: Path, *options: str, program: str = "convert_hf_to_gguf.py") -> str:
    """The same for one directory."""
    [last] = convert_all([(directory, target, *options)], program)
    return last


def read_all(files: Sequence[Path]) -> list[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """The metadata and the tensors of GGUF files, as the ``gguf`` package reads them."""
    done = python(gguf_programs.__file__, "read", *files)
    assert done.returncode == 0, done.stderr[-2000:]
    found = []
    for file, line in zip(files, done.stdout.splitlines(), strict=True):
        with np.load(file.with_suffix(".npz")) as tensors:
            found.append((json.loads(line), dict(tensors)))
    return found


def read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The same of one file."""
    [found] = read_all([file])
    return found


def save_pieces(directory: Path) -> Path:
    """A tokenizer of the SentencePiece library, 2,500 pieces, as transformers saves it."""
    done = python(gguf_programs.__file__, "train", CORPUS, directory)
    assert done.returncode == 0, done.stderr[-2000:]
    return directory


def has_runtime() -> bool:
    """Whether llama.cpp's runtime is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def require_runtime() -> None:
    """Skips where llama.cpp's runtime is not installed."""
    if not has_runtime():
        pytest.skip(f"llama.cpp's runtime is not there: pip install llama-cpp-python=={RELEASE} (needs a C++ compiler)")


def compute(
    file: Path,
    tokens: Sequence[int] = (),
    new_tokens: int = 0,
    texts: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What llama.cpp computes of a GGUF file.

    Returns:
      ``logits`` of the tokens, [tokens, vocabulary]; ``greedy``, the ids that follow them; ``ids`` of each text, with
      the begin of a text where the file asks for one; or ``error``, where the file cannot be loaded.
    """
    request = {"tokens": list(tokens), "new_tokens": new_tokens, "texts": list(texts), "overrides": overrides or {}}
    logits = file.with_suffix(".npy")
    command = [sys.executable, gguf_programs.__file__, "compute", str(file), str(logits)]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip()}
    return {**json.loads(done.stdout.splitlines()[-1]), "logits": np.load(logits)}
