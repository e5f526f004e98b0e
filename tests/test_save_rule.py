"""When a run saves: by steps and by the clock, and all workers at the same step."""

import pytest
import tensorflow as tf

import strategy as strategy_lib
from checkpoint import save_rule


@pytest.fixture
def clock(monkeypatch):
    """A clock of seconds that the tests set, as a list of one number."""
    now = [0.0]
    monkeypatch.setattr(save_rule.time, "monotonic", lambda: now[0])
    return now


def due_steps(rule, clock, steps, seconds_a_step=1.0):
    found = []
    for step in range(1, steps + 1):
        clock[0] += seconds_a_step
        if rule.due(step):
            found.append(step)
    return found


@pytest.mark.parametrize(
    ("every_steps", "minutes", "found"),
    [
        (4, 0.0, [4, 8, 10]),
        (100, 0.0, [10]),
        (100, 0.05, [3, 6, 9, 10]),  # every three seconds
        (4, 0.05, [3, 4, 7, 8, 10]),  # from the last one on, whatever it was due by
    ],
)
def test_a_run_saves_by_steps_by_the_clock_and_at_its_end(clock, every_steps, minutes, found):
    rule = save_rule.SaveRule(every_steps, minutes, 10, tf.distribute.get_strategy())
    assert due_steps(rule, clock, 10) == found


def test_workers_save_together_when_the_chiefs_clock_says_so_and_seldom_ask(clock, monkeypatch):
    asked = []

    def chief_says(_, numbers):
        asked.append(numbers)
        return numbers

    monkeypatch.setattr(strategy_lib, "has_several_workers", lambda _: True)
    monkeypatch.setattr(strategy_lib, "as_chief_says", chief_says)
    chief = save_rule.SaveRule(10**6, 10.0, 10**6, tf.distribute.get_strategy())
    due = due_steps(chief, clock, 2000)
    assert all(abs(step - wanted) <= 2 for step, wanted in zip(due, (600, 1200, 1800), strict=True))
    assert len(asked) < 60

    answers = iter(asked)
    monkeypatch.setattr(strategy_lib, "as_chief_says", lambda *_: next(answers))
    other = save_rule.SaveRule(10**6, 10.0, 10**6, tf.distribute.get_strategy())
    assert due_steps(other, clock, 2000, seconds_a_step=0.5) == due  # Its own clock is another.
