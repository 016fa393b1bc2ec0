"""What a smaller key/value cache and pruned attention cost: perplexity of real text, read token by token.

    python scripts/cache_quality.py --model HUGGING_FACE_DIRECTORY --text data/tiny_bilingual_valid.jsonl

Each text is read as generation reads it, one token after another through the cache, so that every prediction is made
from what the cache kept. Writes ``benchmarks/cache_quality.json``.
"""

import argparse
import dataclasses
import json
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from stellarbyte_jax.cli.parser import Parser
from stellarbyte_jax.cli.program import local_path, path_or_name
from stellarbyte_jax.command import command, imports

# Changes of the model's settings; {n} is a quarter of the text's length.
VARIANTS: dict[str, dict[str, Any]] = {
    "everything kept": {},
    "bfloat16": {"cache": {"dtype": "bfloat16"}},
    "int8": {"cache": {"dtype": "int8"}},
    "float8_e4m3fn": {"cache": {"dtype": "float8_e4m3fn"}},
    "half of the keys: heavy hitters and recent": {"cache": {"heavy_hitters": 1 / 4, "recent": 1 / 4}},
    "a quarter: heavy hitters and recent": {"cache": {"heavy_hitters": 1 / 8, "recent": 1 / 8}},
    "an eighth: heavy hitters and recent": {"cache": {"heavy_hitters": 1 / 16, "recent": 1 / 16}},
    "an eighth, in int8": {"cache": {"heavy_hitters": 1 / 16, "recent": 1 / 16, "dtype": "int8"}},
    "an eighth: recent alone": {"cache": {"heavy_hitters": 0, "recent": 1 / 8}},
    "an eighth: window and 4 sinks": {"sliding_window": 1 / 8, "sink_tokens": 4},
    "weights under 0.1 % pruned": {"attention_prune_below": 0.001},
    "weights under 1 % pruned": {"attention_prune_below": 0.01},
    "weights under 10 % pruned": {"attention_prune_below": 0.1},
}


@command
def main() -> int:
    """Parses the command line and measures."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=path_or_name, required=True, metavar="DIR", help="a directory, or owner/name")
    parser.add_argument("--text", type=local_path, required=True, metavar="FILE", help='records with a field "text"')
    parser.add_argument("--cache-dir", metavar="DIR", help="default: ~/.cache/stellarbyte_jax")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens of a text; default: %(default)s")
    parser.add_argument("--texts", type=int, default=8, metavar="N", help="how many; default: %(default)s")
    parser.add_argument("--output", type=local_path, default=Path("benchmarks/cache_quality.json"))
    arguments = parser.parse_args()

    with imports():
        import jax
        import jax.numpy as jnp
        import numpy as np

        from stellarbyte_jax.data.sources import cache_path, expand, open_lines
        from stellarbyte_jax.data.text import TextFormat, read_text
        from stellarbyte_jax.hf.directory import from_pretrained
        from stellarbyte_jax.hf.hub import local_directory
        from stellarbyte_jax.launch import environment
        from stellarbyte_jax.model.decoder import ByteTransformer, forward_step
        from stellarbyte_jax.model.io import State
        from stellarbyte_jax.model.state.cache import make_cache
        from stellarbyte_jax.tokenizer.codec import load_tokenizer

    directory = local_directory(arguments.model)
    model, params = from_pretrained(directory, compute_dtype="float32")
    tokenizer = load_tokenizer(directory)
    B, T = arguments.texts, arguments.length
    rows: list[list[int]] = []
    for path in expand(str(arguments.text), "--text"):
        source = open_lines(path, cache_path(arguments.cache_dir), ("text",))
        for row in range(source.documents):
            if len(rows) >= B:
                break
            ids = tokenizer.encode(read_text(source, row, TextFormat(), skip=None))
            rows += [ids[at : at + T] for at in range(0, len(ids) - T + 1, T)]
    if len(rows) < B:
        print(f"error: {arguments.text} holds {len(rows)} pieces of {T} tokens, {B} were asked for", file=sys.stderr)
        return 2
    tokens_BT = jnp.asarray(np.asarray(rows[:B], np.int32))

    def measure(changes: dict[str, Any]) -> dict[str, Any]:
        config = dataclasses.replace(model.config, **resolved(changes, T))
        changed = ByteTransformer(config)

        @jax.jit
        def read(params: Any, cache: Any) -> tuple[State, Any]:
            def step(state: State, pair: Any) -> tuple[State, Any]:
                now_B, next_B = pair
                logits_BV, state = forward_step(changed, params, now_B, state)
                log_p_BV = jax.nn.log_softmax(logits_BV)
                return state, -jnp.take_along_axis(log_p_BV, next_B[:, None], axis=1)[:, 0]

            # The first token opens the cache: a scan's carry must not change its static fields.
            _, state = forward_step(changed, params, tokens_BT[:, 0], State(cache))
            return jax.lax.scan(step, state, (tokens_BT[:, 1:-1].T, tokens_BT[:, 2:].T))

        began = time.perf_counter()
        state, nll = read(params, make_cache(config, B, T))
        nats = float(jnp.mean(nll))
        return {
            "perplexity": round(float(np.exp(nats)), 4),
            "nats": round(nats, 5),
            "cache_mib": round(state.cache.nbytes / 2**20, 2),
            "seconds": round(time.perf_counter() - began, 1),
        }

    results = {}
    for name, changes in VARIANTS.items():
        results[name] = measure(changes)
        print(f"{name:45} {results[name]}", flush=True)
    report = {
        "date": date.today().isoformat(),
        "on": environment(),
        "model": Path(arguments.model).name,
        "text": str(arguments.text),
        "texts": B,
        "length": T,
        "results": results,
    }
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def resolved(changes: dict[str, Any], length: int) -> dict[str, Any]:
    """Shares of the text's length as numbers of tokens."""
    counts = ("heavy_hitters", "recent", "sliding_window")
    return {
        name: resolved(value, length) if isinstance(value, dict) else int(value * length) if name in counts else value
        for name, value in changes.items()
    }


if __name__ == "__main__":
    sys.exit(main())
