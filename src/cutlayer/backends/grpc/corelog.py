"""What gRPC's core writes to the terminal by itself.

Who is refused in a TLS handshake is known to the core alone, which logs it at level INFO. At that level it also warns
of the level, once, when it starts.
"""

from __future__ import annotations

import os
import tempfile

import grpc

WARNING = b"Log level INFO is not suitable for production"


def log_refusals() -> None:
    """Have the core log who is refused in a TLS handshake, unless the environment has chosen a level.

    To be called before anything else starts the core.
    """
    if "GRPC_VERBOSITY" in os.environ:
        return
    os.environ["GRPC_VERBOSITY"] = "INFO"
    # The core writes to the file itself, so the file is another one while it starts.
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            grpc.insecure_channel("127.0.0.1:1").close()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        said.seek(0)
        for line in said:
            if WARNING not in line:
                os.write(2, line)
