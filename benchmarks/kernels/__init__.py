"""The two fused attention kernels on a GPU: checked, timed and tuned."""
