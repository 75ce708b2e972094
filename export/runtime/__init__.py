"""Runs artefacts: numpy and onnxruntime, plans (`tc_lightning.plan`) and noise, and no torch."""
