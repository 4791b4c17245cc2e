"""What stays loaded: networks, device buffers and cached subjects, within their budgets."""
