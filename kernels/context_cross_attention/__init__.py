"""`moma::ContextCrossAttention`: attention to text and to context tokens, with the subject tokens' saliency."""
