"""What is remembered of each sample."""
