"""The planner: searches sampler, spacing, full steps, segments and guidance together, and writes the whole front."""
