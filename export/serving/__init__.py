"""Artefacts behind a server: rows of many requests in one batch, for Triton and LitServe."""
