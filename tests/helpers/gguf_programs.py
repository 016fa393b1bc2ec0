"""Programs that ``gguf_files`` runs, each with the packages that it needs: ``gguf_programs.py NAME ARGUMENTS``."""

import contextlib
import io
import json
import logging
import runpy
import sys
import traceback
from pathlib import Path

import numpy as np


def convert(program: str) -> None:
    """Runs the converter once for each list of arguments on standard input, and prints what it wrote to its errors."""
    sys.path.insert(0, str(Path(program).parent))
    for words in json.load(sys.stdin):
        said = io.StringIO()
        logging.getLogger().handlers.clear()  # which would write to what the errors of the last one were
        sys.argv = [program, *words]
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                runpy.run_path(program, run_name="__main__")
                code: object = None
            except SystemExit as end:
                code = end.code
            except Exception:
                code = traceback.format_exc()
        print(json.dumps([not code, said.getvalue() + (code if isinstance(code, str) else "")]))


def read(*files: str) -> None:
    """Prints the metadata of each file as JSON and writes its tensors beside it, as npz."""
    from gguf import GGUFReader

    for file in files:
        held = GGUFReader(file)
        np.savez(Path(file).with_suffix(".npz"), **{tensor.name: np.asarray(tensor.data) for tensor in held.tensors})
        print(json.dumps({name: field.contents() for name, field in held.fields.items()}))


def train(corpus: str, target: str) -> None:
    """Trains a SentencePiece tokenizer on a file of records and saves it as transformers does."""
    from sentencepiece import SentencePieceTrainer
    from transformers import LlamaTokenizerFast

    texts = [json.loads(line)["text"] for line in Path(corpus).read_text(encoding="utf-8").splitlines()]
    Path(target).mkdir(parents=True)
    SentencePieceTrainer.Train(
        sentence_iterator=(line for text in texts for line in text.splitlines() if line),
        model_prefix=f"{target}/tokenizer",
        vocab_size=2500,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    LlamaTokenizerFast(
        vocab_file=f"{target}/tokenizer.model", legacy=False, add_prefix_space=True, pad_token="</s>"
    ).save_pretrained(target)


def compute(file: str, target: str) -> None:
    """Answers the request on standard input: logits as npy, the rest printed as JSON."""
    from llama_cpp import GGML_TYPE_F32, Llama

    request = json.load(sys.stdin)
    tokens = request["tokens"]
    context = len(tokens) + request["new_tokens"] + 8
    model = Llama(
        file,
        n_ctx=context,
        n_batch=context,
        logits_all=True,
        verbose=False,
        n_threads=1,
        type_k=GGML_TYPE_F32,  # the cache holds 16 bits by default, which moves logits by some 1e-4
        type_v=GGML_TYPE_F32,
        kv_overrides=request["overrides"] or None,
    )
    if tokens:
        model.eval(tokens)
    np.save(target, np.asarray(model.scores[: len(tokens)]))
    greedy: list[int] = []
    while len(greedy) < request["new_tokens"]:
        greedy.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(greedy[-1:])
    ids = [model.tokenize(text.encode(), add_bos=True, special=False) for text in request["texts"]]
    print(json.dumps({"greedy": greedy, "ids": ids}))


if __name__ == "__main__":
    {"convert": convert, "read": read, "train": train, "compute": compute}[sys.argv[1]](*sys.argv[2:])
