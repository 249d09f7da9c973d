"""Networks, the cut that makes two halves of one, FLOPs and optimizers."""
