"""The clients of an epoch as the server deals with them: live ones, and replayed ones in place of the absent."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from cutlayer.errors import ClientUnavailableError, RefusedError
from cutlayer.schedule import Exchange
from cutlayer.strategies.party import Participant, StepBatch
from cutlayer.training.server import Server
from cutlayer.wire.frames import Frame, Received, pack, read
from cutlayer.wire.messages import Calibrate, Done, Evaluate, EvaluationRequest, Step, Weights


class Peer(Protocol):
    """A connection to one client, wherever it is."""

    number: int

    def send(self, frame: bytes) -> None:
        """Send a frame. Raises ClientUnavailableError."""
        ...

    def receive(self) -> bytes:
        """The client's next frame. Raises ClientUnavailableError."""
        ...

    def refuse(self, error: RefusedError) -> None:
        """Deal with a frame that was refused; if this returns, the next frame is read."""
        ...


class ReplayedParticipant(Participant):
    """What is stored of a client, in its place."""

    def __init__(self, server: Server, client: int) -> None:
        self.finished = False
        self._batches = server.learner.stored(client)

    def begin(self) -> None:
        """Nothing to do."""

    def next_batch(self) -> StepBatch | None:
        """A batch of its samples, freshly shuffled."""
        batch = next(self._batches, None)
        self.finished = batch is None
        return batch

    def answer(self, reply: bytes | None) -> None:
        """Nothing to do."""

    def refuse(self, error: RefusedError) -> None:
        """What is stored was checked when it came."""
        raise error

    def collect_weights(self) -> None:
        """It has none."""

    def deliver_weights(self) -> None:
        """It takes none."""


class LiveParticipant(Participant):
    """A client that is connected.

    Attributes:
        lost: whether it was lost before its end.
    """

    def __init__(self, server: Server, peer: Peer) -> None:
        self.server, self.client, self.peer = server, peer.number, peer
        self.finished = self.lost = False
        self._steps = self._samples = 0
        # A sampler may make some epochs longer than the first; a client that never ends holds up the others.
        info = server.clients[peer.number]
        self._left = 2 * max(info.samples, info.epoch_samples)
        self._over = False  # its last weights have come
        self._taken: tuple[Received, StepBatch] | None = None
        self._trains = server.states.of(peer.number) is Exchange.BOTH
        self._pools = False

    def calibrate(self) -> None:
        """In a B epoch, send the newest shared half, if there is one, and have its statistics measured."""
        if self._trains:
            return
        epoch, shared = self.server.states.epoch, self.server.shared.frames
        frames = shared(Weights(self.client, epoch))
        self._pools = bool(frames)
        for frame in (*frames, pack(Frame(Calibrate(self.client, epoch, share=self._pools)))):
            self._send(frame)

    def take_statistics(self) -> bool:
        """Take the statistics that the client measured, if it is to share them; whether it measured any."""
        while self._pools and not self.finished and (data := self._receive()) is not None:
            try:
                received = read(data)
                frame, expected = received.unpack(), Weights(self.client, self.server.states.epoch, statistics=True)
                if frame.message != expected:
                    raise RefusedError(f"client {self.client}: expected {expected}, got {frame.message}")
                samples = self.server.clients[self.client].samples
                self.server.shared.add_statistics(self.client, frame.tensors, samples)
                self.server.ledger.frame("up", received)
                return True
            except RefusedError as error:
                self.refuse(error)
        return not (self._trains or self._pools or self.lost)

    def begin(self) -> None:
        """Send the newest shared half, if there is one, or what is new in it, and the plan."""
        for frame in (*self.server.beginning(self.client, self._pools), self.server.plan(self.client)):
            self._send(frame)

    def next_batch(self) -> StepBatch | None:
        """Its next batch of a step, or microbatch of one."""
        while not self.finished and (data := self._receive()) is not None:
            try:
                received = read(data)
                if isinstance(received.message, Step):
                    return self._take(received)
                if not self._end(received):
                    raise RefusedError(f"client {self.client}: expected a step, or its weights at its end")
            except RefusedError as error:
                self.refuse(error)
        return None

    def answer(self, reply: bytes | None) -> None:
        """Count the batch, and send the gradients."""
        assert self._taken is not None
        received, batch = self._taken
        self.server.ledger.frame("up", received)
        self._steps += batch.ends_step
        self._samples += len(batch)
        self._left -= len(batch)
        if reply is not None:
            self._send(reply)

    def refuse(self, error: RefusedError) -> None:
        """Tell it that what it sent is refused; it may send another."""
        try:
            self.peer.refuse(error)
        except ClientUnavailableError:
            self._lose()

    def collect_weights(self) -> None:
        """Take its weights, which it sends of its own accord, and if they are its last its word that it is done."""
        while self._trains and not self.finished and (data := self._receive()) is not None:
            try:
                if not self._end(read(data)):
                    return
            except RefusedError as error:
                self.refuse(error)

    def deliver_weights(self) -> None:
        """Send it the new average."""
        if self._trains:
            self._send(self.server.shared.frame(Weights(self.client, self.server.states.epoch, self._steps)))

    def _take(self, received: Received) -> StepBatch:
        batch = self.server.take(received, self.client)
        if self._over or len(batch) > self._left:
            raise RefusedError(f"client {self.client}: expected the end of its epoch, got another step")
        self._taken = received, batch
        return batch

    def _end(self, received: Received) -> bool:
        """Its weights, or its word that it is done; whether its epoch is at its end."""
        frame = received.unpack()
        epoch, message = self.server.states.epoch, frame.message
        if not isinstance(message, Weights):
            check_done(self.server, received, Done(self.client, epoch, self._steps, {}))
            self.finished = True
            return True
        expected = Weights(self.client, epoch, self._steps, message.last)
        if not self._trains or self.server.share is None or self._over or not self._samples or message != expected:
            raise RefusedError(f"client {self.client}: expected {expected} in an A epoch, once, got {message}")
        self.server.shared.add(self.client, frame.tensors, self._samples)
        self.server.ledger.frame("up", received)
        self._samples, self._over = 0, message.last
        return message.last

    def _send(self, frame: bytes) -> None:
        try:
            if not self.lost:
                self.peer.send(frame)
                self.server.ledger.frame("down", read(frame))
        except ClientUnavailableError:
            self._lose()

    def _receive(self) -> bytes | None:
        try:
            return self.peer.receive()
        except ClientUnavailableError:
            self._lose()
            return None

    def _lose(self) -> None:
        self.lost = self.finished = True
        self.server.absent.add(self.client)


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


