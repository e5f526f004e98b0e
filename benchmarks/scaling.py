"""The same mathematics on any number of devices and processes, in figures: the tables of docs/scaling.md.

    python benchmarks/scaling.py --only=equality   # how far N replicas are from one, after five steps
    python benchmarks/scaling.py --only=command    # run.py under TF_CONFIG with 2 and 3 processes, beside one process
    python benchmarks/scaling.py --only=xla        # what XLA makes of each step
    python benchmarks/scaling.py --only=start      # the time to the first step of a ResNet-50, beside Keras' batch norm
    python benchmarks/scaling.py --only=traffic    # the bytes of a step of 2 processes, beside tools/cost.py
    python benchmarks/scaling.py --only=memory     # peaks of batches in chunks and with recomputed blocks (bigger.py)
    python benchmarks/scaling.py --only=speed      # two workers on one core each, beside one (Linux: taskset)

All processes are real, and speak over the loopback interface. It ends with status 1 where a figure is beyond its
bound. Where other work shares the machine, the seconds of processor time still hold, those of the clock not.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np

PARTS = ("equality", "command", "xla", "start", "traffic", "memory", "speed")
TASKS: dict[str, dict[str, Any]] = {
    "pretraining with memory": dict(train_mode="pretrain", memory="queue", memory_size=56),
    "pretraining without memory": dict(train_mode="pretrain", memory="none"),
    "fine-tuning": dict(train_mode="finetune", checkpoint="-", ft_proj_selector=1),
    "distillation": dict(train_mode="distill", teacher="-", distill_alpha=0.5),
    "supervised": dict(train_mode="supervised", optimizer="momentum"),
}
CLASSES = ("zero", "one", "two")
BATCH, STEPS, SIZE = 12, 5, 16  # 2, 3 and 4 replicas can share the batch
# Steps of a size at which a run learns. Much larger ones make any rounding grow tenfold a step, on one device too.
RATES = {"lars": 0.02, "momentum": 0.005}
# How far N replicas may be from one, relative to the largest value of the kind. It is 400 units of the last place of
# float32, since batch norm divides by what five steps have rounded differently.
BOUND = 5e-5
# What run.py is given: data, processes, and servers that read and augment. Each kind of data begins with one process.
COMMANDS = (
    ("in memory", 1, 0), ("in memory", 2, 0), ("in memory", 3, 0), ("image folder", 1, 0), ("image folder", 2, 2),
    ("TensorFlow dataset in 16 files", 1, 0), ("TensorFlow dataset in 16 files", 2, 0),
    ("TensorFlow dataset in 16 files", 2, 2),
)  # fmt: skip
DIGITS = {"train": 240, "test": 100}  # those that are written into files
SPEED = dict(
    resnet_depth=18, image_size=32, train_mode="pretrain", memory="queue", memory_size=4096, optimizer="lars",
)  # fmt: skip
SPEED_BATCH, SPEED_STEPS = 32, 6
START = dict(resnet_depth=50, image_size=32, train_mode="pretrain", memory="none")
START_BATCH = 4
LEAST_SPEEDUP = 0.85  # of two workers beside twice one
# What is sent may be more than calculated: each message has its head, and a step its metrics.
TRAFFIC_STEPS, MOST_MORE_TRAFFIC = 3, 0.05
SECONDS = 1800


def batch_of(step: int, batch: int = BATCH, size: int = SIZE) -> dict[str, np.ndarray]:
    """The global batch of a step, the same for every strategy. A third of its images has no label."""
    rng = np.random.default_rng(step)
    views = {name: rng.random([batch, size, size, 3], np.float32) for name in ("view_1", "view_2", "image")}
    labels = np.where(np.arange(batch) % 3 == 2, -1, rng.integers(0, len(CLASSES), batch)).astype(np.int32)
    return {**views, "label": labels}


def make_task(config: Any) -> Any:
    """The task of `config` from one seed, no weight at a special value, with a teacher where it needs one."""
    import keras

    import tasks

    keras.utils.set_random_seed(0)
    teacher = None
    if config.train_mode == "distill":
        wise = tasks.network(config, len(CLASSES))

        def teacher(images: Any) -> Any:
            return wise(images, training=False).logits

    task = tasks.make_task(config, CLASSES, teacher)
    rng = np.random.default_rng(1)
    for variable in task.model.trainable_variables:
        noise = rng.standard_normal(variable.shape).astype(np.float32)
        variable.assign(variable.numpy() + 0.1 * np.abs(variable.numpy()).max() * noise + 0.01 * noise)
    if isinstance(task, tasks.Pretrain):
        task.start_momentum()
    return task


def config_of(name: str) -> Any:
    """The Config of a task on the small network."""
    from config import Config

    return Config(
        resnet_depth=10, width_multiplier=0.125, image_size=SIZE, train_batch_size=BATCH, proj_out_dim=16,
        weight_decay=1e-3, ema_decay=0.9, **TASKS[name],
    )  # fmt: skip


def optimizer_that_remembers(task: Any, seen: list) -> Any:
    """The optimizer of `task`. It puts variables into `seen`, which hold the summed gradients of the newest step."""
    import tensorflow as tf

    import lars_optimizer

    config, variables = task.config, task.model.trainable_variables
    head = task.model.supervised_head.trainable_variables
    optimizer = lars_optimizer.make_optimizer(
        config.optimizer, RATES[config.optimizer], config.momentum, config.weight_decay, head
    )
    optimizer.build(variables)
    seen += [tf.Variable(tf.zeros(variable.shape), trainable=False) for variable in variables]
    apply = optimizer.update_step

    def update_step(gradient: Any, variable: Any, learning_rate: Any) -> None:
        seen[optimizer._get_variable_index(variable)].assign(gradient)
        apply(gradient, variable, learning_rate)

    optimizer.update_step = update_step
    return optimizer


def state_after_steps(name: str, strategy: Any) -> dict[str, np.ndarray]:
    """What five steps of a task leave, by kind: one vector each. `loss` holds every metric of every step."""
    import keras

    import train

    gradients: list = []
    with strategy.scope():
        task = make_task(config_of(name))
        optimizer = optimizer_that_remembers(task, gradients)
    step = train.make_train_step(task, optimizer, strategy)
    metrics = []
    for number in range(STEPS):
        found = step(shares_of(batch_of(number), strategy))
        metrics.append([float(found[key]) for key in sorted(found)])

    def flat(variables: Sequence[Any]) -> np.ndarray:
        """One replica's values; every one of this process has the same."""
        values = []
        for variable in variables:
            tensor = variable.value if isinstance(variable, keras.Variable) else variable
            local = strategy.experimental_local_results(tensor)
            arrays = [np.asarray(value) for value in local]
            assert all(np.array_equal(array, arrays[0]) for array in arrays), "the replicas are not equal"
            values.append(arrays[0].ravel())
        return np.concatenate(values)

    trained = task.model.trainable_variables
    made = {
        "loss": np.array(metrics),
        "gradient": flat(gradients),
        "batch norm": flat(moving_of(task.model)),
        "weights": flat(trained),
    }
    if getattr(task, "queue", None):
        made |= {"queue": flat([task.queue.keys]), "EMA": flat(task.momentum.trainable_variables)}
        made["batch norm"] = np.concatenate([made["batch norm"], flat(moving_of(task.momentum))])
    return made


