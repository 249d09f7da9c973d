"""Split learning with loss-based asynchronous exchange and 8-bit floating-point transfers."""
