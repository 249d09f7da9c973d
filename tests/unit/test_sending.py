"""The thread that encodes and sends: in order, a bounded number ahead, and no failure is lost."""

import threading

import pytest

from cutlayer.backends.grpc.sending import Sender
from cutlayer.errors import DivergedError


def test_frames_are_sent_in_order_and_put_waits_when_it_is_too_far_ahead() -> None:
    sent: list[bytes] = []
    gate = threading.Event()

    def send(frame: bytes) -> None:
        assert gate.wait(10)
        sent.append(frame)

    with Sender(send, ahead=2) as sender:
        for number in range(3):
            sender.put(lambda number=number: bytes([number]))
        fourth = threading.Thread(target=sender.put, args=(lambda: b"\x03",))
        fourth.start()
        fourth.join(0.1)
        assert fourth.is_alive()
        gate.set()
        fourth.join(10)
        sender.drain()
    assert sent == [b"\x00", b"\x01", b"\x02", b"\x03"]


@pytest.mark.parametrize("then", ["put", "drain"])
def test_what_goes_wrong_comes_out(then: str) -> None:
    def fail() -> bytes:
        raise DivergedError("not finite")

    with Sender(lambda frame: None, ahead=0) as sender:
        sender.put(fail)
        with pytest.raises(DivergedError):
            sender.put(lambda: b"") if then == "put" else sender.drain()
