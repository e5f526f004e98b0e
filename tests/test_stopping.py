"""Reasons to stop a run: signals, the time limit, a notice of the cloud; together with other workers."""

import contextlib
import http.server
import threading
import time

import pytest
import tensorflow as tf

import signals
import stopping
import strategy as strategy_lib

ONE = tf.distribute.get_strategy()


def watch(max_minutes=0.0, seconds_ago=0.0, state_bytes=0):
    return stopping.Watch(ONE, max_minutes, time.monotonic() - seconds_ago, state_bytes)


def test_a_signal_is_a_reason_once_a_step_is_done(monkeypatch):
    with watch() as asked:
        assert not signals.LISTENER.deferred  # Until then nothing is lost where it stops at once.
        assert asked.reason(1) == ""
        assert signals.LISTENER.deferred
        monkeypatch.setattr(signals.LISTENER, "first", "SIGTERM")
        assert asked.reason(2) == "SIGTERM"
    assert not signals.LISTENER.deferred


def test_the_time_limit_leaves_time_to_save():
    with watch(max_minutes=1.0, seconds_ago=20.0) as asked:
        assert asked.reason(1) == asked.reason(2) == ""
        asked.saved(30.0)
        assert asked.reason(3) == "--max_minutes=1"
    with watch(max_minutes=1.0, seconds_ago=20.0, state_bytes=2 * 10**9) as asked:  # It may take 40 s to save.
        assert asked.reason(1) == "--max_minutes=1"
    with watch(max_minutes=0.0, seconds_ago=1e6) as asked:
        assert asked.reason(1) == ""


def test_workers_ask_each_other_now_and_then_and_stop_after_the_same_step(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(strategy_lib, "has_several_workers", lambda _: True)
    others, meetings = [0], []
    monkeypatch.setattr(strategy_lib, "largest", lambda _, mine: [max(mine[0], others[0])])
    monkeypatch.setattr(strategy_lib, "as_chief_says", lambda _, mine: (meetings.append(step), mine)[1])
    step = 0
    asked = stopping.Watch(ONE, 0.0, 0.0, 0)
    for step in range(1, 44):  # half a second each
        clock[0] += 0.5
        assert asked.reason(step) == ""
    assert meetings == [1, 2, 4, 8, 16, 26, 36]  # More steps are measured each time, until they take 5 s.
    others[0] = 2  # Another worker got SIGTERM.
    found = {}
    for step in range(44, 47):
        clock[0] += 0.5
        found[step] = asked.reason(step)
    assert found == {44: "", 45: "", 46: "SIGTERM"}
    others[0] = 0
    step = 47
    assert asked.reason(step, now=True) == ""
    asked.back_to(20)
    step = 21
    asked.reason(step)
    assert meetings[-2:] == [47, 21]


@contextlib.contextmanager
def metadata_server(monkeypatch, answer):
    """A server of Compute Engine's metadata on the loopback interface, as TensorFlow asks it."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("answer", "reason"), [("TRUE", "the notice that this machine is taken back"), ("FALSE", "")])
def test_compute_engine_takes_a_machine_back(monkeypatch, answer, reason):
    monkeypatch.setattr(stopping, "NOTICE_SECONDS", 0.05)
    with metadata_server(monkeypatch, answer) as paths, watch() as asked:
        patience = time.monotonic() + 20
        while not paths or (reason and not asked.reason(1) and time.monotonic() < patience):
            time.sleep(0.05)
        assert asked.reason(2) == reason
        assert paths[0] == "/computeMetadata/v1/instance/preempted"


def test_other_machines_ask_no_server(monkeypatch, tmp_path):
    monkeypatch.delenv("GCE_METADATA_IP", raising=False)
    monkeypatch.setattr(stopping, "PRODUCT_NAME", str(tmp_path / "none"))
    assert not stopping.runs_on_compute_engine()
    (tmp_path / "name").write_text("Google Compute Engine\n")
    monkeypatch.setattr(stopping, "PRODUCT_NAME", str(tmp_path / "name"))
    assert stopping.runs_on_compute_engine()
