"""Learning the project's own tokenizer, its format and its evaluation."""
