"""Running plans in torch: the reference sampler, noise, targets and errors of final latents."""
