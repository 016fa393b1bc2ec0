"""Host memory of a conversion: by the commands one array at a time, by the library the weights once."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.xla import QUICK

from stellarbyte_jax.config import ByteConfig

# Prints how much anonymous memory grew at most while a directory was read, and while it was written; mapped files are
# not counted: the kernel drops their pages at will.
PROGRAM = """
import sys, threading, time
import jax
from stellarbyte_jax import from_pretrained, save_pretrained
from stellarbyte_jax.cli import convert

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

jax.block_until_ready(jax.device_put(1.0))
before, peak = anonymous(), 0

def watch():
    global peak
    while True:
        peak = max(peak, anonymous() - before)
        time.sleep(0.001)

threading.Thread(target=watch, daemon=True).start()
"""
LIBRARY = """
model, params = from_pretrained(sys.argv[1])
read = peak
save_pretrained(sys.argv[2], model, params, max_shard_bytes=int(sys.argv[3]))
print(read, peak)
"""
COMMAND = """
assert convert.main(sys.argv[1:]) == 0
print(peak)
"""


def write_random(directory: Path, megabytes: int) -> ByteConfig:
    """A directory of about so many megabytes in one file, made without any tensor in memory."""
    from stellarbyte_jax.hf.export import export_family
    from stellarbyte_jax.hf.settings import config_json
    from stellarbyte_jax.hf.tensors import shapes_of as _shapes
    from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes

    width = 1024 if megabytes > 1000 else 512
    config = ByteConfig(vocab_size=1000, hidden_size=width, num_hidden_layers=1, num_attention_heads=8)
    layer = 4 * 16 * width**2
    config = ByteConfig(**(config.to_dict() | {"num_hidden_layers": round(megabytes * 1e6 / layer)}))
    family = export_family(config)
    header, offset = {}, 0
    for entry in family.entries(config, _shapes(param_shapes(ByteTransformer(config)))):
        size = 4 * math.prod(entry.hf_shape)
        header[entry.theirs] = {"dtype": "F32", "shape": entry.hf_shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    directory.mkdir()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)  # zeros
    (directory / "config.json").write_text(json.dumps(config_json(family, config, "float32", {})))
    return config


def measured(act: str, *arguments: object) -> list[int]:
    """The numbers that a program prints last, in a process of its own."""
    environment = {**os.environ, "XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM + act, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return list(map(int, done.stdout.splitlines()[-1].split()))


REST = 450e6
HAS_PROC = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


@pytest.mark.slow
@HAS_PROC
def test_the_commands_hold_one_array(tmp_path: Path) -> None:
    """The largest is gate and up of all layers. The rest is programs, parts that are encoded, and mapped files."""
    config = write_random(tmp_path / "hf", 1400)
    largest = 4 * 2 * config.num_hidden_layers * config.hidden_size * config.mlp_size
    (read,) = measured(COMMAND, "from-hf", tmp_path / "hf", tmp_path / "run")
    (written,) = measured(COMMAND, "to-hf", tmp_path / "run", tmp_path / "again")
    assert largest + REST < 1.3e9
    assert 0.9 * largest < read < largest + REST
    assert 0.9 * largest < written < largest + REST


@HAS_PROC
def test_a_conversion_holds_the_weights_once(tmp_path: Path) -> None:
    write_random(tmp_path / "hf", 500)  # beside which some 50 MB of everything else are little
    shard = (tmp_path / "hf" / "model.safetensors").stat().st_size
    read, written = measured(LIBRARY, tmp_path / "hf", tmp_path / "again", shard // 4)
    assert 0.9 * shard < read < 1.2 * shard
    assert written < 1.2 * shard
    files = sorted((tmp_path / "again").glob("*.safetensors"))
    assert len(files) >= 4 and sum(file.stat().st_size for file in files) >= shard
