"""Diffusion transformers and the checkpoints they are loaded from."""
