"""Every step of the method computes the same on one replica, two and four, and compiles; its losses are the paper's."""

import functools
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import per_replica, randomize, run, split
from parity import error

import architecture
import lars_optimizer
import objective
import tasks
import train
from config import Config

BATCH, CLASSES, STEPS = 8, ["zero", "one", "two"], 4
LABELS = np.array([0, 1, -1, 2, -1, -1, -1, -1], np.int32)  # the replicas have different numbers of labels, some none
TASKS = {
    "pretrain with memory": dict(train_mode="pretrain", memory_size=40),
    "pretrain without memory": dict(train_mode="pretrain", memory="none"),
    "finetune": dict(train_mode="finetune", checkpoint="-", ft_proj_selector=1),
    "supervised": dict(train_mode="supervised", optimizer="momentum"),
    "distill": dict(train_mode="distill", teacher="-", distill_temperature=2.0, optimizer="adam"),
    "distill with labels": dict(train_mode="distill", teacher="-", distill_alpha=0.5),
    "distill answers": dict(train_mode="distill", teacher="-", distill_neighbors=2),
}


@pytest.fixture(autouse=True)
def smooth(monkeypatch):
    """One stage instead of four, which is faster to compile, and no ReLU: rounding decides about a unit at its edge."""
    monkeypatch.setitem(architecture.BLOCKS, 10, (architecture.BASIC, (1,)))
    softplus = functools.partial(keras.layers.Activation, "softplus")
    monkeypatch.setattr(keras.layers, "ReLU", softplus)


def make_config(name, **changes):
    tiny = dict(resnet_depth=10, width_multiplier=0.125, image_size=16, train_batch_size=BATCH, proj_out_dim=16)
    return Config(**{**tiny, "num_proj_layers": 2, "weight_decay": 1e-3, "ema_decay": 0.9, **TASKS[name], **changes})


def make_task(name, **changes):
    """The task from one seed, no weight at a special value, with a teacher where it needs one."""
    config = make_config(name, **changes)
    keras.utils.set_random_seed(0)
    teacher = None
    if config.train_mode == "distill" and not config.distill_neighbors:
        wise = tasks.network(config, len(CLASSES))
        randomize(wise.variables, seed=7)

        def teacher(images):
            return wise(images, training=False).logits

    task = tasks.make_task(config, CLASSES, teacher)
    randomize(task.model.variables)
    if isinstance(task, tasks.Pretrain):
        task.start_momentum()
    return task


def make_batch(step=0, labels=LABELS):
    rng = np.random.default_rng(step)
    views = {name: rng.random([BATCH, 16, 16, 3], np.float32) for name in ("view_1", "view_2", "image")}
    answers = np.log(rng.dirichlet(np.ones(len(CLASSES)), BATCH)).astype(np.float32)
    return {**views, "label": np.roll(labels, step), "answer": answers}


def make_optimizer(task, rate=0.05):
    config = task.config
    head = task.model.supervised_head.trainable_variables
    optimizer = lars_optimizer.make_optimizer(config.optimizer, rate, config.momentum, config.weight_decay, head)
    optimizer.build(task.model.trainable_variables)
    return optimizer


def state_of(task):
    """Every variable that a step may change, by name."""
    found = {f"model {i} {v.path}": v.value for i, v in enumerate(task.model.variables)}
    if getattr(task, "momentum", None):
        found |= {f"momentum {i} {v.path}": v.value for i, v in enumerate(task.momentum.variables)}
        found |= {"queue keys": task.queue.keys, "queue count": task.queue.count}
    return found


def trained(name, strategy, rate):
    """Metrics of each step, and the state after the last on every replica. Everything in it has moved."""
    with strategy.scope():
        task = make_task(name)
        optimizer = make_optimizer(task, rate)
    start = {key: per_replica(strategy, value)[0] for key, value in state_of(task).items()}
    step = train.make_train_step(task, optimizer, strategy)
    metrics = [step(split(strategy, make_batch(i))) for i in range(STEPS)]
    metrics = [{key: float(value) for key, value in each.items()} for each in metrics]
    state = {key: per_replica(strategy, value) for key, value in state_of(task).items()}
    assert not [key for key in state if np.array_equal(state[key][0], start[key])]
    return metrics, state


