"""How much memory a training step takes: predicted on fake tensors, confirmed on real ones."""
