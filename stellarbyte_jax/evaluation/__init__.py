"""Evaluation on tasks of EleutherAI's lm-eval: scores of continuations, generated answers, and metrics of them."""
