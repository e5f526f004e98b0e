"""The one train loop: any task, any strategy, from its newest checkpoint to exactly its last step."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf
from absl import logging

import accumulation
import augment
import checkpoint
import console
import curve
import data
import finite
import preparation
import probe
import run_lock
import schedule as schedule_lib
import service
import stopping
import strategy as strategy_lib
import tasks
import timing
from config import Config
from errors import UserError, lost_worker, reason

# XLA compiles the views of runs that see so many pixels. That takes two or three seconds, and saves as many within
# 5,000 images of 32 pixels, or 100 of 224.
COMPILED_FROM = 5_000 * 32**2
PROBE_MEANS = "probe_means"  # A checkpoint remembers by this name what the steps since the last probe have given.


def train(
    config: Config,
    strategy: tf.distribute.Strategy,
    recipe_reasons: Mapping[str, str] | None = None,
    started: float | None = None,
) -> int:
    """Trains the run of `config`, or goes on where it stopped. Returns the step it has reached.

    `recipe_reasons` says by field name why the recipe chose a value; config.json keeps it. The command began at
    `started`, by `time.monotonic`; None: now.

    Raises:
      UserError: on a mistake found before the first step, when nothing has been written; or where, later, a file
        cannot be read or written or the memory is full.
      FloatingPointError: when the loss, a metric or a weight is not finite, and `config.on_nan` leaves nothing to try;
        no checkpoint holds such a number.
      KeyboardInterrupt: where the run is stopped, saying why and from which step the same command goes on. When a step
        was done, it is saved, unless the reason is that another worker is gone.
    """
    started = time.monotonic() if started is None else started
    with run_lock.RunLock(config.model_dir, strategy_lib.is_chief(strategy)) as lock:
        return train_alone(config, strategy, lock, recipe_reasons, started)


def train_alone(
    config: Config, strategy: tf.distribute.Strategy, lock: run_lock.RunLock,
    recipe_reasons: Mapping[str, str] | None, started: float,
) -> int:  # fmt: skip
    """Does what `train` says, with the `lock` of the run's folder, which it takes before it writes anything."""
    with strategy_lib.together(strategy):
        lock.take_if_there()
    run = preparation.prepare(config, strategy, recipe_reasons)
    newest, steps = run.checkpoints.newest, run.schedule.total_steps
    if newest is not None and newest >= steps:
        return newest
    with strategy_lib.together(strategy):
        lock.take()
    chief = strategy_lib.is_chief(strategy)
    if chief:
        preparation.write_description(config, run)
        if config.checkpoint_choice == "best" and run.opened:
            console.say(f"--checkpoint_choice=best: opened {' and '.join(network.prefix for network in run.opened)}")
        if strategy_lib.lacks_instructions(strategy, config.mixed_precision):
            console.say(
                f"--mixed_precision={config.mixed_precision}: this processor has no instructions for it, so it will "
                f"not help and may be slower"
            )
        for line in preparation.views_in_words(run.task):
            console.say(line)
        profiled = config.profiled_steps
        if profiled and (profiled[0] > steps or profiled[-1] <= (newest or 0)):
            console.say(f"--profile_steps={config.profile_steps}: no profile, as none of these steps is left to take")
    eye = make_probe(config, run, strategy)
    events = os.path.join(config.model_dir, "train")
    state_bytes = sum(math.prod(v.shape) * 4 for v in finite.changed_by_a_step(run.task, run.optimizer))
    with (
        run.checkpoints,
        stopping.Watch(strategy, config.max_minutes, started, state_bytes) as watch,
        curve.Curve(events, chief) as scalars,
        timing.Profile(config.profiled_steps, events, chief) as profile,
        console.Progress(config.train_mode, "step", steps, newest or 0) as progress,
    ):
        loop = Loop(config, run, strategy, eye, watch, scalars, profile, progress)
        try:
            loop.run_to_the_end()
        except FloatingPointError as stop:
            advice = f"lower --learning_rate; the same command then {_goes_on(run.checkpoints)}"
            raise FloatingPointError(f"{stop}: {advice}") from stop
        except KeyboardInterrupt as stop:
            why = f"{stop} at step {loop.step}: the same command {_goes_on(run.checkpoints)}"
            raise KeyboardInterrupt(why.lstrip()) from None
        except tf.errors.ResourceExhaustedError as error:
            raise no_memory_left(f"at step {loop.step + 1}", error) from error
        except tf.errors.OpError as error:
            if lost := lost_worker(error):
                why = f"by {lost} after step {loop.step}: the same command {_goes_on(run.checkpoints)}"
                raise KeyboardInterrupt(why) from None
            raise
        run.checkpoints.finish()
        # No worker may read the chief's last checkpoint before it is written.
        strategy_lib.wait_for_all(strategy)
        if config.mode == "train_then_eval" and (reason_to_stop := watch.reason(steps, now=True)):
            raise KeyboardInterrupt(f"by {reason_to_stop} after the last step: the same command goes on to evaluate")
    return steps