def shares_of(batch: Mapping[str, np.ndarray], strategy: Any) -> Any:
    """A batch as a step takes it: each replica of `strategy` gets consecutive images of it."""
    import tensorflow as tf

    replicas = strategy.num_replicas_in_sync

    def part(context: Any) -> dict:
        index = context.replica_id_in_sync_group
        return {key: tf.constant(np.split(value, replicas)[index]) for key, value in batch.items()}

    if replicas == 1:
        return {key: tf.constant(value) for key, value in batch.items()}
    return strategy.experimental_distribute_values_from_function(part)


def moving_of(model: Any) -> list:
    """The moving averages of a network."""
    return [variable for variable in model.variables if variable.name.startswith("moving_")]


def make_networks_smooth_and_short() -> None:
    """Gives the networks of this process softplus in place of ReLU, and those of depth 10 one group of blocks."""
    import keras

    import architecture

    def softplus(**options: Any) -> Any:
        return keras.layers.Activation("softplus", **options)

    # At the edge of a ReLU rounding decides whether a unit has a gradient. In a network this small one unit is much.
    keras.layers.ReLU = softplus
    architecture.BLOCKS[10] = (architecture.BASIC, (1,))  # instead of four groups, which take longer to trace


def strategy_of_devices(devices: int) -> Any:
    """The strategy over so many logical devices of this process, or the cluster of TF_CONFIG where there is one."""
    import tensorflow as tf

    import strategy as strategy_lib

    if devices > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * devices)
    return strategy_lib.make_strategy("mirrored" if devices > 1 else "auto")


