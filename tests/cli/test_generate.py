"""What the command refuses before it loads a model, and what it says of one."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.hf_models import random_model
from helpers.runs import one_error
from helpers.tiny_documents import save_byte_tokenizer

from stellarbyte_jax import save_pretrained
from stellarbyte_jax.checkpoint.store import Checkpointer
from stellarbyte_jax.cli import generate
from stellarbyte_jax.cli.generate import main
from stellarbyte_jax.config import CheckpointConfig, DataConfig, TrainConfig
from stellarbyte_jax.hf.peft import save_adapter
from stellarbyte_jax.lora import split
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes
from stellarbyte_jax.tokenizer.codec import load_tokenizer

WARNING = "was trained on plain text, not on conversations: expect it to go on with the messages, not to answer them"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of step 3, whose tokenizer has a chat template."""
    base = tmp_path_factory.mktemp("generate")
    model, weights = random_model(num_hidden_layers=1, vocab_size=288, max_position_embeddings=256)
    data = DataConfig(sequence_length=16, tokenizer=save_byte_tokenizer(base / "bytes"))
    config = TrainConfig(output_dir="run", steps=200, model=model.config, data=data)
    checkpointer = Checkpointer(base / "run", CheckpointConfig())
    checkpointer.save(3, {"params": weights}, {"config": config.to_dict()}, frozen=[])
    checkpointer.close()
    return base / "run"


def test_an_empty_stop_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "nothing", "--prompt", "x", "--stop", ""]) == 1
    assert one_error(capsys, "error: --stop is empty: give the text that is to end an output")


def test_a_prompt_file_in_another_encoding_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin.txt").write_bytes(b"one\ncaf\xe9")
    assert main(["--model", "nothing", "--prompt-file", str(tmp_path / "latin.txt")]) == 1
    assert one_error(capsys, f"error: {tmp_path / 'latin.txt'}:2:4: not valid UTF-8 (save the file as UTF-8)")


def test_a_checkpoint_of_a_run_and_what_is_known_of_its_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(run / "checkpoints" / "3")
    assert main(["--model", model, "--prompt", "hello", "--max-new-tokens", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("hello") and "warning" not in printed.err
    assert main(["--model", model, "--chat", "--prompt", "hello", "--max-new-tokens", "2"]) == 0
    assert f"warning: {model} {WARNING}\n" in capsys.readouterr().err


def test_adapters_bring_their_chat_template_and_ends(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each prompt has the template of its adapter, and all end where one of them ends."""
    model, weights = random_model(num_hidden_layers=1, vocab_size=288, max_position_embeddings=256)
    base, other = tmp_path / "base", tmp_path / "other"
    bytes_alone = save_byte_tokenizer(tmp_path / "bytes")
    save_pretrained(base, model, weights, tokenizer=bytes_alone)
    shutil.copytree(bytes_alone, other)
    (other / "chat_template.jinja").write_text("{% for m in messages %}<|user|>{{ m.content }}{% endfor %}")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9, 288]}))
    network = ByteTransformer(dataclasses.replace(model.config, lora={"r": 1, "target_modules": ("q",)}))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), split(param_shapes(network))[0])
    own, plain = str(tmp_path / "own"), str(tmp_path / "plain")
    save_adapter(own, network, zeros, base=base, tokenizer=other)
    save_adapter(plain, network, zeros, base=base)
    tokenizer, seen = load_tokenizer(other), []

    def warm_up(*_: object, **settings: object) -> float:
        seen.append((_[2], settings["stop_tokens"]))
        raise ValueError("seen")

    monkeypatch.setattr(generate, "warm_up", warm_up)

    def asked(*options: str) -> tuple[list[str], str]:
        chosen = ["--model", str(run), "--chat", "--stop-token", "5", *options]
        assert main(chosen) == 1
        rows, stops = seen.pop()
        assert sorted(stops) == ([2, 5, 9] if own in options else [2, 5])
        return [tokenizer.decode(row, skip_special_tokens=False) for row in rows], capsys.readouterr().err

    theirs, ours = "<|user|>Hi", "<|SBOS|>user\nHi<|SEOS|>\n<|SBOS|>assistant\n"
    hi = ("--prompt", "Hi")
    prompts, told = asked(*hi, *hi, "--adapter", own)
    assert prompts == [theirs] * 2 and "plain text" not in told
    prompts, told = asked(*hi, *hi, *hi, "--adapter", own, "none", plain)
    assert prompts == [theirs, ours, ours] and WARNING in told
    prompts, told = asked(*hi, "--adapter", plain)
    assert prompts == [ours] and "plain text" not in told
    prompts, _ = asked(*hi, "--adapter", own, "--system", "Be brief.")
    assert prompts == ["<|user|>Be brief." + theirs]
