"""Server and clients as processes of their own: `serve` and `join`."""

from cutlayer.remote.joining import join
from cutlayer.remote.serving import Served, serve
from cutlayer.remote.signals import Stop
from cutlayer.wire.certs import make_certificates

__all__ = ["Served", "Stop", "join", "make_certificates", "serve"]
