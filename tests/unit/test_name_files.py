"""Files of names that are read again: what was in them last is what counts, however the signals come."""

import threading
from pathlib import Path

from cutlayer.backends.grpc.name_files import Revocations


def test_of_two_signals_at_once_the_newest_names_are_told_last(tmp_path: Path) -> None:
    file, told, goes_on, begun = tmp_path / "revoked.txt", [], threading.Event(), threading.Event()
    file.write_text("")
    revoked = Revocations(file)

    def slow(names: set[str]) -> None:
        if names == {"alice"}:
            begun.set()
            goes_on.wait(10)
        told.append(names)

    revoked.listen(slow)
    threads = []
    for names in ("alice\n", "alice\nbob\n"):
        file.write_text(names)
        threads.append(threading.Thread(target=revoked.reread, daemon=True))
        threads[-1].start()
        assert begun.wait(10)
    threads[-1].join(0.3)
    goes_on.set()
    for thread in threads:
        thread.join(10)
    assert told == [set(), {"alice"}, {"alice", "bob"}]
    assert revoked.names == {"alice", "bob"}
