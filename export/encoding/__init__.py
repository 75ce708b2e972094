"""Text to conditions: the text encoders of a pipeline of diffusers, run once."""
