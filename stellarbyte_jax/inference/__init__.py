"""Generation: prompts in, new tokens or text out."""
