"""What a run writes: costs, history, checkpoints, its folder."""
