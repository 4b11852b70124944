"""What a denoising process is: schedulers, samplers and the networks that denoise. Nothing here knows Stable-Baselines3."""
