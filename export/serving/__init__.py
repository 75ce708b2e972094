"""Serving: rows of several requests in one batch, and the servers around the runtime."""
