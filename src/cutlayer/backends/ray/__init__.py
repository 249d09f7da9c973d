"""Clients, and workers of the server, on a Ray cluster. For one trust domain: Ray pickles. See docs/ray.md."""

from cutlayer.backends.ray.backend import Ray

__all__ = ["Ray"]
