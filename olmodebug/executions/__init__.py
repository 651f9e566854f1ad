"""One subject under two executions, op by op, against what the arithmetic of each could do."""
