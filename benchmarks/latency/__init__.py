"""Latency of whole requests, compared with the original implementation in PyTorch."""