class Loop:
    """The loop of a run: its steps, and what it writes on the way.

    Args:
      config, run, strategy: what is trained, and where.
      eye: the probes of a pretraining run, or None.
      watch: knows why to stop.
      scalars: the TensorBoard scalars.
      profile: the profile of some steps.
      progress: what the terminal shows.

    Attributes:
      step: how many steps are done.
    """

    def __init__(
        self, config: Config, run: preparation.Run, strategy: tf.distribute.Strategy, eye: probe.Probe | None,
        watch: stopping.Watch, scalars: curve.Curve, profile: timing.Profile, progress: console.Progress,
    ) -> None:  # fmt: skip
        self.step = run.checkpoints.newest or 0
        self._config, self._run, self._strategy = config, run, strategy
        self._eye, self._watch, self._progress = eye, watch, progress
        self._scalars, self._profile = scalars, profile
        # Only the host of an accelerator goes on before a step is computed.
        accelerated = strategy_lib.has_accelerator(strategy)
        self._clock = timing.Clock(self.step, ahead=accelerated)
        has_files = config.dataset != "digits"
        views_could_move = accelerated and config.augment_on == "host"
        self._data_warning = timing.DataWarning(
            timing.advice(strategy_lib.cores(), config.image_size, has_files, config.cache_dataset, views_could_move)
        )
        self._last_steps = finite.LastSteps()
        self._gone_back_to: int | None = None
        remembered = run.checkpoints.progress
        self._restores: int = remembered.get(finite.RESTORES, 0)
        self._skipped_steps: int = remembered.get(finite.SKIPPED_STEPS, 0)
        if eye:
            eye.back_to(self.step, remembered.get(PROBE_MEANS, {}))
        skipped, self._scaling = None, None
        with strategy.scope():
            if config.on_nan == "skip":
                skipped = tf.Variable(self._skipped_steps, dtype=tf.int64, trainable=False)
            if config.mixed_precision == "float16":
                self._scaling = finite.LossScale(remembered.get(finite.LOSS_SCALE))
        self._train_step = make_train_step(
            run.task, run.optimizer, strategy, skipped=skipped, scaling=self._scaling
        )  # fmt: skip
        self._several_steps = several_steps(self._train_step, strategy)
        epoch_steps = schedule_lib.epoch_steps(run.source.examples, config.train_batch_size)
        save_every = config.checkpoint_steps or config.checkpoint_epochs * epoch_steps
        steps = run.schedule.total_steps
        self._saving = checkpoint.SaveRule(save_every, config.checkpoint_minutes, steps, strategy)

    def run_to_the_end(self) -> None:
        """Takes all steps that are left, and goes back where they are not finite and `on_nan` says so."""
        newest = self._run.checkpoints.newest
        self._scalars.begin(newest)
        if newest is None:
            if self._eye:
                self._look()
            if self._config.on_nan == "restore":  # There must be a checkpoint to go back to.
                self._save()
        while self.step < self._run.schedule.total_steps:
            try:
                self._take_steps()
            except FloatingPointError as error:
                self._go_back(error)
        self._clock.lap(self.step)
        if self._clock.whole.total >= console.LINE_SECONDS:
            self._progress.say(self._clock.whole.in_words())

    def _take_steps(self) -> None:
        """Takes all steps that are left.

        Raises:
          FloatingPointError: naming the step whose numbers are not finite, and what is not.
          KeyboardInterrupt: saying why the run stops; the last step is saved.
        """
        config, steps, eye = self._config, self._run.schedule.total_steps, self._eye
        checkpoints, progress, clock = self._run.checkpoints, self._progress, self._clock
        batches = training_batches(config, self._run, self._strategy, self.step, self._restores)
        while self.step < steps:
            with self._profile.of(self.step + 1):
                with clock.spent("data"):
                    of_call = [next(batches) for _ in range(self._steps_of_next_call())]
                taken = self._several_steps(of_call) if len(of_call) > 1 else [self._train_step(of_call[0])]
            for metrics in taken:
                self.step += 1
                self._last_steps.add(self.step, metrics)
                if eye:
                    eye.observe(metrics)
            step = self.step
            # A tensor of its own: TensorFlow keeps the status of the last use of a tensor in it, so two threads may
            # not take the value of one at once. Runs on a GPU ended with an error without words.
            clock.stepped(tf.identity(metrics["loss"]))
            self._profile.stepped(step, metrics["loss"])
            progress.advance(len(taken))
            reason_to_stop = self._watch.reason(step)
            writes = self._writes_after(step)
            saves = self._saving.due(step) or bool(reason_to_stop)
            tries_checkpoint = self._tries_checkpoint(step)
            # Every worker checks at the same steps: one that stopped alone would leave the others waiting.
            checks = writes or saves or tries_checkpoint
            if checks or progress.due:
                values = {name: float(value) for name, value in metrics.items()}
                if checks:
                    values = self._checked(values)
                values["learning_rate"] = float(self._run.schedule(step - 1))
                stretch = clock.so_far(step)
                values["images_per_second"] = stretch.images_per_second(config.train_batch_size)
                probed = eye.in_short() if eye else ""
                progress.show(", ".join(part for part in (summary(values), stretch.in_short(), probed) if part))
            if writes:
                self._summarize(values)
            if eye and eye.due(step):
                self._look()
            # The checkpoint follows scalars and probe, so that a run that goes on from it has those of its step.
            if saves:
                self._save()
            if reason_to_stop and step < steps:
                checkpoints.finish()
                strategy_lib.wait_for_all(self._strategy)
                raise KeyboardInterrupt(f"by {reason_to_stop}")

    def _steps_of_next_call(self) -> int:
        """How many steps the next call takes."""
        return steps_of_call(self.step, self._config.steps_per_call, self._must_look_after)

    def _must_look_after(self, step: int) -> bool:
        """Whether there is something to do after `step` steps that cannot be done later."""
        return (
            self._writes_after(step)
            or self._tries_checkpoint(step)
            or self._saving.is_due_by_number(step)
            or self._profile.begins_or_ends_after(step)
            or (self._eye is not None and self._eye.due(step))
        )

    def _writes_after(self, step: int) -> bool:
        """Whether the scalars of this step are written."""
        return step % self._config.summary_steps == 0 or step == self._run.schedule.total_steps

    def _tries_checkpoint(self, step: int) -> bool:
        """Whether the weights of the newest checkpoint give the loss of this step."""
        return step - 1 == self._run.checkpoints.newest

    def _checked(self, values: Mapping[str, float]) -> dict[str, float]:
        """The metrics of this step that are worth showing: the finite ones, where this step may be left out.

        Raises:
          FloatingPointError: where the run cannot go on like this.
        """
        values = {name: value for name, value in values.items() if name != finite.COUNTS}
        if finite.SKIPPED_STEPS in values:
            self._skipped_steps = round(values[finite.SKIPPED_STEPS])
            finite.check_skipped(self._skipped_steps, self._config.max_nan_steps, self.step)
            return {name: value for name, value in values.items() if math.isfinite(value)}
        try:
            self._last_steps.check(values)
        except FloatingPointError:
            newest = self._run.checkpoints.newest
            # In another order the data may do better, so that the checkpoint gets a second chance.
            gets_another_chance = self._config.on_nan == "restore" and self._gone_back_to != newest
            if self.step - 1 == newest and not gets_another_chance:
                self._run.checkpoints.set_aside_newest()
            raise
        return values

    def _summarize(self, values: Mapping[str, float]) -> None:
        """Writes the scalars of this step, and for what the time since the last ones was spent."""
        stretch = self._clock.lap(self.step)
        with self._clock.spent("summaries"):
            self._scalars.write(self.step, values, "train")
            self._scalars.write(self.step, stretch.scalars(), "time")
        if warning := self._data_warning.after(stretch):
            logging.warning("%s", warning)

    def _look(self) -> None:
        """Probes the features after this step, shows what it found, and keeps the best checkpoint so far."""
        assert self._eye
        with self._clock.spent("evaluation"):
            found = self._eye.look(self.step)
        if found is None:
            logging.warning("the probe at step %d is left out: the features are not finite", self.step)
            return
        self._scalars.write(self.step, found, "probe")
        if self._progress.in_log:
            self._progress.say(self._eye.in_words())
        for alarm in self._eye.new_alarms():
            self._progress.say(f"alarm: {alarm}")
        if self._config.keep_best and self._eye.last_is_best(self._run.checkpoints.best):
            with self._clock.spent("checkpoint"):
                self._run.checkpoints.progress = self._remembered()
                self._run.checkpoints.save_best()

    def _save(self) -> None:
        """Saves this step.

        Raises:
          FloatingPointError: where a number of it is not finite.
        """
        checkpoints = self._run.checkpoints
        with self._clock.spent("checkpoint"):
            checkpoints.progress = self._remembered()
            self._scalars.bring_to_disk()
            try:
                checkpoints.save()
            except FloatingPointError as error:
                raise FloatingPointError(f"{error} at step {self.step}") from error
        if checkpoints.save_seconds:  # Until the first is written, nothing is known.
            self._watch.saved(checkpoints.save_seconds)

    def _remembered(self) -> dict[str, Any]:
        """What a checkpoint of this step remembers besides variables."""
        remembered: dict[str, Any] = {}
        if self._skipped_steps:
            remembered[finite.SKIPPED_STEPS] = self._skipped_steps
        if self._restores:
            remembered[finite.RESTORES] = self._restores
        if self._scaling:
            remembered[finite.LOSS_SCALE] = self._scaling.state()
        if self._eye:
            remembered[PROBE_MEANS] = self._eye.so_far()
        return remembered

    def _go_back(self, error: FloatingPointError) -> None:
        """Goes back to the newest checkpoint, and on with another order of the data.

        Raises:
          FloatingPointError: where the run may not go back, or cannot.
        """
        checkpoints, most = self._run.checkpoints, self._config.max_nan_restores
        if self._config.on_nan != "restore":
            raise error
        if self._restores == most:
            raise FloatingPointError(f"{error}, and --max_nan_restores={most} is reached") from error
        checkpoints.settle()
        if checkpoints.newest is None:
            raise FloatingPointError(f"{error}, and there is no good checkpoint to go back to") from error
        self._restores += 1
        strategy_lib.wait_for_all(self._strategy)
        checkpoints.resume(os.path.join(self._config.model_dir, f"ckpt-{checkpoints.newest}"))
        self.step = self._gone_back_to = checkpoints.newest
        self._skipped_steps = checkpoints.progress.get(finite.SKIPPED_STEPS, 0)
        self._last_steps = finite.LastSteps()
        if self._scaling:
            self._scaling.back_to(checkpoints.progress.get(finite.LOSS_SCALE))
        if self._eye:
            self._eye.back_to(self.step, checkpoints.progress.get(PROBE_MEANS, {}))
        self._scalars.begin(self.step)
        self._watch.back_to(self.step)
        self._clock.back_to(self.step)
        self._progress.back_to(self.step)
        self._progress.say(
            f"{error}: back to step {self.step}, and on with another order of the data ({self._restores} of at most "
            f"{most} times)"
        )


