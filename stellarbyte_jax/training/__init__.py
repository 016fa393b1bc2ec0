"""From config to a trained checkpoint."""
