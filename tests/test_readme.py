"""The README's commands, run as they stand there, with settings that make them short."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from helpers.programs import shared_programs

ROOT = Path(__file__).parents[1]
NOTED = "noted"  # what python was given, words ended by NUL, commands by one more

TINY = (
    "--set steps={steps} global_batch_size=2 schedule.warmup_steps=1 data.sequence_length=32 evaluation.batches=1 "
    "data.workers=0 model.hidden_size=32 model.num_attention_heads=4 model.num_hidden_layers=2 "
    "model.intermediate_size=64"
)

# How each command begins, and what is done to it: text to append, or (old, new) to replace. A command that no entry
# matches fails the test, and so does an entry that matches none.
SHORT: dict[str, str | tuple[str, str]] = {
    "make quickstart": f'ARGS="{TINY.format(steps=3)}"',
    "make test": "--dry-run",
    ". .venv/bin/activate": "",
    "python -m pip install -e .": "--dry-run --no-deps --no-build-isolation --quiet",
    "stellarbyte --help": "",
    "python scripts/train.py --list-settings": "",
    "python scripts/report.py": "",
    "python scripts/model_info.py": "",
    "python scripts/train.py --config configs/quickstart.py --init-from": "steps=2 schedule.warmup_steps=1",
    "python scripts/train.py --config configs/pretrain.py --plan": "",
    "python scripts/doctor.py": "--help",  # what it finds is the machine's, see tests/launch
    "python scripts/train.py --config configs/pretrain.py": TINY.format(steps=2),
    "python scripts/train.py --config configs/quickstart_moe.py": TINY.format(steps=2),
    "python scripts/train.py --config configs/quickstart.py": TINY.format(steps=5),
    "python scripts/train.py --config configs/sft.py": "--set steps=2 schedule.warmup_steps=1 evaluation.batches=1",
    "python scripts/train.py --config configs/lora.py": "--set steps=2 schedule.warmup_steps=1 evaluation.batches=1",
    "python scripts/generate.py": "--max-new-tokens 4",
    "python scripts/evaluate.py": "--help",  # its tasks are not here, see tests/evaluation
    "python scripts/convert.py to-hf": "",
    "python scripts/convert.py from-hf": "",
    "python scripts/convert.py inspect": "",
    "python scripts/convert.py resize": "",
    "python scripts/convert.py upcycle": "",
    "python scripts/prepare_data.py": "",
    "python scripts/train_tokenizer.py": ("--stage 8000:", "--stage 400:"),
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


def shortened(command: str) -> str:
    change = next(change for start, change in SHORT.items() if command.startswith(start))
    if isinstance(change, str):
        return f"{command} {change}".strip()
    assert change[0] in command
    return command.replace(*change)


def test_every_command_has_its_short_form():
    for command in commands():
        assert any(command.startswith(start) for start in SHORT), command
    for start in SHORT:
        assert any(command.startswith(start) for command in commands()), start


# Stands for the interpreter: notes what it is given, which is then run in the test's process; pip is left to the real
# one.
PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m pip" ]; then exec {python} "$@"; fi
for word in "$@"; do printf '%s\\0' "$word"; done >> {noted}
printf '\\0' >> {noted}
"""


def checkout(path: Path) -> None:
    """A copy of the repository by links, with an environment that counts as installed, and a corpus of one's own."""
    for name in (
        "LICENSE",
        "Makefile",
        "README.md",
        "pyproject.toml",
        "configs",
        "data",
        "scripts",
        "stellarbyte_jax",
        "tokenizer",
    ):
        (path / name).symlink_to(ROOT / name)
    binaries = path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    python = PYTHON.format(python=shlex.quote(sys.executable), noted=shlex.quote(str(path / NOTED)))
    for name, program in (("python", python), ("stellarbyte", '#!/bin/sh\nexec python -m stellarbyte_jax "$@"\n')):
        (binaries / name).write_text(program)
        (binaries / name).chmod(0o755)
    (binaries / "activate").write_text(f"PATH={shlex.quote(str(binaries))}:$PATH\n")
    for stamp in (".installed-cpu", ".installed-cpu-test"):
        (path / ".venv" / stamp).touch()
    corpus = path / "my_corpus"
    (corpus / "train").mkdir(parents=True)
    lines = (ROOT / "data" / "tiny_bilingual_valid.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (corpus / "train" / "a.jsonl").write_text("".join(lines[3:]), encoding="utf-8")
    (corpus / "valid.jsonl").write_text("".join(lines[:3]), encoding="utf-8")


def in_this_process(words: list[str]) -> None:
    """What ``python`` would do with these words; it ends with 0."""
    module = words[0] == "-m"
    arguments = words[1:] if module else words
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        try:
            (runpy.run_module if module else runpy.run_path)(arguments[0], run_name="__main__")
        except SystemExit as end:
            assert end.code in (0, None), words


@pytest.mark.slow
def test_the_commands_run_in_order(tmp_path, monkeypatch, capfd):
    checkout(tmp_path)
    for name in ("MAKEFLAGS", "MAKELEVEL", "VENV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA", "cpu")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    noted = tmp_path / NOTED

    def run(command: str) -> str:
        noted.write_bytes(b"")
        line = f". .venv/bin/activate && {command}"
        done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        capfd.readouterr()
        for words in noted.read_text(encoding="utf-8").split("\0\0")[:-1]:
            in_this_process(words.split("\0"))
        return done.stdout + capfd.readouterr().out

    # As a user's jax is set; the tests' own is stricter than optax.
    with shared_programs(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for command in commands():
            printed = run(shortened(command))
            if command == "make quickstart":
                assert "complete" in run(shortened(command))
            elif command == "make test":
                assert "-m pytest" in printed
            elif command.startswith(("python scripts", "stellarbyte")):
                assert printed, command
        (block,) = blocks("python")
        (tmp_path / "example.py").write_text(block, encoding="utf-8")
        assert run("python example.py").strip()
    for made in ("runs/quickstart/hf/config.json", "exported/config.json", "my_tokenizer/tokenizer.json"):
        assert (tmp_path / made).is_file(), made
    for made in ("runs/quickstart/checkpoints", "runs/imported/checkpoints", "runs/pretrain/checkpoints", "prepared"):
        assert any((tmp_path / made).iterdir()), made
