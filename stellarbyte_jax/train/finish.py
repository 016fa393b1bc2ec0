"""What a run does when it is over: samples of text, an exported directory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.hf.directory import save_pretrained
from stellarbyte_jax.hf.families import export_family
from stellarbyte_jax.inference.text import generate_text
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.tokenizer.codec import load_tokenizer


def check_exportable(config: TrainConfig) -> None:
    """Raises ValueError at the start of a run whose model could not be exported at its end."""
    if config.export_at_end:
        export_family(config.model)


def samples(config: TrainConfig, model: ByteTransformer, params: dict[str, Any], say: Callable[[str], None]) -> None:
    """Continues ``sample_prompts`` and prints the texts."""
    if not config.sample_prompts:
        return
    tokenizer = load_tokenizer(config.data.tokenizer)
    longest = min(64, config.model.max_position_embeddings // 2)
    texts = generate_text(
        model,
        params,
        tokenizer,
        list(config.sample_prompts),
        max_new_tokens=longest,
        temperature=0.8,
        top_k=40,
        add_bos=config.data.add_bos,
    )
    for prompt, text in zip(config.sample_prompts, texts, strict=True):
        say(f"sample: {prompt}|{text}")


def export(config: TrainConfig, model: ByteTransformer, params: dict[str, Any]) -> Path | None:
    """Writes ``output_dir/hf`` where ``export_at_end`` asks for it."""
    if not config.export_at_end:
        return None
    target = Path(config.output_dir) / "hf"
    save_pretrained(target, model, params, tokenizer=config.data.tokenizer, overwrite=True)
    return target