def make_probe(config: Config, run: preparation.Run, strategy: tf.distribute.Strategy) -> probe.Probe | None:
    """The probes of a pretraining run; None where there are none. A probe compares images, so it takes two of them."""
    if config.train_mode != "pretrain" or config.eval_every_epochs < 0 or run.source.examples < 2:
        return None
    return probe.Probe(
        config, run.source, run.task.model, run.task.views, run.schedule.total_steps, run.schedule.warmup_steps,
        run.checkpoints.newest, strategy,
    )  # fmt: skip


def training_batches(
    config: Config, run: preparation.Run, strategy: tf.distribute.Strategy, step: int = 0, restores: int = 0
) -> Iterator[Mapping]:
    """The batches of a run that has taken `step` steps, and has gone back `restores` times."""
    # An epoch's seed is a tensor. TensorFlow shuffles by such a seed only where its global seed is not 0.
    tf.random.set_seed(config.seed + 1)
    batch, seed = config.train_batch_size, finite.order_seed(config.seed, restores)
    compiled = run.schedule.total_steps * batch * config.image_size**2 >= COMPILED_FROM
    canvas = augment.canvas_side(config.image_size) if config.augment_on == "device" else 0

    def stream(taken: int, servers: Sequence[str] = ()) -> Iterable:
        def of_worker(context: tf.distribute.InputContext) -> tf.data.Dataset:
            def part(which: tuple[int, int] | None = None) -> tf.data.Dataset:
                return data.train_stream(
                    run.source, run.task.views, batch, seed, step + taken, context, compiled, canvas, which
                )

            replicas = context.num_replicas_in_sync // context.num_input_pipelines
            return service.joined(servers, part, step + taken, replicas) if servers else part()

        return strategy.distribute_datasets_from_function(of_worker)

    if config.data_service:
        return service.batches(service.addresses(config.data_service), stream)
    return data.patient_batches(run.source, stream)


