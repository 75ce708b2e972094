"""Measurements of artefacts on this machine: time, memory, fidelity, acceptance."""
