"""Fine-tuning on conversations: the model of configs/quickstart.py learns to answer.

    python scripts/train.py --config configs/quickstart.py
    python scripts/train.py --config configs/sft.py
    python scripts/generate.py --model runs/sft --chat

Hardware: a CPU. The loss is that of the assistant's replies and of the token that ends each. Other weights to begin
with, of a run or a Hugging Face directory: `--set init_from=DIRECTORY`; other conversations: `--set data.train=FILE`,
in any of the forms that docs/sft.md shows.
"""

from stellarbyte_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    beside,
)


def config() -> TrainConfig:
    """The run."""
    return TrainConfig(
        output_dir="runs/sft",
        init_from="runs/quickstart",
        steps=300,
        global_batch_size=8,
        export_at_end=True,
        sample_prompts=("What is AI?", "Who is the 37th President of the United States?", "你好", "你是谁？"),
        sample_interval=100,
        data=DataConfig(
            train=(beside(__file__, "../data/tiny_chat_train.jsonl"),),
            validation=(beside(__file__, "../data/tiny_chat_valid.jsonl"),),
            format="chat",
            sequence_length=256,
            workers=0,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.0),
        schedule=ScheduleConfig(warmup_steps=20),
        evaluation=EvaluationConfig(interval=100, batches=None),
        checkpoint=CheckpointConfig(interval=100),
        logging=LoggingConfig(interval=10),
    )
