"""Gives memory that nobody uses back to the system. Standard library only."""

from __future__ import annotations

import ctypes


def trim() -> None:
    """Give free pages back, where the C library is glibc: it keeps those between blocks that are still in use, of which requests of
    changing sizes leave more and more (half a megabyte in a hundred requests of a tiny model, nearly all of it free)."""
    if give_back := getattr(ctypes.CDLL(None), "malloc_trim", None):
        give_back(0)
