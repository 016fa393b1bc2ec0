"""A first run on the embedded bilingual corpus: a small Llama-shaped model, a few minutes on two CPU cores.

    python scripts/train.py --config configs/quickstart.py

Hardware: a CPU. Time: 260 s of training on two cores. Loss: 5.87 on the validation documents, 2.65 bits a byte.
Ends with samples of English and Chinese, a checkpoint and a Hugging Face directory under runs/quickstart.

Llama: Touvron et al. 2023, https://arxiv.org/abs/2302.13971; Muon: Liu et al. 2025, https://arxiv.org/abs/2502.16982.
"""

from stellarbyte_jax.config import (
    ByteConfig,
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
        output_dir="runs/quickstart",
        steps=500,
        global_batch_size=8,
        export_at_end=True,
        sample_prompts=("Call me", "The American people", "春風", "子曰："),
        model=ByteConfig(
            vocab_size=32000,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=384,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            compute_dtype="float32",
        ),
        data=DataConfig(
            train=(beside(__file__, "../data/tiny_bilingual_train.jsonl"),),
            validation=(beside(__file__, "../data/tiny_bilingual_valid.jsonl"),),
            tokenizer=beside(__file__, "../tokenizer"),
            sequence_length=128,
            workers=0,
        ),
        optimizer=OptimizerConfig(name="muon", learning_rate=6e-3),
        schedule=ScheduleConfig(warmup_steps=20),
        evaluation=EvaluationConfig(interval=125, batches=None),
        checkpoint=CheckpointConfig(interval=125),
        logging=LoggingConfig(interval=10),
    )
