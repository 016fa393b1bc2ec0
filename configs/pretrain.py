"""Pretraining of the 162M model (768 x 12, heads 12, F 3072, V 32,000, untied) on text of your own.

    python scripts/train.py --config configs/pretrain.py --set 'data.train=corpus/*.jsonl' data.validation=valid.jsonl

Hardware: one GPU with 80 GB (15.4 GiB are used; for less, raise gradient_accumulation_steps). Speed: 418,000 tokens/s
on one H100 80 GB with jax 0.11.2, the median of the run below; 20,000 steps take 26 minutes at that. Loss: without
settings it trains on the embedded corpus, which it soon knows by heart, a check that everything works: with steps=1000
schedule.warmup_steps=100 evaluation.interval=250 the validation loss was 6.20 after 250 steps and 7.84 after 1,000.

Llama: Touvron et al. 2023, https://arxiv.org/abs/2302.13971.
"""

from stellarbyte_jax.config import ByteConfig, DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig, beside


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
            train=(beside(__file__, "../data/tiny_bilingual_train.jsonl"),),
            validation=(beside(__file__, "../data/tiny_bilingual_valid.jsonl"),),
            tokenizer=beside(__file__, "../tokenizer"),
            sequence_length=1024,
            workers=2,
        ),
        optimizer=OptimizerConfig(learning_rate=6e-4),
        schedule=ScheduleConfig(warmup_steps=1000),
    )
