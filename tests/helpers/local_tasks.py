"""Tasks of lm-eval that need no network: from Python's own HTTP statuses and from the embedded corpus.

``python tests/helpers/local_tasks.py DIR`` writes them.
"""

import http
import json
import random
import sys
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parents[2] / "data" / "tiny_bilingual_valid.jsonl"


def write_tasks(directory: Path) -> dict[str, Path]:
    """Files of tasks by their names: a choice, another without contexts, perplexity, and answers."""
    directory.mkdir(parents=True, exist_ok=True)
    statuses = [s for s in http.HTTPStatus if s.description][::2]
    numbers = random.Random(0)
    choices, answers = [], []
    for status in statuses:
        wrong = numbers.sample([s for s in statuses if s.phrase != status.phrase], 3)
        offered = sorted([status, *wrong])
        question = f"HTTP status {int(status)}: {status.description}. Its name is"
        choices.append({"question": question, "choices": [s.phrase for s in offered], "gold": offered.index(status)})
        answers.append({"question": f"Name of HTTP status {int(status)}:", "answer": status.phrase})
    corpus = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    english = next(document["text"] for document in corpus if document["lang"] == "en")
    pieces = [english[:1500], *(document["text"][:100] for document in corpus if document["lang"] != "en")][:5]
    words = english.split()
    sentences = [" ".join(words[at : at + 8]) for at in range(0, 96, 8)]
    pairs = [{"choices": [s, " ".join(reversed(s.split()))], "gold": 0, "question": ""} for s in sentences]
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    perplexity = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    }
    generated = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "fewshot_split": "test",
        "num_fewshot": 2,
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}, {"metric": "bleu"}],
    }
    return {
        "status_choice": _task(directory, "status_choice", choice, choices),
        "word_order": _task(directory, "word_order", choice | {"target_delimiter": ""}, pairs),
        "corpus": _task(directory, "corpus", perplexity, [{"text": piece} for piece in pieces], suffix="json"),
        "status_name": _task(directory, "status_name", generated, answers),
    }


def _task(directory: Path, name: str, settings: dict[str, Any], documents: list[Any], suffix: str = "yaml") -> Path:
    data = directory / f"{name}_documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    source = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(directory / "cache")},
        "test_split": "test",
        "metadata": {"version": 1},
    }
    path = directory / f"{name}.{suffix}"
    path.write_text(json.dumps(source | settings, indent=1), encoding="utf-8")  # which is YAML too
    return path


if __name__ == "__main__":
    for path in write_tasks(Path(sys.argv[1])).values():
        print(path)
