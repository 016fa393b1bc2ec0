"""Real runs under the faults of a machine, and what must hold afterwards: python -m faults."""
