"""Data sets, augmentation, batches, and the division of a data set among clients."""
