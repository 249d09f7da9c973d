"""The clients of an epoch as the server deals with them: live ones, and replayed ones in place of the absent."""

from __future__ import annotations

from collections.abc import Sequence

from cutlayer.errors import ClientUnavailableError, RefusedError
from cutlayer.schedule import Exchange
from cutlayer.strategies.protocols import Participant, StepBatch
from cutlayer.training.peers import Peer, check_done, send
from cutlayer.training.server import Server
from cutlayer.wire.frames import Frame, PackedFrame, Received, packed, read
from cutlayer.wire.messages import Calibrate, Done, Step, Weights


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

    def answer(self, reply: PackedFrame | None) -> None:
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
        for frame in (*frames, packed(Frame(Calibrate(self.client, epoch, share=self._pools)))):
            self._send(frame)

    def take_statistics(self) -> bool:
        """Take the statistics that the client measured, if it is to share them; whether it measured any."""
        while self._pools and not self.finished and (data := self._receive()) is not None:
            try:
                expected = Weights(self.client, self.server.states.epoch, statistics=True)
                self.server.take_statistics(read(data), expected)
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

    def answer(self, reply: PackedFrame | None) -> None:
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
        epoch, message = self.server.states.epoch, received.message
        if not isinstance(message, Weights):
            if not self._steps:
                raise RefusedError(f"client {self.client}: expected at least one step of epoch {epoch}, got {message}")
            check_done(self.server, received, Done(self.client, epoch, self._steps, {}))
            self.finished = True
            return True
        expected = Weights(self.client, epoch, self._steps, message.last)
        if not self._trains or self.server.share is None or self._over or not self._samples or message != expected:
            raise RefusedError(f"client {self.client}: expected {expected} in an A epoch, once, got {message}")
        self.server.shared.add(self.client, received, self._samples)
        self.server.ledger.frame("up", received)
        self._samples, self._over = 0, message.last
        return message.last

    def _send(self, frame: PackedFrame) -> None:
        try:
            if not self.lost:
                send(self.server.ledger, self.peer, frame)
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


def calibrate_clients(server: Server, participants: Sequence[Participant]) -> None:
    """Have the clients of a B epoch measure the statistics of batch norm anew, all at the same time, and pool them."""
    clients = [each for each in participants if isinstance(each, LiveParticipant)]
    for client in clients:
        client.calibrate()
    measured = [client.take_statistics() for client in clients]
    server.pool_statistics(any(measured))