def loss_and_gradients(task, batch):
    variables = task.model.trainable_variables
    with tf.GradientTape() as tape:
        loss, metrics = task.loss(batch)
    return loss, metrics, tape.gradient(loss, variables)


# These go all ways that there are; the others go some of them.
DEFAULT_CASES = [("pretrain with memory", 4), ("finetune", 2), ("distill with labels", 2)]
CASES = [
    pytest.param(*case, marks=() if case in DEFAULT_CASES else pytest.mark.slow)
    for case in itertools.product(TASKS, (2, 4))
]


@pytest.mark.parametrize(("name", "replicas"), CASES)
def test_replicas_train_as_one(mirrored, name, replicas):
    # Adam divides a gradient by its size, even where it is nothing but rounding.
    rate = 1e-4 if make_config(name).optimizer == "adam" else 0.05
    metrics, state = trained(name, mirrored(1), rate)
    metrics_several, state_several = trained(name, mirrored(replicas), rate)
    for step in range(STEPS):
        assert metrics_several[step] == pytest.approx(metrics[step], rel=1e-4, abs=1e-5), f"step {step}"
    for key, (expected,) in state.items():
        for local in state_several[key]:
            np.testing.assert_allclose(local, expected, rtol=1e-4, atol=1e-4, err_msg=key)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "pretrain with memory" else pytest.mark.slow) for name in TASKS]
)
def test_the_whole_step_compiles_with_xla(name):
    """Forward, backward, optimizer, moving averages, momentum encoder and queue, as an accelerator compiles them."""
    results = []
    for jit_compile in (False, True):
        task = make_task(name, jit_compile=jit_compile)
        step = train.make_train_step(task, make_optimizer(task), tf.distribute.get_strategy())
        metrics = [step(make_batch(i)) for i in range(2)]
        results.append((metrics, state_of(task)))
    (metrics, state), (metrics_jit, state_jit) = results
    for got, expected in zip(metrics_jit, metrics, strict=True):
        for key, value in expected.items():
            np.testing.assert_allclose(got[key], value, rtol=1e-4, atol=1e-5, err_msg=key)
    for key, expected in state.items():
        np.testing.assert_allclose(state_jit[key], expected, rtol=1e-4, atol=1e-4, err_msg=key)


def test_a_student_learns_the_answers_that_come_with_the_batch():
    """Eq. 2 in NumPy: the cross-entropy under the answers, whose temperature is the student's too."""
    for tau in (1.0, 0.5):
        task = make_task("distill answers", distill_temperature=tau, weight_decay=0.0)
        batch = make_batch()
        loss, metrics = task.loss(batch)
        logits = task.model(batch["image"], training=True).logits.numpy() / tau
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        sharpened = np.exp(batch["answer"] / tau)
        targets = sharpened / sharpened.sum(1, keepdims=True)
        assert float(loss) == pytest.approx(-(targets * log_p).sum(1).mean(), rel=1e-4)
        agrees = logits.argmax(1) == batch["answer"].argmax(1)
        assert float(metrics["teacher_agreement"]) == pytest.approx(agrees.mean())


def test_contrastive_chance_counts_every_candidate_but_ones_own():
    chances = {}
    for memory in ("queue", "none"):
        task = make_task("pretrain with memory", memory=memory)
        chances[memory] = [1 / float(task.loss(make_batch(i))[1]["contrastive_chance"]) for i in range(4)]
    assert chances["none"] == pytest.approx([15] * 4)
    assert chances["queue"] == pytest.approx([15, 31, 47, 55])  # up to the 40 keys of a full queue


