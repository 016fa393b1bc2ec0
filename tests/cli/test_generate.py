"""What the command refuses before it loads a model, and what it says of one."""

from pathlib import Path

import pytest
from helpers.hf_models import random_model
from helpers.runs import one_error
from helpers.tiny_documents import save_byte_tokenizer

from stellarbyte_jax.checkpoint.store import Checkpointer
from stellarbyte_jax.cli.generate import main
from stellarbyte_jax.config import CheckpointConfig, DataConfig, TrainConfig

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
