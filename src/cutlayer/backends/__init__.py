"""Where the clients of a run are, and how frames reach them."""