def test_pretrain_loss_is_the_sum_of_its_parts():
    task = make_task("pretrain without memory")
    batch = make_batch()
    outputs = task.model(tf.concat([batch["view_1"], batch["view_2"]], 0), training=True)
    z = objective.normalize(outputs.z)
    contrastive = 2 * np.mean(objective.nt_xent(z, z, task.config.temperature).loss)  # summed over the views
    labels = np.concatenate([LABELS, LABELS])
    supervised = np.sum(objective.supervised(outputs.logits, labels)[0]) / np.sum(labels >= 0)
    decay = 1e-3 * np.sum(np.square(task.model.supervised_head.kernel)) / 2
    loss, metrics = task.loss(batch)
    assert error(loss, contrastive + supervised + decay) < 1e-5
    assert error(metrics["contrastive_loss"], contrastive) < 1e-5
    assert error(metrics["supervised_loss"], supervised) < 1e-5


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_distillation_loss_is_equation_3(alpha):
    task = make_task("distill with labels", distill_alpha=alpha, weight_decay=0.0, distill_temperature=2.0)
    batch = make_batch()
    student = np.float64(task.model(batch["image"], training=True).logits)
    teacher = np.float64(task.teacher(batch["image"]))

    def log_softmax(logits):
        return logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))

    distilled = -np.mean(np.sum(np.exp(log_softmax(teacher / 2)) * log_softmax(student / 2), axis=1))
    labelled = np.mean([-log_softmax(student)[i, label] for i, label in enumerate(LABELS) if label >= 0])
    loss, metrics = task.loss(batch)
    assert error(loss, alpha * distilled + (1 - alpha) * labelled) < 1e-5
    assert error(metrics["distillation_loss"], distilled) < 1e-5
    agreement = np.mean(np.argmax(student, axis=1) == np.argmax(teacher, axis=1))
    assert float(metrics["teacher_agreement"]) == pytest.approx(agreement)


def test_means_are_over_the_global_batch(mirrored):
    """Where replicas differ in what they have of labels, a mean of their means would be another number."""
    strategy = mirrored(2)
    values, labels = np.arange(8, dtype=np.float32), np.array([1, 1, 2, -1, -1, -1, -1, 1], np.int32)
    batch = split(strategy, {"values": values, "labels": labels})

    def shares(part):
        totals, labelled = tasks.totals(part["labels"]), tf.cast(part["labels"] >= 0, tf.float32)
        plain = tasks.mean_share(part["values"], totals.examples)
        return plain, tasks.mean_share(part["values"] * labelled, totals.labelled)

    plain, weighted = (np.sum(per_replica(strategy, share)) for share in run(strategy, shares, batch))
    assert plain == pytest.approx(3.5) and weighted == pytest.approx((0 + 1 + 2 + 7) / 4)


@pytest.mark.parametrize("optimizer", ["lars", "momentum", "adam"])
def test_weight_decay_in_the_loss_is_what_the_optimizer_leaves(optimizer):
    task = make_task("supervised", optimizer=optimizer)
    head = task.model.supervised_head
    decayed = [head.kernel] if optimizer == "lars" else [v for v in task.model.trainable_variables if len(v.shape) > 1]
    expected = 1e-3 * sum(np.sum(np.square(np.float64(variable.value))) for variable in decayed) / 2
    assert error(task.weight_decay(), expected) < 1e-5


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("distill", "distill answers")])
def test_a_batch_without_labels_has_no_supervised_loss(name):
    task = make_task(name, weight_decay=0.0)
    loss, metrics, gradients = loss_and_gradients(task, make_batch(labels=np.full([BATCH], -1, np.int32)))
    assert float(metrics["supervised_loss"]) == 0 and float(metrics["supervised_accuracy"]) == 0
    if task.config.train_mode in ("finetune", "supervised"):
        assert float(loss) == 0 and not any(np.any(gradient) for gradient in gradients)
    assert all(np.all(np.isfinite(part)) for part in (loss, *gradients))


