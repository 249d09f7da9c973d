"""What client and server do with a batch, a step and an epoch."""
