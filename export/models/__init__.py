"""MoMA's networks in PyTorch, written for tracing on diffusers' and transformers' own modules."""
