"""Before training: what each possible cut would cost in bytes, memory, FLOPs, time and energy, and which to choose."""
