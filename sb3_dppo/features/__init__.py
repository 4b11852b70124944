"""Observations of envs, and what makes features of them."""
