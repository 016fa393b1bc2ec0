"""The model card of an export: a README.md that says what the files are, and claims nothing that is not known."""

from collections.abc import Sequence
from dataclasses import dataclass

from stellarbyte_jax.config import ByteConfig

CARD = "README.md"

_FRONT = """---
library_name: transformers
pipeline_tag: text-generation
{}---
"""
_OWN_CODE = "tags:\n- custom_code\n"
_LOAD_HF = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
```"""
_LOAD_HF_TEXT = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
```"""
# AutoTokenizer reads the model's config too, and asks on the terminal whether to run the file unless it is told.
_TRUST = (
    '.from_pretrained("path/to/this/directory"',
    '.from_pretrained("path/to/this/directory", trust_remote_code=True',
)
_LOAD_OURS = """```python
from stellarbyte_jax import from_pretrained

model, params = from_pretrained("path/to/this/directory")
```"""


_ADAPTER = """---
library_name: peft
{}tags:
- lora
---

# Low-rank adapters

Of `{}`, exported by stellarbyte_jax.

## Use

With PEFT:

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/directory"{})
```

With stellarbyte_jax:

```python
from stellarbyte_jax import load_run

model = load_run("path/to/this/directory")
```
"""


@dataclass(frozen=True)
class TrainingFacts:
    """What is known of the run that the weights are of.

    Attributes:
      steps: optimizer steps.
      tokens: positions that those steps read, padding included.
      optimizer: name of the update rule.
      validation_loss: mean cross-entropy of these weights, in nats a token; None where it was not measured.
      plain_text: whether it is known that they saw plain text alone, no conversations.
    """

    steps: int
    tokens: int
    optimizer: str
    validation_loss: float | None = None
    plain_text: bool = False


def model_card(
    config: ByteConfig,
    *,
    architecture: str,
    parameters: int,
    dtype: str,
    has_tokenizer: bool,
    own_code: bool = False,
    training: TrainingFacts | None = None,
) -> str:
    """Markdown with the front matter of the Hugging Face Hub, without language, licence or data, which are not known.

    Args:
      config: of the model.
      architecture: the class of transformers that loads it.
      parameters: number of weights in the files; with experts, those that one token uses are told too.
      dtype: of the weights in the files.
      has_tokenizer: whether the export holds a tokenizer.
      own_code: whether transformers needs the modelling file of the directory.
      training: facts of the run; None where there was none.
    """
    active = f", {config.active_parameters(parameters):,} active" if config.moe_layers else ""
    rows = [
        ("architecture", architecture),
        ("parameters", f"{parameters:,} ({dtype}){active}"),
        ("layers", f"{config.num_hidden_layers}"),
        ("hidden size", f"{config.hidden_size:,}"),
        ("attention heads", f"{config.num_attention_heads}, {config.kv_heads} of keys and values"),
        *([("experts", _experts(config))] if config.moe_layers else []),
        *([("feed-forward size", f"{config.mlp_size:,}")] if len(config.moe_layers) < config.num_hidden_layers else []),
        ("context length", f"{config.max_position_embeddings:,} tokens"),
        ("vocabulary", f"{config.vocab_size:,} tokens"),
    ]
    sections = [
        "# Model card",
        f"A decoder-only language model, exported by stellarbyte_jax for `{architecture}`.",
        _table(("", ""), rows),
        "## Use",
        "With transformers:",
        _with_transformers(has_tokenizer, own_code),
        "With stellarbyte_jax:",
        _LOAD_OURS,
    ]
    if training is not None:
        sections += ["## Training", _table(("", ""), _facts(training))]
    return _FRONT.format(_OWN_CODE if own_code else "") + "\n" + "\n\n".join(sections) + "\n"


def adapter_card(base: str, *, own_code: bool) -> str:
    """Markdown of a directory with adapters alone, with the front matter of the Hugging Face Hub.

    Args:
      base: directory of the base model, or a name of the hub.
      own_code: whether transformers needs the modelling file of the base.
    """
    trust = ", trust_remote_code=True" if own_code else ""
    named = f"base_model: {base}\n" if not base.startswith("/") else ""
    return _ADAPTER.format(named, base, trust)


def _experts(config: ByteConfig) -> str:
    c = config.moe
    shared = f" and {c.n_shared_experts} shared" if c.n_shared_experts else ""
    used = f"{c.num_experts_per_tok} of {c.num_experts}{shared} for each token"
    return f"{used} in {len(config.moe_layers)} layers, {config.expert_size:,} channels each"


def _with_transformers(has_tokenizer: bool, own_code: bool) -> str:
    text = _LOAD_HF_TEXT if has_tokenizer else _LOAD_HF
    return text.replace(*_TRUST) if own_code else text


def _facts(training: TrainingFacts) -> list[tuple[str, str]]:
    rows = [
        ("optimizer", training.optimizer),
        ("steps", f"{training.steps:,}"),
        ("tokens", f"{training.tokens:,} (padding included)"),
    ]
    if training.validation_loss is not None:
        rows.append(("validation loss", f"{training.validation_loss:.4f} nats a token"))
    if training.plain_text:
        rows.append(("texts", "plain text, no conversations: it continues texts and answers no messages"))
    return rows


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in (head, ("---", "---"), *rows))
