"""Tokenizer directories, text to ids and back, special tokens and chat prompts."""
