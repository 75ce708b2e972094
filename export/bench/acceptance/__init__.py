"""The stages of `export/acceptance.py`: each one file with a function `run`, and what runs them and tells of them."""
