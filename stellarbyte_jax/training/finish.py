"""What a run does when it is over: an exported directory, samples of text. What is done is noted and not repeated."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stellarbyte_jax.checkpoint.source import tokenizer_of
from stellarbyte_jax.checkpoint.store import EXPORT
from stellarbyte_jax.checkpoint.weights import training_facts
from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.hf.card import TrainingFacts
from stellarbyte_jax.hf.directory import save_pretrained
from stellarbyte_jax.hf.families import export_family
from stellarbyte_jax.hf.files import clear_abandoned
from stellarbyte_jax.inference.request import Request
from stellarbyte_jax.inference.text import encode_prompt, generate_text
from stellarbyte_jax.launch import write_failure
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.trees import Params
from stellarbyte_jax.tokenizer.codec import load_tokenizer
from stellarbyte_jax.tokenizer.directory import write_json

_NOTE = "finished.json"  # in the run's directory: the last step, and what was done after it


def check(config: TrainConfig) -> None:
    """Raises ValueError at the start of a run where its end could not be done."""
    if config.export_at_end:
        export_family(config.model)
    if config.sample_prompts:
        tokenizer = load_tokenizer(config.data.tokenizer)
        for prompt in config.sample_prompts:
            row = encode_prompt(tokenizer, prompt, add_bos=config.data.add_bos)
            try:
                Request.make(config.model, [row], max_new_tokens=_sample_tokens(config))
            except ValueError as error:
                raise ValueError(f"sample_prompts: {prompt[:40]!r} cannot be continued: {error}") from None


def recover(config: TrainConfig) -> None:
    """Removes what a killed export left, and puts back what it was about to replace; under the run's lock."""
    clear_abandoned(Path(config.output_dir) / EXPORT, alone=True)


def forget(config: TrainConfig) -> None:
    """What was done at an earlier end is to be done again, since weights change: also at a step of the same number."""
    note = Path(config.output_dir) / _NOTE
    try:
        note.unlink(missing_ok=True)
    except OSError as error:
        raise write_failure(note, error) from error


def finish(
    config: TrainConfig,
    model: ByteTransformer,
    params: Params,
    step: int,
    say: Callable[[str], None],
    validation_loss: float | None = None,
) -> Path | None:
    """Exports and prints samples as the settings ask for, unless that was done after this step already.

    Args:
      config: of the run.
      model: its network.
      params: its weights.
      step: the last one.
      say: takes the samples' lines.
      validation_loss: of these weights, where it is known.

    Returns:
      The exported directory, where one is asked for.
    """
    note = Path(config.output_dir) / _NOTE
    done = _read(note, step)
    target = Path(config.output_dir) / EXPORT
    if config.export_at_end and not (done.get("exported") and target.is_dir()):
        try:
            export(config, model, params, training_facts(config, step, validation_loss))
        except OSError as error:
            raise write_failure(target, error) from error
        done["exported"] = True
        _write(note, done)
    prompts = list(config.sample_prompts)
    if prompts and done.get("sample_prompts") != prompts:
        samples(config, model, params, say)
        done["sample_prompts"] = prompts
        _write(note, done)
    return target if config.export_at_end else None


def export(config: TrainConfig, model: ByteTransformer, params: Params, training: TrainingFacts | None = None) -> None:
    """Writes ``output_dir/hf`` anew; its model card tells the facts of ``training``."""
    target, tokenizer = Path(config.output_dir) / EXPORT, tokenizer_of(config.output_dir, config)
    save_pretrained(target, model, params, tokenizer=tokenizer, overwrite=True, training=training)


def samples(config: TrainConfig, model: ByteTransformer, params: Params, say: Callable[[str], None]) -> None:
    """Continues ``sample_prompts`` and prints the texts."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    texts = generate_text(
        model,
        params,
        tokenizer,
        list(config.sample_prompts),
        max_new_tokens=_sample_tokens(config),
        temperature=0.8,
        top_k=40,
        add_bos=config.data.add_bos,
    )
    for prompt, text in zip(config.sample_prompts, texts, strict=True):
        say(f"sample: {prompt}|{text}")


def _sample_tokens(config: TrainConfig) -> int:
    return min(64, config.model.max_position_embeddings // 2)


def _write(note: Path, done: dict[str, Any]) -> None:
    try:
        write_json(note, done)
    except OSError as error:
        raise write_failure(note, error) from error


def _read(note: Path, step: int) -> dict[str, Any]:
    """What was done after this step; nothing where the note is of another one, missing or broken."""
    try:
        done = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        done = None
    return done if isinstance(done, dict) and done.get("step") == step else {"step": step}
