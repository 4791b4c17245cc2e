"""What a caller gives: photos and masks, prompts, and the noise that seeds stand for."""