def no_memory_left(when: str, error: tf.errors.ResourceExhaustedError) -> UserError:
    """What to say where the device has no memory left for a step."""
    advice = "lower --train_batch_size or --image_size, or split the batch by --grad_accumulation"
    return UserError(f"no memory is left {when}: {advice}: {reason(error)[:200]}")


def _goes_on(checkpoints: checkpoint.RunCheckpoints) -> str:
    newest = checkpoints.newest_written()
    return "starts from the beginning, as nothing was saved" if newest is None else f"goes on from step {newest}"


def make_train_step(
    task: tasks.Task,
    optimizer: keras.optimizers.Optimizer,
    strategy: tf.distribute.Strategy,
    skipped: tf.Variable | None = None,
    scaling: finite.LossScale | None = None,
) -> tf.types.experimental.PolymorphicFunction:
    """The compiled step: one distributed batch in, the metrics of the global batch out.

    With `skipped`, which counts them, a step whose numbers are not finite changes nothing. With `scaling`, for float16,
    the same holds of a step whose gradient overflows. See `finite.Guard` for both. With `grad_accumulation` in the
    task's config, the batch goes through the networks in so many chunks. With `jit_compile` there, XLA
    compiles it, which needs a strategy of one device; on a TPU it is compiled anyway.
    """
    jit_compile = task.config.jit_compile and not strategy_lib.is_tpu(strategy)
    variables, chunks = task.model.trainable_variables, task.config.grad_accumulation
    scale = (lambda: scaling.value) if scaling else None  # read on each replica
    guard = None
    if skipped is not None or scaling:
        guard = finite.Guard(finite.changed_by_a_step(task, optimizer), skipped, scaling)

    def begin(batch: Mapping[str, Any]) -> tuple[Mapping[str, tf.Tensor], list[tf.Tensor]]:
        if "canvas" in batch:
            batch = augment.of_canvases(batch, task.views)
        return batch, guard.before() if guard else []

    def end(gradients: list[tf.Tensor], metrics: tasks.Metrics, before: list[tf.Tensor]) -> tasks.Metrics:
        if scaling:
            gradients = scaling.unscaled(gradients)
        optimizer.apply(gradients, variables)  # sums the replicas' gradients
        task.after_step(tf.convert_to_tensor(optimizer.iterations))  # the momentum encoder follows
        return guard.after(metrics, before) if guard else metrics

    def step(batch: Mapping[str, Any]) -> tasks.Metrics:
        batch, before = begin(batch)
        return end(*accumulation.at_once(task, batch, scale), before)

    @tf.function(autograph=False, jit_compile=jit_compile)
    def distributed_step(batch: Mapping) -> tasks.Metrics:
        if chunks == 1:
            shares = strategy.run(step, (batch,))
        else:
            batch, before = strategy.run(begin, (batch,))
            gradients, shares = accumulation.in_chunks(task, strategy, chunks, batch, scale)
            shares = strategy.run(end, (gradients, shares, before))
        return {name: strategy.reduce(tf.distribute.ReduceOp.SUM, share, axis=None) for name, share in shares.items()}

    return distributed_step


