"""The wire: frames, and the backends that move them."""
