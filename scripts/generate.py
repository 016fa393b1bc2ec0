"""Continues prompts with a trained or converted model.

python scripts/generate.py --model runs/quickstart --prompt "The river" --prompt "春天" --temperature 0.8 --top-p 0.95
python scripts/generate.py --model path/to/hugging_face_directory --chat
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from stellarbyte_jax.data.tokenizer import Tokenizer, load_tokenizer
from stellarbyte_jax.generate.api import Generated, warm_up
from stellarbyte_jax.generate.chat import Conversation
from stellarbyte_jax.generate.text import adds_bos, continue_text, encode_prompt, stop_ids
from stellarbyte_jax.launch import CompileCache
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.train.checkpoint import CheckpointError


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line, generates and returns the exit code."""
    parser = argparse.ArgumentParser(description="Continue prompts with a trained or converted model.")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="a run or a Hugging Face directory")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of the run (default: the newest)")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    parser.add_argument(
        "--prompt-file", action="append", default=[], type=Path, metavar="FILE", help="one prompt a file"
    )
    parser.add_argument("--chat", action="store_true", help="prompts are messages; without any, read from the terminal")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="default: %(default)s, greedy")
    parser.add_argument("--top-k", type=int, metavar="N")
    parser.add_argument("--top-p", type=float, metavar="X")
    parser.add_argument("--min-p", type=float, metavar="X")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="default: %(default)s, none")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a text; may be repeated")
    parser.add_argument("--bos", action=argparse.BooleanOptionalAction, help="begin with bos (default: as in training)")
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"), help="default: the model's")
    options = parser.parse_args(arguments)
    settings = {
        name: getattr(options, name)
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    }
    CompileCache()
    try:
        prompts = options.prompt + [_read(file) for file in options.prompt_file]
        if not prompts and not options.chat:
            raise ValueError("no prompt: give --prompt, --prompt-file or --chat")
        if options.system is not None and not options.chat:
            raise ValueError("--system belongs to --chat")
        overrides = {"compute_dtype": options.compute_dtype} if options.compute_dtype else {}
        model, params, tokenizer, bos, stop_tokens = _load(options.model, options.step, overrides)
        texts = {**settings, "stop_tokens": stop_tokens, "stop_texts": options.stop}
        if options.chat and not prompts:
            return _converse(model, params, tokenizer, options.system, texts)
        if options.chat:
            rows = [Conversation(tokenizer, system=options.system).ask(prompt) for prompt in prompts]
        else:
            bos = bos if options.bos is None else options.bos
            rows = [encode_prompt(tokenizer, prompt, add_bos=bos) for prompt in prompts]
        stream = len(rows) == 1 or bool(options.stop)
        compiled = warm_up(model, params, rows, stream=stream, stop_tokens=stop_tokens, **settings)
        shown = ["" if options.chat else prompt for prompt in prompts]
        if len(rows) == 1:
            print(shown[0], end="", flush=True)
            done = continue_text(model, params, tokenizer, rows, on_text=_show, **texts)
            print()
        else:
            done = continue_text(model, params, tokenizer, rows, **texts)
            print("\n---\n".join(before + after for before, after in zip(shown, done.texts, strict=True)))
        print(_speed(done.generated, sum(map(len, rows)), compiled), file=sys.stderr)
    except (ValueError, OSError, CheckpointError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ngenerate: interrupted", file=sys.stderr)
        return 130
    return 0


def _load(
    path: Path, step: int | None, overrides: dict[str, Any]
) -> tuple[ByteTransformer, dict[str, Any], Tokenizer, bool, list[int]]:
    """Model, weights, tokenizer, whether texts begin with bos, and the ids that end them."""
    if (path / "config.json").is_file():
        from stellarbyte_jax.hf.directory import from_pretrained

        if step is not None:
            raise ValueError(f"--step belongs to a run directory; {path} is a Hugging Face directory")
        model, params = from_pretrained(path, **overrides)
        tokenizer = load_tokenizer(path)
        return model, params, tokenizer, adds_bos(tokenizer), stop_ids(path, tokenizer)
    if (path / "checkpoints").is_dir():
        from stellarbyte_jax.launch import quiet_libraries
        from stellarbyte_jax.train.checkpoint import load_for_export

        quiet_libraries()
        config, params = load_for_export(path, step)
        own = path / "tokenizer"
        tokenizer = load_tokenizer(own if own.is_dir() else config.data.tokenizer)
        model = ByteTransformer(dataclasses.replace(config.model, **overrides))
        return model, params, tokenizer, config.data.add_bos, stop_ids(own, tokenizer)
    raise ValueError(
        f"--model {path} is neither a Hugging Face directory (config.json) nor a run directory (checkpoints/): "
        "give the output_dir of a run, or a converted model"
    )


def _converse(model: ByteTransformer, params: Any, tokenizer: Tokenizer, system: str | None, texts: Any) -> int:
    conversation = Conversation(tokenizer, system=system)
    print("An empty line or Ctrl-D ends the conversation.", file=sys.stderr)
    while text := _ask():
        prompt = conversation.ask(text)
        reply = continue_text(model, params, tokenizer, [prompt], on_text=_show, **texts)
        conversation.answer(reply.texts[0])
        print()
    return 0


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _show(row: int, text: str) -> None:
    del row
    print(text, end="", flush=True)


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8").removesuffix("\n")


def _speed(generated: Generated, prompt_tokens: int, compiled: float) -> str:
    new_tokens = int(generated.lengths.sum())
    return (
        f"prompts: {prompt_tokens} tokens, {prompt_tokens / generated.prefill_seconds:,.0f} tokens/s; "
        f"output: {new_tokens} tokens, {new_tokens / generated.decode_seconds:,.0f} tokens/s; "
        f"compiled before that in {compiled:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
