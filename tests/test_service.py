"""Batches from data services: the same as without them, whichever servers are lost meanwhile."""

import itertools
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
import tiny
from conftest import ROOT
from PIL import Image
from tensorflow.python.framework import config as tf_config

import augment
import data
import service
import sources
import train
from errors import UserError

ONE_STAGE = True
VIEWS = {"view_1": augment.pretrain_view(16), "view_2": augment.crop_and_flip(16)}
STEP = 2


@pytest.fixture(scope="module")
def servers():
    """The addresses of two servers in this process."""
    of_tf_data = tf.data.experimental.service
    dispatchers = [of_tf_data.DispatchServer() for _ in range(2)]
    addresses = [dispatcher.target.partition("://")[2] for dispatcher in dispatchers]
    workers = [of_tf_data.WorkerServer(of_tf_data.WorkerConfig(address)) for address in addresses]
    yield [f"grpc://{address}" for address in addresses]
    del workers


@pytest.fixture
def soon_lost(monkeypatch):
    monkeypatch.setattr(service, "LOST_SECONDS", 3.0)


def of_servers(source, addresses, context=None, batch=8):
    """The batches of a worker from `STEP` on that servers make."""
    replicas = context.num_replicas_in_sync // context.num_input_pipelines if context else 1

    def make(taken, answering):
        def part(which):
            return data.train_stream(source, VIEWS, batch, 0, STEP + taken, context, part=which)

        return service.joined(answering, part, STEP + taken, replicas)

    return service.batches(addresses, make)


def check_same(source, addresses, batches, context=None):
    """Makes sure that servers give the batches that this process makes by itself."""
    here = data.train_stream(source, VIEWS, 8, 0, STEP, context).take(batches).as_numpy_iterator()
    there = of_servers(source, addresses, context)
    for own, batch in zip(here, there, strict=False):
        assert own.keys() == batch.keys()
        for key, values in own.items():
            np.testing.assert_array_equal(values, batch[key].numpy())
    there.close()


def test_servers_give_the_batches_that_a_run_makes_by_itself(tmp_path, servers):
    root = tiny.folder_of(tmp_path, *(f"train/{'ab'[i % 2]}/{i}.png" for i in range(10)))
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side, so that TensorFlow alone would decode it as nobody sees it
    Image.fromarray(tiny.noise(7)).save(tmp_path / "train" / "a" / "camera.jpg", exif=exif)
    check_same(sources.load("image_folder", "train", root), servers, 3)


@pytest.mark.slow
def test_workers_and_replicas_get_their_shares_from_servers(servers):
    source = sources.load("digits", "train")
    check_same(source, servers, 4, tf.distribute.InputContext(1, 0, 2))
    check_same(source, servers, 2, tf.distribute.InputContext(2, 1, 2))


def test_a_damaged_image_stops_the_stream_with_its_name(tmp_path, servers):
    root = tiny.folder_of(tmp_path, "train/a/0.png", "train/b/1.png")
    (tmp_path / "train" / "a" / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a/bad\.png cannot be read .*: repair or remove it, or leave out"):
        list(itertools.islice(of_servers(sources.load("image_folder", "train", root), servers[:1]), 5))


def test_more_than_can_be_sent_is_refused(servers, monkeypatch):
    monkeypatch.setattr(sources.base, "SENT_BYTES", 1000)
    with pytest.raises(UserError, match="--data_service takes no images in memory beyond 1,000 bytes, and these have"):
        next(of_servers(sources.load("digits", "train"), servers))


def test_wrong_addresses_are_refused_in_the_time_that_is_stated(servers, monkeypatch):
    monkeypatch.setattr(service, "START_SECONDS", 1.0)
    service.check(",".join(servers))
    alone = tf.data.experimental.service.DispatchServer()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            nobody = closed.getsockname()[1]
        for address, why in (
            (f"grpc://127.0.0.1:{silent.getsockname()[1]}", "no data service answers there"),
            (f"grpc://127.0.0.1:{nobody}", "no data service answers there"),
            (f"grpc://{alone.target.partition('://')[2]}", "its dispatcher has no worker"),
        ):
            began = time.monotonic()
            with pytest.raises(
                UserError, match=rf"--data_service={address}: {why}.* \(waited 1 seconds\): start it by"
            ):
                service.check(f"{servers[0]},{address}")
            assert time.monotonic() - began < 10


@pytest.fixture
def processes():
    """Two servers in processes of their own, each with its address. SIGTERM ends those that a test leaves alive."""
    command = [sys.executable, str(ROOT / "tools" / "data_service.py")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    yield [(process, process.stdout.readline().split()[-1]) for process in started]
    alive = [process for process in started if process.poll() is None]
    for process in alive:
        process.terminate()
    assert [process.wait(timeout=60) for process in alive] == [0] * len(alive)


GIVEN = dict(tiny.IN_COLOUR, image_size=16, deterministic=True, train_steps=30)


def killing(monkeypatch, at_step, *victims):
    """Kills processes when a run has taken so many steps."""
    make_train_step = train.make_train_step

    def make(*arguments, **more):
        step, taken = make_train_step(*arguments, **more), itertools.count()

        def step_and_kill(batch):
            if next(taken) == at_step:
                for victim in victims:
                    victim.kill()
            return step(batch)

        return step_and_kill

    monkeypatch.setattr(train, "make_train_step", make)


@pytest.mark.slow
def test_a_run_ends_the_same_where_one_of_two_servers_is_killed(tmp_path, processes, soon_lost, monkeypatch, caplog):
    tiny.train_run(**GIVEN, model_dir=str(tmp_path / "alone"))
    (victim, lost), (_, other) = processes
    with monkeypatch.context() as patched:
        killing(patched, 3, victim)
        tiny.train_run(**GIVEN, model_dir=str(tmp_path / "served"), data_service=f"{lost},{other}")
    tf_config.disable_op_determinism()
    assert f"the data service at {lost} does not answer: {other} make its part" in caplog.text
    alone, served = tiny.saved_values(tmp_path / "alone"), tiny.saved_values(tmp_path / "served")
    assert alone.keys() == served.keys()
    for name, values in alone.items():
        np.testing.assert_array_equal(values, served[name], err_msg=name)


@pytest.mark.slow
def test_a_run_whose_servers_are_all_killed_stops_and_goes_on(tmp_path, processes, soon_lost, monkeypatch):
    given = dict(GIVEN, model_dir=str(tmp_path / "run"), checkpoint_steps=4)
    with monkeypatch.context() as patched:
        killing(patched, 6, *(process for process, _ in processes))
        with pytest.raises(KeyboardInterrupt, match=r"by the loss of the data service .* at step .*: the same command"):
            tiny.train_run(**given, data_service=",".join(address for _, address in processes))
    tiny.train_run(**given)
    tf_config.disable_op_determinism()
    tiny.train_run(**dict(GIVEN, model_dir=str(tmp_path / "alone")))
    tf_config.disable_op_determinism()
    alone, stopped = tiny.saved_values(tmp_path / "alone"), tiny.saved_values(tmp_path / "run")
    for name, values in alone.items():
        np.testing.assert_array_equal(values, stopped[name], err_msg=name)
