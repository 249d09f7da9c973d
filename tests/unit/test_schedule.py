"""Golden sequences of states, worked out by hand from the rules in docs/schedules.md."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlayer import Always, ConfigError, DivergedError, Drift, Drop, Once, Periodic, Plateau, Schedule
from cutlayer.schedule import SCHEDULES, Exchange, State, make_schedule


def states(schedule: Schedule, losses: list[float]) -> str:
    """The exchange of the first epoch and of the one after each loss."""
    state = schedule.start()
    out = state.exchange.value
    for loss in losses:
        state = schedule.next(state, loss)
        out += state.exchange.value
    return out


LOSSES = [2.0, 1.5, 1.2, 1.15, 1.12, 1.0, 0.99, 1.2, 1.19]


def test_always() -> None:
    assert states(Always(), LOSSES) == "A" * 10


def test_drift() -> None:
    # Differences from the reference, which moves only when A is chosen:
    # 2.0: none yet -> A (ref 2.0). 1.5: 0.5 -> A (1.5). 1.2: 0.3 -> A (1.2). 1.15: 0.05 -> B. 1.12: 0.08 -> C.
    # 1.0: 0.2 -> A (1.0). 0.99: 0.01 -> B. 1.2: 0.2 upwards -> A (1.2). 1.19: 0.01 -> B.
    assert states(Drift(threshold=0.1), LOSSES) == "AAAABCABAB"


def test_drift_adds_up_over_epochs_in_which_nothing_is_exchanged() -> None:
    # 2.0 -> A (ref 2.0). 1.95: 0.05 -> B. 1.91: 0.09 -> C. 1.87: 0.13 from the last A, though only 0.04 from the epoch
    # before -> A (1.87). 1.93: 0.06 -> B. 1.98: 0.11 upwards -> A (1.98). 1.93 -> B. 1.97: 0.01 -> C.
    assert states(Drift(threshold=0.1), [2.0, 1.95, 1.91, 1.87, 1.93, 1.98, 1.93, 1.97]) == "AABCABABC"


def test_drop() -> None:
    # Falls from the epoch before, whatever its state: infinite -> A, 0.5 -> A, 0.3 -> A, 0.05 -> B, 0.03 -> C,
    # 0.12 -> A, 0.01 -> B, a rise counts as 0 -> C, 0.01 -> C.
    assert states(Drop(threshold=0.1), LOSSES) == "AAAABCABCC"


def test_plateau() -> None:
    # After A always B. After B and C the fall decides: 2.0 -> B; 0.5 -> C; 0.3 -> C; 0.05 -> A; -> B; 0.12 -> C;
    # 0.01 -> A; -> B; 0.01 -> A.
    assert states(Plateau(threshold=0.1), LOSSES) == "ABCCABCABA"


def test_periodic() -> None:
    assert states(Periodic(period=4), LOSSES) == "ABCCABCCAB"
    assert states(Periodic(period=1), LOSSES) == "A" * 10
    assert states(Periodic(period=2), LOSSES) == "ABABABABAB"


def test_once() -> None:
    assert states(Once(), LOSSES) == "ABCCCCCCCC"
    assert states(Once(warmup=3), LOSSES) == "AAABCCCCCC"


def test_warmup() -> None:
    # Warm-up epochs are A; the rules see their losses all the same, and a warm-up A is a choice of A for `drift`.
    assert states(Drop(threshold=10.0, warmup=4), LOSSES) == "AAAABCCCCC"
    # References: 2.0, 1.5, 1.2, 1.15 in warm-up; 1.12: 0.03 -> B; 1.0: 0.15 -> A; 0.99 -> B; 1.2: 0.2 -> A; -> B.
    assert states(Drift(threshold=0.1, warmup=5), LOSSES) == "AAAAABABAB"
    assert states(Plateau(threshold=0.1, warmup=3), LOSSES) == "AAABABCABA"
    assert states(Periodic(period=4, warmup=3), LOSSES) == "AAABCCABCC"


def test_a_change_of_exactly_the_threshold_counts() -> None:
    assert states(Drift(threshold=0.5), [2.0, 1.5]) == "AAA"
    assert states(Drop(threshold=0.5), [2.0, 1.5]) == "AAA"
    assert states(Plateau(threshold=0.5), [2.0, 1.5]) == "ABC"


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused(loss: float) -> None:
    with pytest.raises(DivergedError, match="epoch 0"):
        Drop().next(State(), loss)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Drop(threshold=-1), "threshold must be a number of at least 0, got -1"),
        (lambda: Drop(threshold=math.nan), "threshold must be a number of at least 0, got nan"),
        (lambda: Drift(warmup=0), "warmup must be at least 1"),
        (lambda: Periodic(period=0), "period must be at least 1"),
        (
            lambda: make_schedule("weekly"),
            "unknown schedule 'weekly'; known: always, drift, drop, plateau, periodic, once",
        ),
    ],
)
def test_wrong_values_are_refused(wrong, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrong()


@given(st.sampled_from(sorted(SCHEDULES)), st.lists(st.floats(0, 10), max_size=30), st.integers(1, 5))
def test_every_schedule_starts_with_a_and_keeps_activations_before_it_replays(name, losses, warmup) -> None:
    sequence = states(make_schedule(name, warmup=warmup), losses)
    assert sequence.startswith("A" * min(warmup, len(sequence)))
    assert "AC" not in sequence


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20), st.integers(0, 19))
def test_a_state_can_be_stored_and_taken_up_again(losses, cut) -> None:
    schedule = Drift(threshold=0.1)
    state = schedule.start()
    for number, loss in enumerate(losses):
        if number == cut:
            stored = {k: v if k != "exchange" else v.value for k, v in vars(state).items()}
            state = State(Exchange(stored["exchange"]), stored["epoch"], stored["reference"])
        state = schedule.next(state, loss)
    assert state.exchange == states(schedule, losses)[-1]
