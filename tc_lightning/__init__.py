"""TokenCache for diffusion transformers (arXiv 2409.18523): distil, plan, export.

Importing this package imports nothing heavy; `tc_lightning.plan.cache_plan` needs neither torch nor lightning.
"""

__version__ = "0.1.0"
