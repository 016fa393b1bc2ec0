"""Continues prompts with a trained or converted model."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stellarbyte_jax.cli.program import DTYPES, add_model, also_spelled, local_path, new_parser, told_by_options
from stellarbyte_jax.command import command, imports
from stellarbyte_jax.config import ByteConfig

with imports():
    from stellarbyte_jax.checkpoint.adapters import tokenizer_of_adapters
    from stellarbyte_jax.checkpoint.bundle import load_bundle
    from stellarbyte_jax.data.text import read_plain
    from stellarbyte_jax.inference.api import Generated, Weights, remember, warm_up
    from stellarbyte_jax.inference.bank import AdapterBank
    from stellarbyte_jax.inference.capacity import TooLongError, limits_of
    from stellarbyte_jax.inference.reconfigure import reconfigure
    from stellarbyte_jax.inference.text import continue_text, encode_prompt
    from stellarbyte_jax.launch import quiet_libraries
    from stellarbyte_jax.launch.compile_cache import CompileCache
    from stellarbyte_jax.model.decoder import ByteTransformer
    from stellarbyte_jax.tokenizer.chat import Conversation
    from stellarbyte_jax.tokenizer.codec import Tokenizer
    from stellarbyte_jax.tokenizer.special import stop_ids

_SETTINGS = (
    "max_new_tokens",
    "max_length",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "log_probs",
    "prefill_chunk",
)

_NO_ADAPTER = "none"


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, generates and returns the exit code."""
    parser = new_parser(
        "generate",
        "Continue prompts with a trained or converted model.",
        '--model runs/quickstart --prompt "The river" --prompt "春天" --temperature 0.8 --top-p 0.95',
        "--model path/to/hugging_face_directory --chat",
        "--model runs/quickstart --prompt-file long.txt --set sliding_window=512 sink_tokens=4",
        "--model exported --adapter runs/lora adapter none --prompt one --prompt two --prompt three",
        settings=ByteConfig,
    )
    add_model(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    parser.add_argument(
        "--prompt-file", action="append", default=[], type=local_path, metavar="FILE", help="one prompt a file"
    )
    parser.add_argument(
        "--adapter",
        action="extend",
        nargs="+",
        default=[],
        metavar="DIRECTORY",
        help="adapter of the model: a run, a directory of PEFT or owner/name; one, or one a prompt (none: no adapter)",
    )
    parser.add_argument("--chat", action="store_true", help="prompts are messages; without any, read from the terminal")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    parser.add_argument(
        "--parse-contents", action="store_true", help="with --chat: special tokens in messages count as such"
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 100")
    parser.add_argument("--max-length", type=int, metavar="N", help="instead: the length of each text with its prompt")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="default: %(default)s, greedy")
    parser.add_argument("--top-k", type=int, metavar="N")
    parser.add_argument("--top-p", type=float, metavar="X")
    parser.add_argument("--min-p", type=float, metavar="X")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="default: %(default)s, none")
    parser.add_argument(
        "--seed", type=int, nargs="+", default=[0], metavar="N", help="one (default: 0) or one a prompt"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a text; may be repeated")
    parser.add_argument("--stop-token", action="append", default=[], type=int, metavar="ID", help="likewise, as an id")
    parser.add_argument("--log-probs", action="store_true", help="tell how likely the model finds each output")
    parser.add_argument("--prefill-chunk", type=int, metavar="N", help="read long prompts in parts of so many tokens")
    parser.add_argument(
        "--remember", type=local_path, metavar="FILE", help="text that a model with memory reads before"
    )
    parser.add_argument(
        "--segment-length", type=int, metavar="N", help="with --remember (default: the model's positions)"
    )
    parser.add_argument("--bos", action=argparse.BooleanOptionalAction, help="begin with bos (default: as in training)")
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--compute-dtype", type=also_spelled(DTYPES), choices=dtypes, help="default: the model's")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="other settings of the model for this call, such as cache.dtype=int8, sliding_window=512 sink_tokens=4 or "
        "rope_scaling.name=yarn rope_scaling.factor=4",
    )
    options = parser.parse_args(arguments)
    settings = {name: getattr(options, name) for name in _SETTINGS}
    settings["seed"] = options.seed if len(options.seed) > 1 else options.seed[0]
    if options.max_new_tokens is None and options.max_length is None:
        settings["max_new_tokens"] = 100
    CompileCache()
    quiet_libraries()
    with told_by_options((*_SETTINGS, "segment_length")):
        try:
            return _generate(options, settings)
        except TooLongError as error:
            raise ValueError(f"{error} (such settings are given with --set)") from error


