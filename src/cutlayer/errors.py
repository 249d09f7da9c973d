"""The errors a user can meet, each saying what was expected, what came and what to do."""

import unicodedata
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any


class CutlayerError(Exception):
    """Base class of the errors raised on purpose by this package."""


class ConfigError(CutlayerError, ValueError):
    """A choice that cannot be carried out: an unknown name, or values that contradict each other."""


class DamagedError(ConfigError):
    """A file of a run that is not what was written there."""


class DiskError(CutlayerError, OSError):
    """A file that the disk does not take, because it is full or otherwise."""


class RefusedError(CutlayerError):
    """A message that does not fit the protocol or the epoch's plan; nothing of it was applied."""


class RefusedBatchError(RefusedError):
    """A batch of a step that the loss does not take: `batch`."""

    def __init__(self, message: str, batch: object = None) -> None:
        super().__init__(message)
        self.batch = batch


class DivergedError(CutlayerError):
    """Training produced a loss, activation or gradient that is not finite."""


class HijackedError(CutlayerError):
    """The server's gradients are not those of the task: a client stops, as its half may be turned against it."""


class StoreFullError(CutlayerError):
    """The replay store would grow past its byte budget."""


class ClientUnavailableError(CutlayerError):
    """A client is lost for the rest of the epoch; the others go on."""


class StateLostError(CutlayerError):
    """Something that held some of the run's state is unavailable; the run goes back to its last checkpoint."""


def require_kinds(owner: object, **expected: tuple[Any, str]) -> None:
    """Raise ConfigError if an attribute of `owner` is not of the kind (types, and their description) that it is to be.

    True and False are no numbers.
    """
    for name, (kinds, described) in expected.items():
        value = getattr(owner, name)
        truth = isinstance(value, bool) and kinds not in (bool, object)
        if truth or not isinstance(value, kinds):
            raise ConfigError(f"{name}: expected {described}, got {value!r}")


def harmless(text: object, most: int = 1000) -> str:
    """What a peer says, for logs and terminals: in one line, without control or direction characters, cut to `most`."""
    said = str(text)
    cut = said[:most] + (f" ({len(said) - most} characters more)" if len(said) > most else "")
    return "".join(c if unicodedata.category(c)[0] != "C" else ascii(c)[1:-1] for c in cut)


def unknown(what: str, name: object, known: Iterable[object]) -> str:
    """The message for an unknown name, with the names that are known, and those that may have been meant."""
    names = [str(each) for each in known]
    meant = nearest(name, names)
    return f"unknown {what} {name!r}; known: {', '.join(names)}" + (
        f"; did you mean {' or '.join(meant)}?" * bool(meant)
    )


def nearest(name: object, known: Iterable[object], most: int = 2) -> list[str]:
    """The known names that may have been meant: those that are alike, then those that begin with it."""
    names = [str(each) for each in known]
    alike = get_close_matches(str(name), names, n=most)
    return [*dict.fromkeys([*alike, *(each for each in names if name and each.startswith(str(name)))])][:most]


def some(values: Sequence[object], most: int = 5) -> str:
    """The first few of what is wrong, and how many more there are."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + more
