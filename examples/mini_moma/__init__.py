"""A small MoMA, trained from nothing on a CPU: all parts of the original at a size that fits into the repository.

`python -m examples.mini_moma data`, then `vae`, then `train`; docs/mini.md explains them.
"""
