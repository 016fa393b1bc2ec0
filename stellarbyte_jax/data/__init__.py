"""Documents, tokenizer and packed batches."""
