"""The commands, behind ``stellarbyte NAME`` and ``python scripts/FILE.py``: each parses, builds and calls."""