def _generate(options: argparse.Namespace, settings: dict[str, Any]) -> int:
    prompts = options.prompt + [_read(file) for file in options.prompt_file]
    if not prompts and not options.chat:
        raise ValueError("no prompt: give --prompt, --prompt-file or --chat")
    if "" in options.stop:
        raise ValueError("--stop is empty: give the text that is to end an output")
    for name, needs in (("system", "chat"), ("parse_contents", "chat"), ("segment_length", "remember")):
        if getattr(options, name) not in (None, False) and not getattr(options, needs):
            raise ValueError(f"--{name.replace('_', '-')} belongs to --{needs}")
    overrides = options.set + ([f"compute_dtype={options.compute_dtype}"] if options.compute_dtype else [])
    bundle = load_bundle(options.model, options.step, revision=options.revision)
    model, params, tokenizer = reconfigure(bundle.model, overrides), bundle.params, bundle.tokenizer
    bos = bundle.add_bos if options.bos is None else options.bos
    settings["stop_tokens"] = bundle.stop_ids + options.stop_token
    speakers = [tokenizer]  # whose chat template each prompt has, or all
    if options.adapter:
        settings["adapter"] = _choices(options.adapter, max(1, len(prompts)))
        named = {name: name for name in options.adapter if name != _NO_ADAPTER}
        params = AdapterBank.holding(model, params, named)
        own = {name: tokenizer_of_adapters(name) or tokenizer for name in named}
        speakers = [own.get(name, tokenizer) for name in options.adapter]
        ends = [i for each in own.values() for i in stop_ids(each.path, each.eos_id)]
        known = {i for i in ends if 0 <= i < model.config.vocab_size}
        settings["stop_tokens"] += sorted(known.difference(settings["stop_tokens"]))
    if options.remember is not None:
        text = encode_prompt(tokenizer, _read(options.remember), add_bos=bos)
        length = options.segment_length
        length = model.config.max_position_embeddings if length is None else length
        texts_before = [text] * max(1, len(prompts))
        settings["memory"] = remember(
            model, params, texts_before, segment_length=length, adapter=settings.get("adapter")
        )
        bos = bool(options.bos)  # prompts go on with the text
    texts = {**settings, "stop_texts": options.stop}
    if options.chat and bundle.plain_text and (not options.adapter or _NO_ADAPTER in options.adapter):
        print(
            f"warning: {options.model} was trained on plain text, not on conversations: expect it to go on with the "
            "messages, not to answer them",
            file=sys.stderr,
        )

    def conversation(number: int) -> Conversation:
        speaker = speakers[number % len(speakers)]
        return Conversation(speaker, system=options.system, parse_contents=options.parse_contents)

    if options.chat and not prompts:
        return _converse(model, params, tokenizer, conversation(0), texts)
    if options.chat:
        rows = [conversation(number).ask(prompt) for number, prompt in enumerate(prompts)]
    else:
        rows = [encode_prompt(tokenizer, prompt, add_bos=bos) for prompt in prompts]
    stream = len(rows) == 1 or bool(options.stop)
    compiled = warm_up(model, params, rows, stream=stream, **settings)
    shown = ["" if options.chat else prompt for prompt in prompts]
    if len(rows) == 1:
        print(shown[0], end="", flush=True)
        done = continue_text(model, params, tokenizer, rows, on_text=_show, **texts)
        print()
    else:
        done = continue_text(model, params, tokenizer, rows, **texts)
        print("\n---\n".join(before + after for before, after in zip(shown, done.texts, strict=True)))
    if options.log_probs:
        print(_likelihoods(done.generated), file=sys.stderr)
    print(_speed(done.generated, sum(map(len, rows)), compiled), file=sys.stderr)
    return 0


def _choices(names: list[str], prompts: int) -> str | list[str | None] | None:
    if len(names) not in (1, prompts):
        raise ValueError(f"--adapter names {len(names)} for {prompts} prompts: give one, or one a prompt")
    chosen = [None if name == _NO_ADAPTER else name for name in names]
    return chosen if len(names) > 1 else chosen[0]


def _converse(
    model: ByteTransformer, params: Weights, tokenizer: Tokenizer, conversation: Conversation, texts: dict[str, Any]
) -> int:
    if texts["max_length"] is not None:
        raise ValueError("--max-length cannot be used in a conversation, whose prompts grow: give --max-new-tokens")
    positions = limits_of(model.config).positions
    limit = None if positions is None else max(0, positions - texts["max_new_tokens"])
    print("An empty line or Ctrl-D ends the conversation.", file=sys.stderr)
    while text := _ask():
        before = len(conversation.messages)
        prompt = conversation.ask(text, limit=limit)
        forgotten = before + 1 - len(conversation.messages)
        if forgotten:
            print(f"(the {forgotten} oldest messages no longer fit into {positions} positions)", file=sys.stderr)
        reply = continue_text(model, params, tokenizer, [prompt], on_text=_show, **texts)
        conversation.answer(reply.texts[0])
        print()
        if texts["log_probs"]:
            print(_likelihoods(reply.generated), file=sys.stderr)
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
    return read_plain(file).removesuffix("\n")


def _likelihoods(generated: Generated) -> str:
    """One line an output; its stop token and what follows a stop text count too."""
    means = generated.mean_log_probs
    return "\n".join(
        f"output {number}: mean log-probability {mean:.4f}, perplexity {math.exp(-mean):.3f}, {length} tokens"
        for number, (mean, length) in enumerate(zip(means, generated.lengths, strict=True), 1)
    )


def _speed(generated: Generated, prompt_tokens: int, compiled: float) -> str:
    new_tokens = int(generated.lengths.sum())
    return (
        f"prompts: {prompt_tokens} tokens, {prompt_tokens / generated.prefill_seconds:,.0f} tokens/s; "
        f"output: {new_tokens} tokens, {new_tokens / generated.decode_seconds:,.0f} tokens/s; "
        f"compiled before that in {compiled:.1f} s"
    )
