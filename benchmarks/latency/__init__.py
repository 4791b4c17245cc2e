"""Latency of whole requests against what a user of MoMA runs today."""
