"""Two implementations on the same weights: whether they compute the same, and the first place where not."""
