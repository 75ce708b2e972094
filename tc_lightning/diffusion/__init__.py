"""Noise schedule, samplers as coefficient tables, guidance and the training loss."""
