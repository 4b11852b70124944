"""Envs of other projects, as Gymnasium's and Stable-Baselines3's."""
