"""A run from its beginning to its end: in one process or a cluster (`fit`), and between machines (`serve`, `join`)."""