def calibrate(server: Server, participants: Sequence[Participant]) -> None:
    """Have the clients of a B epoch measure the statistics of batch norm anew, all at the same time, and pool them."""
    clients = [each for each in participants if isinstance(each, LiveParticipant)]
    for client in clients:
        client.calibrate()
    measured = [client.take_statistics() for client in clients]
    server.pool_statistics(any(measured))


def measure(server: Server, peers: Sequence[Peer], epoch: int) -> None:
    """After an A epoch, have clients measure the statistics of the half that was averaged, and pool them.

    Those that A left are averages over steps in which the weights moved, and over weights that were averaged since.
    """
    asked: list[Peer] = []
    for peer in peers:
        message = Calibrate(peer.number, epoch, share=True, evaluation=True)
        shared = server.shared.frame(Weights(peer.number, epoch, evaluation=True))
        with suppress(ClientUnavailableError):
            for frame in (shared, pack(Frame(message))):
                peer.send(frame)
                server.ledger.frame("down", read(frame))
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
                check_done(server, received, Done(peer.number, expected.epoch, 0, {}))
                return
            if received.message != expected:
                raise RefusedError(f"client {peer.number}: expected {expected}, got {received.message}")
            samples = server.clients[peer.number].samples
            server.shared.add_statistics(peer.number, received.unpack().tensors, samples)
            server.ledger.frame("up", received)
            came = True
        except RefusedError as error:
            peer.refuse(error)


def evaluate(server: Server, peer: Peer, epoch: int) -> None:
    """Have a client send its test activations, with the shared half if there is one. Raises ClientUnavailableError."""
    shared = server.shared.frames(Weights(peer.number, epoch, evaluation=True))
    for frame in (*shared, pack(Frame(EvaluationRequest(peer.number, epoch)))):
        peer.send(frame)
        server.ledger.frame("down", read(frame))
    steps, left = 0, 2 * server.clients[peer.number].test_samples
    while True:
        data = peer.receive()
        try:
            received = read(data)
            frame = received.unpack()
            if not isinstance(frame.message, Evaluate):
                check_done(server, received, Done(peer.number, epoch, steps, {}))
                return
            left -= server.evaluation.add(frame, Evaluate(peer.number, epoch, steps), left)
            server.ledger.frame("up", received)
            steps += 1
        except RefusedError as error:
            peer.refuse(error)


def check_done(server: Server, received: Received, expected: Done) -> None:
    """Check a client's word that it is at its end, and count it and the FLOPs that it tells of."""
    message = received.message
    if not isinstance(message, Done) or (message.client, message.epoch, message.steps) != (
        expected.client,
        expected.epoch,
        expected.steps,
    ):
        raise RefusedError(
            f"expected client {expected.client} to be done after {expected.steps} steps of epoch {expected.epoch}, "
            f"got {message}"
        )
    known = {"forward", "backward", "evaluation"}
    if not set(message.flops) <= known or any(not 0 <= count < 1 << 62 for count in message.flops.values()):
        raise RefusedError(f"flops: expected counts of {sorted(known)}, got {message.flops}")
    server.ledger.frame("up", received)
    for what, count in message.flops.items():
        server.ledger.flops("client", what, count)
