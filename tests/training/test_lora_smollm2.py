"""Adapters of a real pretrained model, trained here and by PEFT on torch: the same losses, step by step."""

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.hf_models import NEEDS_TORCH
from helpers.smollm2 import smollm2

from stellarbyte_jax.config import (
    ByteConfig,
    DataConfig,
    LoRAConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    compose,
)
from stellarbyte_jax.data.loader import make_loader
from stellarbyte_jax.hf.peft import save_adapter
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.training import begin
from stellarbyte_jax.training.optimizer import make_optimizer, make_schedule
from stellarbyte_jax.training.state import state_shapes
from stellarbyte_jax.training.step import make_train_step

torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
peft = pytest.importorskip("peft", reason="pip install peft")
import transformers  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning"),  # what PEFT asks of transformers
]
CHATS = Path(__file__).parents[2] / "data" / "tiny_chat_train.jsonl"
STEPS, WARMUP, PEAK, DECAY, CLIP = 30, 5, 2e-3, 0.1, 1.0
B1, B2, EPS = 0.9, 0.95, 1e-8
LAST = 5  # steps whose losses are compared with the base's
TOLERANCE = 1e-3  # of each step's loss


def settings(directory: Path, tmp_path: Path) -> TrainConfig:
    config = TrainConfig(
        output_dir=str(tmp_path / "run"),
        init_from=str(directory),
        steps=STEPS,
        global_batch_size=1,
        model=ByteConfig(lora=LoRAConfig(r=16, lora_alpha=32.0)),
        data=DataConfig(
            train=(str(CHATS),), format="chat", sequence_length=128, workers=0, cache_dir=str(tmp_path / "cache")
        ),
        optimizer=OptimizerConfig(
            learning_rate=PEAK, b1=B1, b2=B2, eps=EPS, weight_decay=DECAY, gradient_clip_norm=CLIP
        ),
        schedule=ScheduleConfig(name="cosine", warmup_steps=WARMUP, final_ratio=0.1),
    )
    return compose(config, ["model.compute_dtype=float32"], begin.inherit)


def ours(config: TrainConfig, batches: list[dict[str, np.ndarray]], adapter: Path) -> np.ndarray:
    """The losses of our steps; the adapters that they begin with are written to ``adapter``."""
    model = ByteTransformer(config.model)
    optimizer = make_optimizer(config, model)
    begun = begin.from_weights(config, state_shapes(config, model, optimizer), optimizer, lambda line: None)
    assert begun is not None
    state = begun.state
    save_adapter(adapter, model, state.weights, base=str(config.init_from))
    # Not as quickly compiled as in other tests: these steps take long.
    fast = {"xla_backend_optimization_level": 3}
    train_step = make_train_step(config, model, optimizer, make_schedule(config))
    step = jax.jit(train_step, donate_argnums=0, compiler_options=fast)
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return np.asarray(losses)


def theirs(directory: Path, batches: list[dict[str, np.ndarray]], adapter: Path) -> tuple[np.ndarray, np.ndarray]:
    """The losses of the same steps on torch, and of the last batches those that the base has by itself."""
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True).train()
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(learnt) == 30 * 7 * 2
    optimizer = torch.optim.AdamW(learnt, lr=PEAK, betas=(B1, B2), eps=EPS, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)
    losses = []
    for batch in batches:
        loss = mean_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad(), model.disable_adapter():
        alone = [mean_loss(model, batch).item() for batch in batches[-LAST:]]
    return np.asarray(losses), np.asarray(alone)


def mean_loss(model: Any, batch: dict[str, np.ndarray]) -> Any:
    """Over the assistant's tokens of a batch, whose conversations do not see each other."""
    logits = model(
        input_ids=torch.from_numpy(batch["tokens"]).long(),
        position_ids=torch.from_numpy(batch["positions"]).long(),
        attention_mask=torch.from_numpy(sees(batch["segment_ids"]))[:, None],
    ).logits
    labels = torch.from_numpy(np.where(batch["loss_mask"], batch["tokens"], -100)).long()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def share_of_peak(step: int) -> float:
    """A linear warm-up whose first step is not zero, and a cosine to a tenth at the last step."""
    if step < WARMUP:
        return (step + 1) / (WARMUP + 1)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - 1 - WARMUP))) / 2


def sees(segments_BT: np.ndarray) -> np.ndarray:
    """Which position sees which, bool [B, T, T]: those before it in its own conversation, or in the padding."""
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    return same_BTT & np.tri(segments_BT.shape[1], dtype=bool)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of torch: beside other tests, two wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_losses_are_those_of_peft(tmp_path: Path) -> None:
    directory = smollm2()
    config = settings(directory, tmp_path)
    rows = functools.partial(make_loader, config.data, split="train", batch_size=config.global_batch_size)
    with rows(seed=config.seed, vocab_size=config.model.vocab_size) as loader:
        batches = [batch for batch, _ in zip(loader, range(STEPS), strict=False)]
    assert sum(batch["segment_ids"].max() > 1 for batch in batches) > STEPS // 3, "rows of several conversations"
    found = ours(config, batches, tmp_path / "adapter")
    expected, alone = theirs(directory, batches, tmp_path / "adapter")
    apart = np.abs(found - expected) / expected
    print(
        f"SmolLM2-135M-Instruct: largest relative difference {apart.max():.1e} (step {apart.argmax() + 1} of {STEPS}); "
        f"mean loss of the last {LAST} steps {expected[-LAST:].mean():.3f}, of the base alone {alone.mean():.3f}"
    )
    np.testing.assert_array_less(apart, TOLERANCE)
    assert expected[-LAST:].mean() < 0.9 * alone.mean(), "adapters that learn nothing would agree too"