def write_states(folder: Path, devices: int, names: Sequence[str]) -> None:
    """Trains these tasks on so many logical devices, or in the cluster of TF_CONFIG. The chief writes."""
    import tensorflow as tf

    import strategy as strategy_lib

    make_networks_smooth_and_short()
    # To rewrite a graph of several replicas takes longer than its five steps.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    strategy = strategy_of_devices(devices)
    for name in names:
        state = state_after_steps(name, strategy)
        if strategy_lib.is_chief(strategy):
            np.savez(folder / f"{name}.npz", **state)
    strategy_lib.wait_for_all(strategy)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nothing listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def run_workers(count: int, command: Sequence[str], cores: Sequence[int] = ()) -> list[str]:
    """Runs a command in so many workers at once, each on its core where `cores` are given. Returns what each one said.

    Raises:
      SystemExit: where one fails, with what it said.
    """
    addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
    workers = []
    for index in range(count):
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
        environment.pop("TF_CONFIG", None)
        if count > 1:
            task = {"type": "worker", "index": index}
            environment["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
        pinned = ["taskset", "--cpu-list", str(cores[index])] if cores else []
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        workers.append(subprocess.Popen([*pinned, sys.executable, *command], env=environment, **pipes))
    try:
        said = [worker.communicate(timeout=SECONDS)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for index, worker in enumerate(workers):
        if worker.returncode:
            sys.exit(f"worker {index} of {count} has failed with {worker.returncode}:\n{said[index]}")
    return said


def said_as_json(output: str) -> dict[str, float]:
    """The JSON that a process of this program has printed among other lines."""
    return json.loads([line for line in output.splitlines() if line.startswith("{")][-1])


def states(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Has every strategy train these tasks. Yields its name in words and the folder of what came of it."""
    own = str(Path(__file__).resolve())
    for name, workers, devices in (
        ("one device", 1, 1), ("2 devices", 1, 2), ("4 devices", 1, 4), ("2 processes", 2, 1), ("3 processes", 3, 1),
    ):  # fmt: skip
        place = folder / name.replace(" ", "_")
        place.mkdir()
        run_workers(workers, [own, f"--states={place}", f"--devices={devices}", *(f"--task={name}" for name in names)])
        yield name, place


def differences(state: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The largest difference of each kind, relative to the largest value of the kind."""
    return {kind: float(np.abs(state[kind] - of).max() / np.abs(of).max()) for kind, of in reference.items()}


def equality(names: Sequence[str]) -> bool:
    """Prints the table of N replicas beside one. Returns whether all figures are within the bound."""
    kinds = ("loss", "gradient", "batch norm", "queue", "EMA", "weights")
    print("| step | replicas | " + " | ".join(kinds) + " |")
    print("| --- | --- " + "| --- " * len(kinds) + "|")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        made = dict(states(Path(folder), names))
        for name in names:
            reference = dict(np.load(made["one device"] / f"{name}.npz", allow_pickle=False))
            for replicas in list(made)[1:]:
                found = differences(dict(np.load(made[replicas] / f"{name}.npz", allow_pickle=False)), reference)
                worst = max(worst, *found.values())
                cells = [f"{found[kind]:.1e}" if kind in found else "" for kind in kinds]
                print(f"| {name} | {replicas} | " + " | ".join(cells) + " |", flush=True)
    print(f"\nThe largest is {worst:.1e}, the bound {BOUND:g}.")
    return worst <= BOUND


def write_digits(folder: Path) -> None:
    """Writes digits of scikit-learn as an image folder, and as a TensorFlow dataset in 16 files for each split."""
    import tensorflow_datasets as tfds
    from PIL import Image

    import sources

    digits = {split: sources.load("digits", f"{split}[:{count}]") for split, count in DIGITS.items()}

    class DigitsInFiles(tfds.core.GeneratorBasedBuilder):
        """The digits. run.py finds them by what lies in the folder, without this class."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            label = tfds.features.ClassLabel(names=list(digits["train"].classes))
            features = {"image": tfds.features.Image(shape=(8, 8, 3)), "label": label}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _: Any) -> dict[str, Any]:
            return {split: self._generate_examples(source) for split, source in digits.items()}

        def _generate_examples(self, source: Any) -> Iterator[tuple[str, dict]]:
            for name, image, label in zip(source.names, source.records, source.labels, strict=True):
                yield name, {"image": image, "label": label}

    for split, source in digits.items():
        for number, (image, label) in enumerate(zip(source.records, source.labels, strict=True)):
            place = folder / "images" / split / source.classes[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{number}.png")
    tfds.disable_progress_bar()
    in_files = tfds.download.DownloadConfig(num_shards=16)
    DigitsInFiles(data_dir=str(folder / "tfds")).download_and_prepare(download_config=in_files)


@contextlib.contextmanager
def data_servers(count: int) -> Iterator[dict[str, int]]:
    """Starts so many servers of tools/data_service.py, and stops them. Gives their process numbers by address."""
    command = [sys.executable, str(ROOT / "tools" / "data_service.py")]
    quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    servers = [subprocess.Popen(command, **quiet) for _ in range(count)]
    try:
        yield {server.stdout.readline().split()[-1]: server.pid for server in servers}
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(timeout=60)


def last_state(model_dir: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint of a run, by its key."""
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(model_dir))
    shapes = reader.get_variable_to_shape_map()
    values = {key: reader.get_tensor(key) for key in shapes if not key.startswith(("_CHECKPOINTABLE", "save_counter"))}
    return {key: value for key, value in values.items() if isinstance(value, np.ndarray) and value.dtype == np.float32}


def in_words(key: str) -> str:
    """The name of a variable in a checkpoint, without what TensorFlow adds to it: an end, and a point to each point."""
    return "`" + key.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE").replace("..", ".") + "`"


def command_line(kinds: Sequence[str]) -> bool:
    """Prints what run.py leaves with one, two and three processes on these kinds of data. Returns if it is the same."""
    small = [
        "--mode=train_then_eval", "--train_steps=4", "--resnet_depth=10", "--width_multiplier=0.0625", "--image_size=8",
        "--train_batch_size=12", "--eval_batch_size=84", "--memory=queue", "--memory_size=32", "--eval_every_epochs=-1",
        "--optimizer=lars", "--recipe=paper", "--eval_split=test", "--warmup_epochs=0",
        # After four steps the features of all images are nearly the same, and rounding decides who is a neighbour.
        "--knn_neighbors=0",
    ]  # fmt: skip
    columns = ("data", "processes", "data servers", "examples", "result.json", "weights and queue", "which", "files")
    print("| " + " | ".join(columns) + " |")
    print("| --- " * len(columns) + "|")
    same = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_digits(folder)
        flags = {
            "in memory": [],
            "image folder": [f"--data_dir={folder}/images"],
            "TensorFlow dataset in 16 files": ["--dataset=digits_in_files", f"--data_dir={folder}/tfds"],
        }
        alone: dict[str, tuple[dict, dict, set[str]]] = {}
        for number, (data, workers, servers) in enumerate(command for command in COMMANDS if command[0] in kinds):
            model_dir = folder / f"run_{number}"
            with data_servers(servers) as addresses:
                served = [f"--data_service={','.join(addresses)}"] if servers else []
                run = [str(ROOT / "run.py"), *small, *flags[data], *served, f"--model_dir={model_dir}"]
                run_workers(workers, run)
            result = json.loads((model_dir / "result.json").read_text())
            files = {str(path.relative_to(model_dir)).partition("events.")[0] for path in model_dir.rglob("*")}
            files.add(f"{len(list(model_dir.rglob('events.*')))} files of events")
            state = last_state(model_dir)
            one, state_of_one, files_of_one = alone.setdefault(data, (result, state, files))
            numbers = [name for name, value in one.items() if isinstance(value, float) and name != "seconds"]
            apart = max((abs(result[name] - one[name]) / max(abs(one[name]), 1e-12) for name in numbers), default=0.0)
            others = {name: value for name, value in one.items() if name not in (*numbers, "seconds")}
            apart_by_key = differences(state, state_of_one)
            most = max(apart_by_key, key=apart_by_key.__getitem__)
            state_apart = apart_by_key[most]
            largest = np.abs(state_of_one[most]).max()
            words = f"{in_words(most)}, whose largest is {largest:.1e}" if state_apart else ""
            is_same = all(result[name] == value for name, value in others.items()) and files == files_of_one
            same = same and is_same and max(apart, state_apart) <= 0.02
            print(
                f"| {data} | {workers} | {servers or ''} | {result['examples']} | {apart:.1e} | {state_apart:.1e} | "
                f"{words} | {'the same' if is_same else 'OTHERS'} |",
                flush=True,
            )
    return same


def xla() -> bool:
    """Prints how long XLA takes to compile each step, and of how many kinds of operations it consists."""
    import tensorflow as tf

    import train

    print("| step | kinds of operations | s to trace | s to compile and run first |")
    print("| --- | --- | --- | --- |")
    for name in TASKS:
        task = make_task(dataclasses.replace(config_of(name), jit_compile=True))
        optimizer = optimizer_that_remembers(task, [])
        step = train.make_train_step(task, optimizer, tf.distribute.get_strategy())
        batch = {key: tf.constant(value) for key, value in batch_of(0).items()}
        began = time.process_time()
        graph = step.get_concrete_function(batch).graph.as_graph_def()
        traced = time.process_time()
        assert np.isfinite(float(step(batch)["loss"]))
        compiled = time.process_time()
        nodes = [*graph.node, *(node for inner in graph.library.function for node in inner.node_def)]
        kinds = len({node.op for node in nodes})
        print(f"| {name} | {kinds} | {traced - began:.1f} | {compiled - traced:.1f} |", flush=True)
    return True


def numbers_added_up() -> list[int]:
    """How many numbers each sum of one tensor over all replicas adds up, of the steps that are traced from now on.

    The sum comes once for each replica. The gradients of the weights, which are added up together, do not count, nor
    does that to gathered embeddings, whose shape TensorFlow does not know.
    """
    import tensorflow as tf

    found: list[int] = []
    all_reduce = tf.distribute.ReplicaContext.all_reduce

    def counted(self: Any, reduce_op: Any, value: Any, options: Any = None) -> Any:
        tensors = tf.nest.flatten(value)
        if len(tensors) == 1 and tensors[0].shape.is_fully_defined():
            found.append(int(np.prod(tensors[0].shape)))
        return all_reduce(self, reduce_op, value, options)

    tf.distribute.ReplicaContext.all_reduce = counted
    return found


def measure_start(batch_norm: str, devices: int) -> None:
    """Prints, as JSON, how long a ResNet-50 takes to its first step, and what its batch norm sends in a step.

    `trace` and `first` are seconds of processor to trace the step and to the end of the first one, `clock` those of the
    clock to its end, and `sent` the bytes that each of the replicas would send in a ring.
    """
    import keras

    import lars_optimizer
    import resnet
    import tasks
    import train
    from config import Config

    if batch_norm == "Keras":
        resnet.BatchNorm = keras.layers.BatchNormalization
    strategy = strategy_of_devices(devices)
    added = numbers_added_up()
    config = Config(train_batch_size=START_BATCH, **START)
    with strategy.scope():
        task = tasks.make_task(config, CLASSES)
        optimizer = lars_optimizer.make_optimizer("lars", RATES["lars"])
        optimizer.build(task.model.trainable_variables)
    step = train.make_train_step(task, optimizer, strategy)
    batch = shares_of(batch_of(0, START_BATCH, START["image_size"]), strategy)
    clock, processor = time.perf_counter(), time.process_time()
    step.get_concrete_function(batch)
    traced = time.process_time()
    of_all = sum(added) // devices
    assert np.isfinite(float(step(batch)["loss"]))
    found = {"trace": traced - processor, "first": time.process_time() - processor}
    sent = 4 * (of_all - 2) * 2 * (devices - 1) / devices  # Two of them count images.
    print(json.dumps({**found, "clock": time.perf_counter() - clock, "sent": sent}))


def start() -> bool:
    """Prints how long a ResNet-50 takes to its first step. Returns whether Keras' batch norm takes no less of it."""
    print("| batch norm | replicas | s to trace | to the end of the first step | by the clock | sent by each, a step |")
    print("| --- | --- | --- | --- | --- | --- |")
    found = {}
    for devices in (1, 2):
        for batch_norm in ("Keras", "here"):
            command = [str(Path(__file__).resolve()), f"--start_of={batch_norm}", f"--devices={devices}"]
            took = found[batch_norm] = said_as_json(run_workers(1, command)[0])
            sent = f"{took['sent'] / 1e6:.2f} MB" if devices > 1 else ""
            times = f"{took['trace']:.1f} | {took['first']:.1f} | {took['clock']:.1f}"
            print(f"| {batch_norm} | {devices} | {times} | {sent} |", flush=True)
    return all(found["here"][name] <= found["Keras"][name] for name in ("first", "sent"))  # on 2 replicas


def sent_over_loopback() -> int:
    """The bytes that the loopback interface of this network namespace has sent so far."""
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[8])


def write_traffic() -> None:
    """Prints, as JSON, what each of the workers sends in a step, and what tools/cost.py calculates."""
    import tensorflow as tf

    import cost
    import strategy as strategy_lib
    import tasks
    import train
    from config import Config
    from plan import footprint

    strategy = strategy_lib.make_strategy("auto")
    config = Config(**{**SPEED, "width_multiplier": 0.5, "image_size": SIZE, "train_batch_size": BATCH})
    with strategy.scope():
        task = tasks.make_task(config, CLASSES)
        optimizer = optimizer_that_remembers(task, [])
    replicas = strategy.num_replicas_in_sync
    part = {key: tf.constant(value[: BATCH // replicas]) for key, value in batch_of(0).items()}
    shares = strategy.experimental_distribute_values_from_function(lambda _: part)
    step = train.make_train_step(task, optimizer, strategy)
    float(step(shares)["loss"])
    strategy_lib.wait_for_all(strategy)
    before = sent_over_loopback()
    for _ in range(TRAFFIC_STEPS):
        float(step(shares)["loss"])
    strategy_lib.wait_for_all(strategy)
    measured = (sent_over_loopback() - before) / TRAFFIC_STEPS / replicas
    trained = sum(int(np.prod(variable.shape)) for variable in task.model.trainable_variables)
    channels = sum(variable.shape[0] for variable in moving_of(task.model)) // 2
    calculated = cost.traffic(trained, channels, BATCH, task.model.output_dim, True, footprint.has_queue(config))
    print(json.dumps({"measured": measured, "calculated": calculated.sent_by_each(replicas), **calculated._asdict()}))


def traffic() -> bool:
    """Prints the bytes that each of two processes sends in a step, beside the calculation. Returns whether they agree.

    The processes have a network namespace of their own, whose loopback interface carries nothing else: Linux, and root.
    """
    own = str(Path(__file__).resolve())
    alone = [
        "unshare",
        "--net",
        "sh",
        "-c",
        'ip link set lo up && exec "$0" "$@"',
        sys.executable,
        own,
        "--traffic_pair",
    ]
    done = subprocess.run(alone, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        sys.exit(f"the traffic cannot be measured:\n{done.stdout}{done.stderr}")
    said = said_as_json(done.stdout)
    more = said["measured"] / said["calculated"] - 1
    print("| what each of 2 processes sends in a step | bytes |")
    print("| --- | --- |")
    print(f"| measured | {said['measured']:,.0f} |")
    print(f"| calculated | {said['calculated']:,.0f} ({more:+.1%} measured) |")
    return abs(more) < MOST_MORE_TRAFFIC


def measure_speed(batch: int) -> None:
    """Prints, as JSON, the seconds of this worker for a step on its share of `batch`, by the clock and of processor."""
    import tensorflow as tf

    import strategy as strategy_lib
    import tasks
    import train
    from config import Config

    strategy = strategy_lib.make_strategy("auto")
    config = Config(train_batch_size=batch, **SPEED)
    with strategy.scope():
        task = tasks.make_task(config, CLASSES)
        optimizer = optimizer_that_remembers(task, [])
    step = train.make_train_step(task, optimizer, strategy)
    replicas = strategy.num_replicas_in_sync
    images = batch_of(0, batch, SPEED["image_size"])
    part = {key: tf.constant(value[: batch // replicas]) for key, value in images.items()}
    shares = strategy.experimental_distribute_values_from_function(lambda _: part) if replicas > 1 else part
    for _ in range(2):
        float(step(shares)["loss"])
    clock, processor = time.perf_counter(), time.process_time()
    for _ in range(SPEED_STEPS):
        loss = step(shares)["loss"]
    float(loss)
    found = {"clock": time.perf_counter() - clock, "processor": time.process_time() - processor}
    print(json.dumps({name: seconds / SPEED_STEPS for name, seconds in found.items()}))


def speed() -> bool:
    """Prints strong and weak scaling of two workers on one core each. Returns whether it is good by processor time."""
    own = str(Path(__file__).resolve())
    cores = sorted(os.sched_getaffinity(0))[:2]

    def images_per_second(workers: int, batch: int) -> dict[str, float]:
        said = run_workers(workers, [own, f"--speed_of={batch}"], cores)
        seconds = [said_as_json(each) for each in said]
        return {kind: batch / max(of[kind] for of in seconds) for kind in ("clock", "processor")}

    one = images_per_second(1, SPEED_BATCH)
    print("| workers, a core each | batch | images/s by the clock | of linear | by processor time | of linear |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(f"| 1 | {SPEED_BATCH} | {one['clock']:.1f} | | {one['processor']:.1f} | |", flush=True)
    good = True
    for words, batch in (("strong", SPEED_BATCH), ("weak", 2 * SPEED_BATCH)):
        two = images_per_second(2, batch)
        shares = {kind: two[kind] / (2 * one[kind]) for kind in two}
        good = good and shares["processor"] >= LEAST_SPEEDUP
        cells = [
            f"{two['clock']:.1f}",
            f"{shares['clock']:.0%}",
            f"{two['processor']:.1f}",
            f"{shares['processor']:.0%}",
        ]
        print(f"| 2 ({words}) | {batch} | " + " | ".join(cells) + " |", flush=True)
    return good


def memory() -> bool:
    """Prints the peak memory of batches at once, in chunks and with recomputed blocks, as `bigger.py` measures it."""
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "bigger.py")], check=True)
    return True


def main() -> None:
    """Writes the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", choices=PARTS, action="append", help="else all of them")
    parser.add_argument("--task", choices=list(TASKS), action="append", help="else all of them; for the equality")
    kinds = list(dict.fromkeys(data for data, _, _ in COMMANDS))
    parser.add_argument("--data", choices=kinds, action="append", help="else all of them; for the command")
    # What this program gives to the processes that it starts:
    parser.add_argument("--states", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--devices", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--start_of", choices=("Keras", "here"), help=argparse.SUPPRESS)
    parser.add_argument("--speed_of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--traffic_of", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--traffic_pair", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.states:
        write_states(given.states, given.devices, given.task)
        return
    if given.start_of:
        measure_start(given.start_of, given.devices)
        return
    if given.speed_of:
        measure_speed(given.speed_of)
        return
    if given.traffic_of:
        write_traffic()
        return
    if given.traffic_pair:
        print(run_workers(2, [str(Path(__file__).resolve()), "--traffic_of"])[0])
        return
    parts = {
        "equality": lambda: equality(given.task or list(TASKS)),
        "command": lambda: command_line(given.data or kinds),
        "xla": xla,
        "start": start,
        "traffic": traffic,
        "memory": memory,
        "speed": speed,
    }
    good = [parts[name]() for name in given.only or PARTS]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
