"""Pictures of runs: learning curves, what an update did, and what a denoising chain does."""
