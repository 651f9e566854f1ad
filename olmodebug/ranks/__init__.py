"""One training step on many processes against the same step in one."""
