"""A training run: its data, its recipe, its loop, and an honest perplexity."""
