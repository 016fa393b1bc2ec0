"""Names and layouts of Hugging Face checkpoints, and directories of them."""
