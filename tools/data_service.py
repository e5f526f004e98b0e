"""A server that reads and augments training images for other machines, until it is stopped.

    python tools/data_service.py --port=5050 --host=HOST

It is a dispatcher of tf.data's service on --port with one worker. Trainers reach it as --data_service=grpc://HOST:5050;
several servers are joined by commas. It must find the images under the same paths as the trainers. SIGTERM and SIGINT
stop it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import engine

with engine.quiet_import():
    import tensorflow as tf

import console
import sources  # noqa: F401  # The worker calls its functions for images that TensorFlow cannot decode.


def main(arguments: Sequence[str] | None = None) -> None:
    """Starts a server and waits."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--port", type=int, default=0, help="where trainers ask; 0: any that is free")
    parser.add_argument("--worker_port", type=int, default=0, help="where batches are given; 0: any that is free")
    parser.add_argument("--host", default="localhost", help="the name by which trainers reach this machine")
    given = parser.parse_args(arguments)
    service = tf.data.experimental.service
    try:
        dispatcher = service.DispatchServer(service.DispatcherConfig(port=given.port))
        address = dispatcher.target.partition("://")[2]
        worker = service.WorkerServer(
            service.WorkerConfig(address, f"{given.host}:%port%", given.worker_port, heartbeat_interval_ms=1000)
        )
    except tf.errors.OpError as error:
        sys.exit(f"data_service.py: no server can be started on port {given.port}: {error.message.splitlines()[0]}")
    console.say(f"data service: grpc://{given.host}:{address.rpartition(':')[2]}")
    sys.stdout.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    del worker
    os._exit(0)  # TensorFlow would wait for trainers.


if __name__ == "__main__":
    main()
