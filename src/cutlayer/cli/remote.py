"""The commands between machines, which need the extra `grpc`."""

from __future__ import annotations

from cutlayer.cli.answer import answer
from cutlayer.cli.certs import certs
from cutlayer.cli.joining import join_command
from cutlayer.cli.serving import health, serve_command

COMMANDS = {"certs": certs, "answer": answer, "serve": serve_command, "join": join_command, "health": health}