def steps_of_call(step: int, most: int, must_look_after: Callable[[int], bool]) -> int:
    """How many steps the next call takes, when `step` steps are done: `most`, or one.

    It is one where the host must look before so many are done. So there are two lengths to compile, not many.

    Example:
      steps_of_call(20, 10, lambda step: step % 30 == 0) == 10
      steps_of_call(25, 10, lambda step: step % 30 == 0) == 1
    """
    return 1 if any(must_look_after(step + done) for done in range(1, most)) else most


def several_steps(
    train_step: tf.types.experimental.PolymorphicFunction, strategy: tf.distribute.Strategy
) -> Callable[[Sequence[Mapping]], list[tasks.Metrics]]:
    """Several steps in one compiled call: as many distributed batches in as steps to take, the metrics of each out.

    The call holds its batches, and a copy of them, in the memory of the device. `train_step`, as from
    `make_train_step`, is traced once, whatever the number of steps.
    """

    def stack(*batches: Mapping[str, Any]) -> dict[str, Any]:
        return tf.nest.map_structure(lambda *values: tf.stack(values), *batches)  # [steps, n, ...]

    def of_step(index: tf.Tensor, stacked: Mapping[str, Any]) -> dict[str, Any]:
        return tf.nest.map_structure(lambda values: values[index], stacked)  # [n, ...]

    @tf.function(autograph=False)
    def steps(batches: Sequence[Mapping]) -> list[tasks.Metrics]:
        count = len(batches)
        stacked = strategy.run(stack, tuple(batches))
        names = train_step.get_concrete_function(batches[0]).structured_outputs
        arrays = {name: tf.TensorArray(tf.float32, count, element_shape=[]) for name in names}

        def step(index: tf.Tensor, arrays: Mapping[str, tf.TensorArray]) -> tuple[tf.Tensor, dict]:
            metrics = train_step(strategy.run(of_step, (index, stacked)))
            return index + 1, {name: array.write(index, metrics[name]) for name, array in arrays.items()}

        _, arrays = tf.while_loop(lambda index, _: index < count, step, (tf.constant(0), arrays))
        by_name = {name: tf.unstack(array.stack()) for name, array in arrays.items()}  # [steps]
        return [{name: values[i] for name, values in by_name.items()} for i in range(count)]

    return steps


def summary(values: Mapping[str, float]) -> str:
    """A step's metrics in a few words, for the terminal."""
    parts = [f"loss {values['loss']:.3f}" if "loss" in values else "this step is left out"]
    if "contrastive_accuracy" in values:
        accuracy, chance = values["contrastive_accuracy"], values["contrastive_chance"]
        parts.append(f"contrastive accuracy {accuracy:.1%} (chance {100 * chance:.2g}%)")
    elif "teacher_agreement" in values:
        parts.append(f"agrees with the teacher on {values['teacher_agreement']:.1%}")
    elif "supervised_accuracy" in values:
        parts.append(f"accuracy {values['supervised_accuracy']:.1%}")
    if values.get(finite.SKIPPED_STEPS):
        parts.append(f"{values[finite.SKIPPED_STEPS]:.0f} left out so far")
    parts.append(f"{values['images_per_second']:,.0f} images/s")
    return ", ".join(parts)
