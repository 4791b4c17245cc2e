"""A caller's inputs: photos and masks, prompts, and the noise that a seed generates."""
