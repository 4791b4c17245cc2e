"""Timestep schedules and solvers, as tables of coefficients that the denoiser network reads."""
