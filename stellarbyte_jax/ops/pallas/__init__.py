"""Kernels for NVIDIA Hopper GPUs, written in Pallas for Mosaic GPU, and what they share."""
