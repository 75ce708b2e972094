"""The plan, the waist of the package, and what follows from it: no torch anywhere in this folder."""
