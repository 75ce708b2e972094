"""LightningModules, and the callbacks and plug-ins around them."""
