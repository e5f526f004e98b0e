"""Training batches that other machines read and augment, by the service of tf.data. Their order stays the same.

Several workers of one dispatcher would give batches in the order in which they are ready. So each address names a
dispatcher with one worker (`tools/data_service.py` starts such a server). Each server makes a part of the places of
every batch, and the trainer joins the parts in the order of the addresses. The parts carry their step, and a batch
whose parts are not of the step that is due is never trained on.

What a server makes depends on (seed, step) alone. So where one no longer answers, the others make its part from the
next step on: nothing is lost and nothing comes twice.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

import data
import sources
from errors import UserError, lost_worker, reason

PREFIX = "grpc://"
START_SECONDS = 10.0  # how long a server may take to answer before a run begins
LOST_SECONDS = 10.0  # A server that has not answered for so long is lost.
ASK_SECONDS = 1.0  # between two questions to a server
FAILURES = 3  # so many streams in a row may fail without a batch
_WORKERS = "/tensorflow.data.DispatcherService/GetWorkers"  # a question that every dispatcher answers


def addresses(flag: str) -> list[str]:
    """The addresses in the value of --data_service; none where it is empty."""
    return flag.split(",") if flag else []


def check(flag: str) -> None:
    """Makes sure that every server of --data_service answers and has a worker. It waits up to `START_SECONDS` for one.

    Raises:
      UserError: naming the first that does not.
    """
    for address in addresses(flag):
        until, found = time.monotonic() + START_SECONDS, None
        while not found and time.monotonic() < until:
            found = _workers(address, until - time.monotonic())
            if not found:
                time.sleep(0.2)
        if not found:
            what = "no data service answers there" if found is None else "its dispatcher has no worker"
            port = address.rpartition(":")[2]
            raise UserError(
                f"--data_service={address}: {what} (waited {START_SECONDS:.0f} seconds): start it by "
                f"`python tools/data_service.py --port={port}`, or leave the flag out"
            )


def _workers(address: str, seconds: float) -> int | None:
    """The bytes in which a dispatcher describes its workers: none where it has none. None where it does not answer."""
    import grpc

    try:
        return len(_question(address)(b"", timeout=max(seconds, 0.1)))
    except grpc.RpcError:
        return None


@functools.cache
def _question(address: str) -> Callable[..., bytes]:
    import grpc

    return grpc.insecure_channel(address.removeprefix(PREFIX)).unary_unary(_WORKERS)


def joined(
    servers: Sequence[str], make_part: Callable[[tuple[int, int]], tf.data.Dataset], first_step: int, replicas: int
) -> tf.data.Dataset:
    """The batches of this worker from `first_step` on, made by servers.

    Args:
      servers: their addresses.
      make_part: gives the stream of part i of n of this worker's share of each batch, for (i, n).
      first_step: steps already taken.
      replicas: how many replicas this worker has. They take consecutive parts of its share.

    Returns:
      Batches of one replica's share, as from `data.train_stream`.
    """
    parts = []
    for i, server in enumerate(servers):
        with sources.sent_away():
            part = make_part((i, len(servers))).enumerate(first_step)
        # Compression takes the trainer's time, and images that were augmented hardly shrink.
        sent = tf.data.experimental.service.distribute(
            tf.data.experimental.service.ShardingPolicy.OFF, server, compression=None
        )
        parts.append(part.apply(sent))

    def join(step: tf.Tensor, of_servers: Sequence[tuple[tf.Tensor, dict]]) -> dict:
        steps = tf.stack([step_of_part for step_of_part, _ in of_servers])  # [servers]
        in_step = tf.debugging.Assert(tf.reduce_all(steps == step), ["parts of other steps than the one that is due"])
        with tf.control_dependencies([in_step]):
            return tf.nest.map_structure(lambda *parts: tf.concat(parts, 0), *(batch for _, batch in of_servers))

    def split(batch: dict) -> tf.data.Dataset:
        def by_replica(values: tf.Tensor) -> tf.Tensor:
            return tf.reshape(values, [replicas, values.shape[0] // replicas, *values.shape[1:]])  # [replicas, n, ...]

        return tf.data.Dataset.from_tensor_slices(tf.nest.map_structure(by_replica, batch))

    batches = tf.data.Dataset.zip(tuple(parts)).enumerate(first_step).map(join)
    if replicas > 1:
        batches = batches.flat_map(split)
    return _watched(batches, servers).prefetch(2)


def _watched(stream: tf.data.Dataset, servers: Sequence[str]) -> tf.data.Dataset:
    """The stream, which fails where a server is lost. TensorFlow alone would wait for the server for ever.

    A second dataset, which never gives anything, is read beside the stream: it asks the servers whether they are there.
    """
    answered = dict.fromkeys(servers, time.monotonic())

    def ask(_: np.int64) -> np.bool_:
        time.sleep(ASK_SECONDS)
        for server in servers:
            asked = time.monotonic()
            if _workers(server, LOST_SECONDS):
                answered[server] = asked
            elif time.monotonic() - answered[server] > LOST_SECONDS:
                raise RuntimeError(f"{server} no longer answers")
        return np.bool_(False)

    def nothing(_: tf.Tensor) -> Any:
        return tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), stream.element_spec)

    endless = tf.data.Dataset.range(np.iinfo(np.int64).max)
    never = endless.filter(lambda i: tf.ensure_shape(tf.numpy_function(ask, [i], tf.bool), [])).map(nothing)
    both = tf.data.Dataset.from_tensors(stream).concatenate(tf.data.Dataset.from_tensors(never))
    return both.interleave(lambda one: one, cycle_length=2, num_parallel_calls=2, deterministic=False)


def batches(servers: Sequence[str], make: Callable[[int, Sequence[str]], Iterable]) -> Iterator[Any]:
    """The batches that servers make. Where one is lost, the others make the stream from the next batch on.

    Args:
      servers: their addresses.
      make: gives the stream without its first so many batches, by these of the servers, distributed or not.

    Raises:
      UserError: as `data.batches`, and where streams keep failing.
      KeyboardInterrupt: where no server answers.
    """
    taken = failures = 0
    while True:
        answering = [server for server in servers if _workers(server, LOST_SECONDS)]
        if not answering:
            raise KeyboardInterrupt(f"by the loss of the data service ({', '.join(servers)} does not answer)")
        if len(answering) < len(servers):
            lost = ", ".join(server for server in servers if server not in answering)
            logging.warning("the data service at %s does not answer: %s make its part", lost, ", ".join(answering))
        servers = answering
        try:
            for batch in data.batches(make(taken, servers)):
                yield batch
                taken, failures = taken + 1, 0
            return
        except tf.errors.OpError as error:
            failures += 1
            if lost_worker(error):
                raise
            if failures == FAILURES:
                raise UserError(f"--data_service={','.join(servers)}: {reason(error)[:300]}") from error
