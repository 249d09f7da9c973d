"""Golden sequences of states, worked out by hand from the rules in docs/schedules.md."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlayer import (
    Always,
    Budget,
    ConfigError,
    DivergedError,
    Drift,
    Drop,
    Fixed,
    Once,
    Periodic,
    Plateau,
    Schedule,
    Settle,
)
from cutlayer.schedule import SCHEDULES, Cost, Exchange, Outlook, State, make_schedule


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
            "unknown schedule 'weekly'; known: always, drift, drop, plateau, periodic, once, fixed",
        ),
    ],
)
def test_wrong_values_are_refused(wrong, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrong()


@given(st.sampled_from(sorted({*SCHEDULES} - {"fixed"})), st.lists(st.floats(0, 10), max_size=30), st.integers(1, 5))
def test_every_schedule_starts_with_a_and_keeps_activations_before_it_replays(name, losses, warmup) -> None:
    schedule = make_schedule(name, warmup=warmup, both=2, activations=3, megabytes=9)
    outlook = Outlook(max(8, len(losses) + 1), most=(Cost(2_000_000), Cost(1_000_000)))
    sequence = states(schedule.for_run(outlook), losses)
    assert sequence.startswith("A" * min(warmup, len(sequence)))
    assert "AC" not in sequence


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20), st.integers(0, 19), st.sampled_from(["drift", "budget"]))
def test_a_state_can_be_stored_and_taken_up_again(losses, cut, name) -> None:
    outlook = Outlook(21, most=(Cost(200, 2), Cost(100, 1)))
    schedule = make_schedule(name, threshold=0.1, megabytes=0.001).for_run(outlook)
    state = again = schedule.start()
    for number, loss in enumerate(losses):
        if number == cut:
            again = State.from_dict({**json.loads(json.dumps(again.as_dict())), "something": "else"})
        state, again = (schedule.next(each, loss, Cost(50 + number, 1)) for each in (state, again))
    assert again == state


def test_a_state_of_an_older_checkpoint() -> None:
    assert State.from_dict({"exchange": "B", "epoch": 3, "reference": 0.5}) == State(Exchange.ACTIVATIONS, 3, 0.5)


def test_fixed() -> None:
    assert states(Fixed(exchanges="AABCBC"), LOSSES) == "AABCBCCCCC"
    with pytest.raises(ConfigError, match="of which the first is A, got 'BAC'"):
        Fixed(exchanges="BAC")


@pytest.mark.parametrize(
    ("settle", "rates", "expected"),
    [
        # B at once, the last at 0.8 x 20 = 16, the others between them.
        (Settle(both=4, activations=4), (), "AAAABCCCBCCCBCCCBCCC"),
        (Settle(both=2, activations=1), (), "AABCCCCCCCCCCCCCCCCC"),
        (Settle(both=1, warmup=3, activations=2, last=0.5), (), "AAABCCCCCCBCCCCCCCCC"),
        # More than there is room for before the last one: one after the other.
        (Settle(both=2, activations=4, last=0.1), (), "AABBBBCCCCCCCCCCCCCC"),
        (Settle(both=16, activations=4, last=1), (), "AAAAAAAAAAAAAAAABBBB"),
        # The rate falls to a fifth after 10 epochs: of 6 + 6/5 = 7.2 the B epochs are at 0, 2.4, 4.8 and 7.2.
        (Settle(both=4, activations=4, spread="rate"), (1.0,) * 10 + (0.2,) * 10, "AAAABCBCCBCCCCCCBCCC"),
        (Settle(both=4, activations=4, spread="rate"), (1.0,) * 20, "AAAABCCCBCCCBCCCBCCC"),
    ],
)
def test_settle(settle: Settle, rates: tuple[float, ...], expected: str) -> None:
    assert states(settle.for_run(Outlook(20, rates)), [1.0] * 19) == expected


def test_the_clients_rate_falls_over_the_epochs_that_settle() -> None:
    schedule = Settle(both=2, activations=1).for_run(Outlook(4))
    state, falls = schedule.start(), []
    for _ in range(4):
        falls.append(state.settling)
        state = schedule.next(state, 1.0)
    assert falls == [(0, 0.5), (0.5, 1), None, None]


@given(
    epochs=st.integers(2, 60),
    both=st.integers(1, 10**6),
    activations=st.integers(1, 10**6),
    saves=st.floats(0.1, 1),
    times=st.floats(1.001, 80),
    share=st.floats(0.05, 1),
    last=st.floats(0.1, 1),
    losses=st.lists(st.floats(0, 3), min_size=60, max_size=60),
)
def test_a_budget_is_kept_and_mostly_used(epochs, both, activations, saves, times, share, last, losses) -> None:
    """Whatever the loss does, and whatever a lossless stage makes of the bytes."""
    most = Cost(both + activations, 3), Cost(activations, 1)
    budget = times * (most[0].bytes + most[1].bytes)
    schedule = Budget(megabytes=budget / 1e6, share=share, last=last).for_run(Outlook(epochs, (), most))
    state, spent, exchanged = schedule.start(), 0, ""
    settled: list[tuple[float, float]] = []
    for epoch in range(epochs):
        place = "ABC".index(state.exchange)
        cost = Cost(round(most[place].bytes * saves) if place < 2 else 0, 1)
        spent, exchanged = spent + cost.bytes, exchanged + state.exchange
        if state.settling is not None:
            settled.append(state.settling)
        state = schedule.next(state, losses[epoch], cost)
    assert spent <= budget * (1 + 1e-9)
    assert exchanged.lstrip("A").count("A") == 0
    # What is left pays for no more than two epochs, or there is no epoch to spend it in.
    room = "C" in exchanged[: round(last * epochs)]
    assert not room or budget - spent <= 2 * most[0].bytes or spent >= 0.6 * budget, exchanged
    # The client's rate falls to zero without a leap, as far as the budget's A epochs go.
    assert [start for start, _ in settled] == [0.0, *(end for _, end in settled[:-1])]
    assert len(settled) == len(exchanged) - len(exchanged.lstrip("A"))


def test_a_budget_lets_the_loss_decide_when() -> None:
    outlook = Outlook(41, (), (Cost(200), Cost(100)))
    schedule = Budget(megabytes=0.001, threshold=0.1).for_run(outlook)
    costs = {"A": Cost(200), "B": Cost(100), "C": Cost()}

    def run(losses: list[float]) -> str:
        state = schedule.start()
        out = state.exchange.value
        for loss in losses:
            state = schedule.next(state, loss, costs[state.exchange])
            out += state.exchange
        return out

    falling = run([9 - 0.2 * epoch for epoch in range(40)])
    stalled = run([9.0] * 40)
    for exchanges in (falling, stalled):  # 2 x 200 of 500 for A, 6 x 100 for B
        assert exchanges[:3] == "AAB"
        assert (exchanges.count("A"), exchanges.count("B")) == (2, 6)
    assert falling.rindex("B") == 33  # 0.8 of 41
    assert stalled.rindex("B") < 33
    assert falling.index("B", 3) == 9  # from 2 to 33 in five
    assert stalled.index("B", 3) == 6  # half of that


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Budget(), "expected megabytes, client_gflops or both, above 0, got None and None"),
        (lambda: Budget(megabytes=0), "above 0, got 0 and None"),
        (lambda: Budget(megabytes=1, share=0), "the fraction of the budget that is for A epochs"),
        (lambda: Budget(megabytes=1, last=1.5), "the fraction of the run at which the last B epoch is"),
        (lambda: Settle(activations=0), "activations must be a whole number of at least 1, got 0"),
        (lambda: Settle(spread="dense"), "unknown spread 'dense'"),
        (
            lambda: Settle(both=3, activations=3).for_run(Outlook(5)),
            "expected at most the run's 5 epochs to exchange, got 3 A and 3 B",
        ),
        (
            lambda: Budget(megabytes=2, client_gflops=1).for_run(
                Outlook(9, most=(Cost(2_000_000, 5), Cost(1_000_000, 3)))
            ),
            "2 MB and 1 GFLOP do not pay for the first epochs, an A and a B, which take up to 3 MB and 8e-09 GFLOP",
        ),
        (lambda: Settle().next(State(), 1.0), "ask for_run"),
    ],
)
def test_wrong_budgets_are_refused(wrong, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrong()
