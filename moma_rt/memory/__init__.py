"""Memory budgets and caches: networks, generation buffers and subjects."""
