"""The wire: messages, and the frames that they cross in. What moves frames is in `backends`."""
