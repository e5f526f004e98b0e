"""What a run's time is spent on: each kind counts once, hidden waits do not, and one warning says what to change."""

import threading
from concurrent.futures import Future

import pytest
import tensorflow as tf
import tiny

import timing
import train
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


def test_the_thread_and_the_loop_take_the_loss_from_tensors_of_their_own(monkeypatch, tmp_path, one_stage):
    """A tensor keeps the error of its last use, so on a GPU two threads that took one's value at once failed."""
    made, awaited, make_train_step = [], [], train.make_train_step

    def make_step(*arguments, **more):
        step = make_train_step(*arguments, **more)
        return lambda batch: made.append(step(batch)) or made[-1]

    monkeypatch.setattr(train, "make_train_step", make_step)
    monkeypatch.setattr(train.strategy_lib, "has_accelerator", lambda strategy: True)
    monkeypatch.setattr(timing, "_time_when_computed", lambda loss: awaited.append(loss) or 0.0)
    tiny.train_run(**tiny.SUPERVISED, model_dir=str(tmp_path), train_steps=3)
    assert len(awaited) == len(made) == 3
    assert not {id(loss) for loss in awaited} & {id(metrics["loss"]) for metrics in made}
    assert [float(loss) for loss in awaited] == [float(metrics["loss"]) for metrics in made]


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
    assert "--augment_on=device" in timing.advice(8, 224, has_files=True, in_memory=True, views_could_move=True)
    assert timing.advice(8, 16, has_files=False, in_memory=True) == "give it more processor cores than these 8"


def test_a_stretch_is_said_in_a_few_words():
    assert stretch(1, 30, 9).in_short() == "" and Stretch().in_short() == ""
    assert stretch(12, 88, 9).in_short() == "12% waiting for data"
    assert stretch(4, 96, 9).in_words() == "2 min: 96% steps, 4% waiting for data"


class Step:
    """The result of a step, which says when somebody waits for it."""

    def __init__(self, step, said):
        self._step, self._said = step, said

    def numpy(self):
        self._said.append(f"wait for {self._step}")


@pytest.fixture
def said(monkeypatch):
    """What the profiler was told, and what was done in between, in this order."""
    said = []
    profiler = tf.profiler.experimental
    monkeypatch.setattr(profiler, "start", lambda folder: said.append("start"))
    monkeypatch.setattr(profiler, "stop", lambda: said.append("stop"))
    return said


def take(profile, steps, said):
    for step in steps:
        with profile.of(step):
            said.append(step)
        profile.stepped(step, Step(step, said))


def test_exactly_the_steps_that_were_asked_for_are_in_the_profile(said):
    with timing.Profile(range(3, 5), "train") as profile:
        take(profile, range(1, 7), said)
    assert said == [1, 2, "wait for 2", "start", 3, 4, "wait for 4", "stop", 5, 6]


def test_another_worker_than_the_chief_writes_none_and_looks_after_the_same_steps(said):
    with timing.Profile(range(3, 5), "train") as chief, timing.Profile(range(3, 5), "train", writes=False) as other:
        take(other, range(1, 7), said)
    looks = [[step for step in range(7) if each.begins_or_ends_after(step)] for each in (chief, other)]
    assert said == [1, 2, 3, 4, 5, 6] and looks == [[2, 4], [2, 4]]


@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        (range(4, 7), ["start", 4, 5, "wait for 5", "stop", 6]),  # a run that goes on within them
        (range(2, 5), [2, "wait for 2", "start", 3, 4, "stop"]),  # one that ends within them
        (range(6, 8), [6, 7]),
    ],
)
def test_a_run_that_has_some_of_these_steps_profiles_those(said, taken, expected):
    with timing.Profile(range(3, 6), "train") as profile:
        take(profile, taken, said)
    assert said == expected


def test_a_run_that_fails_within_these_steps_ends_the_profile(said):
    with pytest.raises(ValueError, match="step"), timing.Profile(range(1, 9), "train") as profile:  # noqa: SIM117
        with profile.of(1):
            raise ValueError("step")
    assert said == ["start", "stop"]


def test_a_profile_lies_where_tensorboard_finds_it_and_no_events_hide_those_of_the_run(tmp_path):
    with timing.Profile(range(1, 2), str(tmp_path)) as profile:
        with profile.of(1):
            result = tf.constant(1.0) + 1.0
        profile.stepped(1, result)
    (made,) = tmp_path.iterdir()  # TensorBoard leaves a file of events when it finds a newer one.
    assert made.name == "plugins" and list(made.glob("profile/*/*.xplane.pb"))
