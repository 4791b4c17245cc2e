"""Checks, times and tunes the two fused attention kernels on a GPU."""
