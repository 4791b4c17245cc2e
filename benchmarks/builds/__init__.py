"""Export and engine builds at full size: time and peak memory."""
