"""The command `cutlayer-device`: a client without PyTorch."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

import numpy as np

from cutlayer.backends.grpc.calls import leave
from cutlayer.backends.grpc.rpc import Endpoint
from cutlayer.device.ask import ask
from cutlayer.device.half import Data, DeviceHalf
from cutlayer.device.join import join
from cutlayer.errors import ConfigError, CutlayerError, harmless


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 for a run that failed, 2 for a wrong call."""
    chosen = _parser().parse_args(arguments)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    logging.basicConfig(level=os.environ.get("CUTLAYER_LOG", "WARNING"), format="%(asctime)s %(name)s: %(message)s")
    try:
        {"join": _join, "leave": _leave, "predict": _predict}[chosen.command](chosen)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    except (CutlayerError, OSError) as error:
        print(f"error: {harmless(error, 2000)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cutlayer-device", description="A client without PyTorch: ONNX and NumPy.")
    commands = parser.add_subparsers(dest="command", required=True)
    joining = commands.add_parser("join", help="take part in the B epochs of a run that is served with --frozen")
    leaving = commands.add_parser("leave", help="leave a run for good, with --tls alone: nobody waits for it any more")
    asking = commands.add_parser("predict", help="send activations to `cutlayer answer`, and get outputs")
    for each in (joining, leaving, asking):
        each.add_argument("address", help="HOST:PORT of the server")
        each.add_argument("--tls", help="this device's folder of certificates")
        each.add_argument("--insecure-plaintext", action="store_true", help="allow other machines without TLS")
    joining.add_argument("--name", default="client", help="this device's name, without TLS")
    for each in (joining, leaving):
        each.add_argument("--give-up-after", type=float, help="seconds without a server after which to end")
    for each in (joining, asking):
        each.add_argument("--half", required=True, help="folder of `cutlayer export`")
        each.add_argument("--data", required=True, help=".npz file with inputs and labels")
        each.add_argument("--threads", type=int, default=0, help="of onnxruntime; by default all cores")
    joining.add_argument("--test", help=".npz file to evaluate with")
    joining.add_argument("--run-dir", default="runs/device", help="remembers how far it is (%(default)s)")
    asking.add_argument("--codec", help="of the activations; by default that of the export")
    asking.add_argument("--output", help=".npy file for the outputs")
    return parser


def _server(chosen: argparse.Namespace) -> Endpoint:
    return Endpoint(chosen.address, chosen.tls, chosen.insecure_plaintext)


def _join(chosen: argparse.Namespace) -> None:
    half = DeviceHalf(chosen.half, chosen.threads)
    test = Data.load(chosen.test) if chosen.test is not None else None
    join(
        _server(chosen),
        half,
        Data.load(chosen.data),
        test,
        folder=chosen.run_dir,
        name=chosen.name,
        give_up_after=chosen.give_up_after,
        on_epoch=lambda epoch: print(f"epoch {epoch + 1}: B", flush=True),
    )
    print("finished")


def _leave(chosen: argparse.Namespace) -> None:
    leave(_server(chosen), give_up_after=chosen.give_up_after)
    print("left the run for good")


def _predict(chosen: argparse.Namespace) -> None:
    data = Data.load(chosen.data, labelled=False)
    outputs = ask(_server(chosen), DeviceHalf(chosen.half, chosen.threads), data, codec=chosen.codec)
    if chosen.output is not None:
        np.save(chosen.output, outputs)
        print(f"wrote {chosen.output}")
    classes = outputs.argmax(1)
    if data.labels is not None:
        print(f"accuracy of {len(data)}: {float((classes == data.labels).mean()):.4f}")
    elif chosen.output is None:
        print(" ".join(map(str, classes)))


if __name__ == "__main__":
    sys.exit(main())
