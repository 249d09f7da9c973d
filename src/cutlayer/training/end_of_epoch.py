"""What clients are asked for at the end of an epoch: statistics of batch norm, and their test activations."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from cutlayer.errors import ClientUnavailableError, RefusedError
from cutlayer.schedule import Exchange
from cutlayer.training.peers import Peer, check_done, send
from cutlayer.training.server import Server
from cutlayer.wire.frames import Frame, packed, read
from cutlayer.wire.messages import Calibrate, Done, Evaluate, EvaluationRequest, Weights


def testers(server: Server, trained: Sequence[Exchange], due: bool) -> list[int]:
    """Which clients are to send their test activations at the end of an epoch.

    Those that have test data and did not rest, if an evaluation is due or they rest from now on: a client that rests is
    evaluated on what it sent before, and does nothing.

    Args:
        trained: what the epoch exchanged with each client.
        due: whether it ends in an evaluation.
    """
    return [
        client
        for client, info in enumerate(server.clients)
        if info.test_samples
        and trained[client] is not Exchange.NONE
        and (due or server.states.of(client) is Exchange.NONE)
    ]


def measure(server: Server, peers: Sequence[Peer], epoch: int) -> None:
    """After an A epoch, have clients measure the statistics of the half that was averaged, and pool them.

    Those that A left are averages over steps in which the weights moved, and over weights that were averaged since.
    """
    asked: list[Peer] = []
    for peer in peers:
        message = Calibrate(peer.number, epoch, share=True, evaluation=True)
        shared = server.shared.frame(Weights(peer.number, epoch, evaluation=True))
        with suppress(ClientUnavailableError):
            for frame in (shared, packed(Frame(message))):
                send(server.ledger, peer, frame)
            asked.append(peer)
    for peer in asked:
        with suppress(ClientUnavailableError):
            _take_measured(server, peer, Weights(peer.number, epoch, statistics=True, evaluation=True))
    server.shared.pool_statistics()


def _take_measured(server: Server, peer: Peer, expected: Weights) -> None:
    """A client's statistics, once, and its word that it is done."""
    came = False
    while True:
        try:
            received = read(peer.receive())
            if came or not isinstance(received.message, Weights):
                check_done(server, received, Done(peer.number, expected.epoch, 0, {}, evaluation=True))
                return
            server.take_statistics(received, expected)
            came = True
        except RefusedError as error:
            peer.refuse(error)


def evaluate(server: Server, peer: Peer, epoch: int) -> None:
    """Have a client send its test activations, with the shared half if there is one. Raises ClientUnavailableError."""
    shared = server.shared.frames(Weights(peer.number, epoch, evaluation=True))
    for frame in (*shared, packed(Frame(EvaluationRequest(peer.number, epoch)))):
        send(server.ledger, peer, frame)
    steps, left = 0, 2 * server.clients[peer.number].test_samples
    while True:
        data = peer.receive()
        try:
            received = read(data)
            if not isinstance(received.message, Evaluate):
                check_done(server, received, Done(peer.number, epoch, steps, {}, evaluation=True))
                return
            left -= server.evaluation.add(received, Evaluate(peer.number, epoch, steps), left)
            server.ledger.frame("up", received)
            steps += 1
        except RefusedError as error:
            peer.refuse(error)
