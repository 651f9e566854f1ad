"""What a model did, op by op and module by module, and what the numbers and shapes of that say."""
