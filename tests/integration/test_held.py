"""Clients that the server holds before it lets them in, and what nobody may say without TLS."""

import socket
import threading
from contextlib import ExitStack

import grpc
import pytest

from cutlayer import ConfigError
from cutlayer.backends.grpc.calls import leave
from cutlayer.backends.grpc.limits import ClientLimits
from cutlayer.backends.grpc.rpc import SERVICE, Endpoint
from cutlayer.backends.grpc.session import Session, open_channel
from cutlayer.backends.grpc.slots import Busy, Slots
from cutlayer.wire.envelope import seal
from cutlayer.wire.messages import Hello, Leave
from tests.helpers.bad_server import BadServer, bad_server

HERE = "127.0.0.1"
HELLO = Hello("client")


class Holding(BadServer):
    """Lets a client in once it is told to."""

    def __init__(self) -> None:
        self.let_in = threading.Event()
        super().__init__()

    def _admit(self, hello: Hello, alive: object = None) -> tuple:
        assert self.let_in.wait(30)
        return super()._admit(hello, alive)


def test_the_time_in_which_a_client_is_held_is_not_without_a_server(caplog) -> None:
    server = Holding()
    session = Session(Endpoint(server.address), HELLO, 1 << 20)
    try:
        threading.Timer(2.5, server.let_in.set).start()
        assert session.welcomed(give_up_after=1.0).session == "session"
    finally:
        session.close()
        server.close()
    assert caplog.text.count(f"client waits to be let in by the server at {server.address}") == 1


def test_one_that_takes_connections_and_says_nothing_is_no_server(caplog) -> None:
    with socket.create_server((HERE, 0)) as silent:
        session = Session(Endpoint(f"{HERE}:{silent.getsockname()[1]}"), HELLO, 1 << 20)
        try:
            with pytest.raises(TimeoutError, match=r"no connection to .* in 1 s: \w+"):
                session.welcomed(give_up_after=1.0)
        finally:
            session.close()
    assert "waits to be let in" not in caplog.text


def test_newcomers_that_are_held_take_no_connection_of_a_member_without_tls() -> None:
    """Two members and eight newcomers, all of whom share an address, as far as the server knows."""
    limits = ClientLimits()
    slots = Slots(["alice", "bob"], limits, named=False, room=64)
    newcomers = [f"newcomer{number}" for number in range(8)]
    slots.add(newcomers)
    with ExitStack() as stack:
        for _ in newcomers:
            stack.enter_context(slots.slot(HERE))
        for _ in ("alice", "bob"):
            stack.enter_context(slots.slot(HERE))
        for _ in range(limits.strangers + 10 * limits.streams - 10):
            stack.enter_context(slots.slot(HERE))
        with pytest.raises(Busy, match="may have 24 connections"):  # all of them together are bounded as before
            stack.enter_context(slots.slot(HERE))


def test_without_tls_nobody_can_make_a_client_leave(capsys) -> None:
    with bad_server() as server:
        with open_channel(server.address, None) as channel:
            call = channel.unary_unary(f"/{SERVICE}/Leave")
            with pytest.raises(grpc.RpcError, match="leave: expected a certificate") as refused:
                call(seal(Leave("client")), timeout=10)
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        with pytest.raises(ConfigError, match="leave: expected this client's folder of certificates"):
            leave(server.address)
    assert capsys.readouterr().out == ""  # the server's `leave` prints whom it is called with
