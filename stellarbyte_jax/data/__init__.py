"""Documents and packed batches of their tokens."""
