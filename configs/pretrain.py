"""Pretraining of the 162M model (768 x 12, heads 12, F 3072, V 32,000, untied) on text of your own.

    python scripts/train.py --config configs/pretrain.py --set 'data.train=corpus/*.jsonl' data.validation=valid.jsonl

One GPU with 80 GB at these settings; for less memory lower global_batch_size or raise gradient_accumulation_steps.
Without settings it trains on the embedded corpus, which it soon knows by heart: a check that everything works.
"""

from stellarbyte_jax.config import ByteConfig, DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig


def config() -> TrainConfig:
    """The run."""
    return TrainConfig(
        output_dir="runs/pretrain",
        steps=20_000,
        global_batch_size=32,
        model=ByteConfig(
            vocab_size=32000,
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            intermediate_size=3072,
            max_position_embeddings=2048,
            scan_unroll=None,
        ),
        data=DataConfig(
            train=("data/tiny_bilingual_train.jsonl",),
            validation=("data/tiny_bilingual_valid.jsonl",),
            sequence_length=1024,
            workers=2,
        ),
        optimizer=OptimizerConfig(learning_rate=6e-4),
        schedule=ScheduleConfig(warmup_steps=1000),
    )
