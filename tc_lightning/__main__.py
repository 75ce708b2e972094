"""`python -m tc_lightning` is the same command as `lightning` and `tc-lightning`."""

from tc_lightning.cli import main

main()
