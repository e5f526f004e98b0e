"""What a run's time is spent on: each kind counts once, hidden waits do not, and one warning says what to change."""

import threading
from concurrent.futures import Future

import pytest

import timing
from timing import Stretch


@pytest.fixture
def now(monkeypatch):
    """A clock that goes on only when it is told to: `now(seconds)`."""
    seconds = 100.0

    def go_on(more):
        nonlocal seconds
        seconds += more

    monkeypatch.setattr(timing.time, "monotonic", lambda: seconds)
    return go_on


def test_each_second_counts_once(now):
    clock = timing.Clock(step=5)
    now(1)
    with clock.spent("data"):
        now(2)
    with clock.spent("evaluation"):
        now(4)
        with clock.spent("checkpoint"):
            now(8)
        now(16)
    now(32)
    assert clock.so_far(8) == clock.lap(8)
    with clock.spent("summaries"):
        now(64)
    second = clock.lap(9)
    seconds = {"data": 2, "step": 33, "checkpoint": 8, "evaluation": 20, "summaries": 0}
    assert clock.whole == Stretch({**seconds, "summaries": 64}, 4)
    assert second == Stretch({**dict.fromkeys(timing.KINDS, 0), "summaries": 64}, 1)
    first = Stretch(seconds, 3)
    assert first.scalars() == pytest.approx(
        {"seconds_per_step": 11, **{kind: value / 63 for kind, value in seconds.items()}}
    )
    assert first.images_per_second(86) == 3 * 86 / 43


def test_a_block_that_fails_counts_too_and_ends(now):
    clock = timing.Clock(step=0)
    with pytest.raises(ValueError, match="read"), clock.spent("data"):
        now(2)
        raise ValueError("read")
    now(1)
    clock.back_to(0)
    now(4)
    assert clock.lap(1).seconds["data"] == 0
    assert clock.whole.seconds["data"] == 2 and clock.whole.seconds["step"] == 5


def ends_at(seconds):
    ended = Future()
    ended.set_result(seconds)
    return ended


def test_the_host_of_an_accelerator_waits_for_data_only_when_the_step_before_is_done(now, monkeypatch):
    clock = timing.Clock(step=0, ahead=True)
    monkeypatch.setattr(clock._waiter, "submit", lambda _, ended: ends_at(ended))
    for waited, step_ends in ((4, 107), (2, 109), (5, 200)):  # The waits end at 104, 106 and 111.
        with clock.spent("data"):
            now(waited)
        clock.stepped(step_ends)
    # Before the first there is no step. The second is hidden by it, and of the third the part after 109 is not.
    assert clock.lap(3).seconds == {**dict.fromkeys(timing.KINDS, 0), "data": 4 + 0 + 2, "step": 2 + 3}


def test_a_thread_waits_for_the_steps_and_a_step_that_fails_ends_too():
    computed = threading.Event()

    class Result:
        def numpy(self):
            computed.wait()
            raise ValueError("of the step")

    clock = timing.Clock(step=0, ahead=True)
    clock.stepped(Result())
    with clock.spent("data"):
        computed.set()
    stretch = clock.lap(1)
    assert set(stretch.seconds) == set(timing.KINDS) and min(stretch.seconds.values()) >= 0


def stretch(data, step, steps):
    return Stretch({"data": data, "step": step}, steps)


def test_waiting_for_data_is_said_once_with_what_to_change():
    warning = timing.DataWarning("do this")
    slow = stretch(5, 5, 10)
    said = [warning.after(slow) for _ in range(6)]  # The first is the start. The stretch is long after two more.
    assert said == ["", "", "training waits for data 50% of the time: do this", "", "", ""]


@pytest.mark.parametrize("each", [stretch(1, 9, 10), stretch(2, 3, 100), stretch(9, 1, 1)])
def test_nothing_is_said_of_a_short_wait_a_short_time_or_few_steps(each):
    warning = timing.DataWarning("do this")
    assert [warning.after(each) for _ in range(4)] == [""] * 4


def test_a_run_that_begins_to_wait_for_data_later_is_told_too():
    warning = timing.DataWarning("do this")
    said = [warning.after(each) for each in [stretch(0, 1000, 1000)] * 3 + [stretch(10, 10, 20)]]
    assert [bool(text) for text in said] == [False, False, False, True]


def test_the_advice_names_what_the_run_does_not_do_yet():
    assert "--cache_dataset" in timing.advice(8, 224, has_files=True, in_memory=False)
    cached = timing.advice(1, 224, has_files=True, in_memory=True)
    assert "--cache_dataset" not in cached and "--image_size=224" in cached and "more than one processor" in cached
    assert timing.advice(8, 16, has_files=False, in_memory=True) == "give it more processor cores than these 8"


def test_a_stretch_is_said_in_a_few_words():
    assert stretch(1, 30, 9).in_short() == "" and Stretch().in_short() == ""
    assert stretch(12, 88, 9).in_short() == "12% waiting for data"
    assert stretch(4, 96, 9).in_words() == "2 min: 96% steps, 4% waiting for data"