def test_momentum_encoder_starts_as_a_copy():
    config = make_config("pretrain with memory")
    task = tasks.make_task(config, CLASSES)
    pairs = [(task.momentum.encoder, task.model.encoder), (task.momentum.head, task.model.head)]
    for k, q in pairs:
        for variable, other in zip(k.variables, q.variables, strict=True):
            np.testing.assert_array_equal(variable, other)
            assert variable is not other
    assert task.momentum.supervised_head is None


def test_the_ramp_lets_the_momentum_encoder_follow_fast_at_first():
    task = make_task("pretrain with memory", ema_ramp=True, jit_compile=True)
    step = train.make_train_step(task, make_optimizer(task), tf.distribute.get_strategy())
    for t in (1, 2):
        before = [np.array(k) for k in task.momentum.trainable_variables]
        step(make_batch(t))
        decay = (1 + t) / (10 + t)
        learned = task.model.encoder.trainable_variables + task.model.head.trainable_variables
        for k, old, q in zip(task.momentum.trainable_variables, before, learned, strict=True):
            assert error(k, decay * old + (1 - decay) * np.array(q)) < 1e-6


def test_momentum_encoder_follows_by_ema_and_gets_no_gradient():
    task = make_task("pretrain with memory")
    optimizer = make_optimizer(task)
    batch = make_batch()
    watched = [variable.value for variable in task.momentum.trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch(watched)
        loss, _ = task.loss(batch)
    assert all(gradient is None for gradient in tape.gradient(loss, watched))

    before = [np.array(value) for value in watched]
    own = {id(variable) for variable in task.momentum.variables}
    assert not own & {id(variable) for variable in optimizer._trainable_variables}
    train.make_train_step(task, optimizer, tf.distribute.get_strategy())(batch)
    learned = task.model.encoder.trainable_variables + task.model.head.trainable_variables
    for k, old, q in zip(task.momentum.trainable_variables, before, learned, strict=True):
        assert error(k, 0.9 * old + 0.1 * np.array(q)) < 1e-6


def test_a_step_builds_no_gradient_graph_of_the_momentum_encoder(monkeypatch):
    """The tape has recorded nothing of its forward pass, so no activation is kept for a backward pass either."""
    task = make_task("pretrain with memory")
    tapes, keys, gradients = [], [], []

    class Tape(tf.GradientTape):
        def __init__(self, **given):
            super().__init__(persistent=True, **given)
            tapes.append(self)

    def gather_views(z):
        keys.append(z)
        return z

    def after_step(step):
        gradients.extend(tapes[0].gradient(keys[0], [variable.value for variable in task.momentum.trainable_variables]))

    step = train.make_train_step(task, make_optimizer(task), tf.distribute.get_strategy())
    monkeypatch.setattr(tf, "GradientTape", Tape)
    monkeypatch.setattr(objective, "gather_views", gather_views)
    monkeypatch.setattr(task, "after_step", after_step)
    tf.config.run_functions_eagerly(True)
    try:
        step(make_batch())
    finally:
        tf.config.run_functions_eagerly(False)
    assert len(tapes) == len(keys) == 1
    assert gradients and all(gradient is None for gradient in gradients)


def test_queue_holds_the_keys_of_both_views_in_block_order():
    task = make_task("pretrain with memory")
    step = train.make_train_step(task, make_optimizer(task), tf.distribute.get_strategy())
    expected = []
    for i in range(2):
        batch = make_batch(i)
        keys = task.momentum(tf.concat([batch["view_1"], batch["view_2"]], 0), training=True).z
        expected.append(objective.normalize(keys))
        step(batch)
    assert int(task.queue.count) == 32
    assert error(task.queue.keys[:32], tf.concat(expected, 0)) < 1e-5
    assert not np.any(task.queue.keys[32:])


def test_the_block_of_the_loss_does_not_change_a_step():
    found = []
    for block in (0, 3):
        task = make_task("pretrain with memory", loss_block=block)
        step = train.make_train_step(task, make_optimizer(task), tf.distribute.get_strategy())
        metrics = [{key: float(value) for key, value in step(make_batch(i)).items()} for i in range(2)]
        found.append((metrics, {key: np.array(value) for key, value in state_of(task).items()}))
    (metrics, state), (metrics_in_blocks, state_in_blocks) = found
    for got, expected in zip(metrics_in_blocks, metrics, strict=True):
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for key, expected in state.items():
        np.testing.assert_allclose(state_in_blocks[key], expected, rtol=1e-4, atol=1e-4, err_msg=key)


def test_past_keys_count_as_negatives_of_the_next_step():
    losses = []
    for memory in ("queue", "none"):
        task = make_task("pretrain with memory", memory=memory)
        losses.append([float(task.loss(make_batch(0))[1]["contrastive_loss"]) for _ in range(2)])
    (first, second), (alone, again) = losses
    assert first == pytest.approx(alone, rel=1e-4)  # an empty queue, and keys of the same weights
    assert again == pytest.approx(alone, rel=1e-6) and second > first + 0.1  # the same batch, with 16 negatives more


def test_the_tasks_networks():
    wholes = {name: make_task(name).model for name in TASKS}
    assert len(wholes["pretrain with memory"].head.outputs) == 2 and wholes["pretrain with memory"].detached
    assert len(wholes["finetune"].head.outputs) == 1 and not wholes["finetune"].detached
    assert wholes["supervised"].head is None and wholes["distill"].head is None
    assert make_task("pretrain with memory", lineareval_while_pretraining=False).model.supervised_head is None
    assert len(make_task("finetune", ft_proj_selector=-1).model.head.outputs) == 2
    assert make_task("finetune", ft_proj_selector=0).model.head is None


def views_of(name, count=40, **changes):
    """[count, 16, 16, 3]: the first view of one image under the task's transform, by seeds."""
    task = make_task(name, **changes)
    image = tf.constant(np.random.default_rng(0).integers(0, 256, [24, 24, 3], np.uint8))
    view = next(iter(task.views.values()))
    seeds = tf.data.Dataset.range(count).map(lambda i: view(image, tf.stack([tf.cast(i, tf.int32), 3])))
    return np.stack(list(seeds.as_numpy_iterator()))


@pytest.mark.parametrize("policy", ["autoaugment", "randaugment"])
def test_a_policy_follows_crop_and_flip(policy):
    plain, augmented = views_of("supervised"), views_of("supervised", augment_policy=policy)
    assert plain.shape == augmented.shape and augmented.min() >= 0 and augmented.max() <= 1
    assert np.mean(np.abs(plain - augmented).max(axis=(1, 2, 3)) > 0.05) > 0.5


def test_randaugment_takes_its_layers_and_magnitude():
    weak = views_of("supervised", augment_policy="randaugment", randaugment_layers=1, randaugment_magnitude=1.0)
    strong = views_of("supervised", augment_policy="randaugment", randaugment_layers=4, randaugment_magnitude=10.0)
    plain = views_of("supervised", augment_policy="none")
    assert np.abs(weak - plain).mean() < np.abs(strong - plain).mean()


@pytest.mark.parametrize("more", [dict(color_operators="broad"), dict(sobel_probability=0.5)])
def test_appendix_gs_operators_change_half_of_the_views_of_pretraining(more):
    plain = dict(grayscale_probability=0.0, use_blur=False)
    differences = np.abs(
        views_of("pretrain with memory", 200, **plain, **more) - views_of("pretrain with memory", 200, **plain)
    )
    assert 0.25 < np.mean(differences.max(axis=(1, 2, 3)) > 0.02) < 0.65


def test_labels_are_smoothed_where_asked():
    batch, smoothed = make_batch(), make_task("supervised", label_smoothing=0.3)
    logits = smoothed.model(batch["image"], training=True).logits
    expected = np.sum(objective.supervised(logits, LABELS, 0.3)[0]) / np.sum(LABELS >= 0)
    assert error(smoothed.loss(batch)[1]["supervised_loss"], expected) < 1e-5
    assert error(make_task("supervised").loss(batch)[1]["supervised_loss"], expected) > 1e-3
