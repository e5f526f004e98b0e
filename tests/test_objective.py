"""The losses are the paper's equations: NumPy loops over anchors and candidates, value and gradient, any replicas."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import per_replica, run, split
from parity import error

import objective

TAUS = (0.05, 0.5, 1.0)


def rand(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def unit(z):
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def log_softmax(logits):
    shifted = logits - np.max(logits)
    return shifted - np.log(np.sum(np.exp(shifted)))


def nt_xent_loop(anchors, candidates, tau, first=0, past=()):
    """Eq. 1, one anchor and one candidate at a time: loss, accuracy and entropy [2n], in float64."""
    n, total = len(anchors) // 2, len(candidates) // 2
    rows = []
    for i, anchor in enumerate(anchors):
        view, image = divmod(i, n)
        own, positive = view * total + first + image, (1 - view) * total + first + image
        logits = []
        for j, candidate in enumerate(candidates):
            if j == positive:
                place = len(logits)
            if j != own:
                logits.append(np.dot(anchor, candidate) / tau)
        for key in past:
            logits.append(np.dot(anchor, key) / tau)
        log_p = log_softmax(np.array(logits))
        rows.append((-log_p[place], float(np.argmax(log_p) == place), -np.sum(np.exp(log_p) * log_p)))
    return np.array(rows).T


def numeric_gradient(function, x, step=1e-5):
    """The gradient of a scalar function of float64 `x`, by central differences."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        nudge = np.zeros_like(x)
        nudge[index] = step
        gradient[index] = (function(x + nudge) - function(x - nudge)) / (2 * step)
    return gradient


@pytest.mark.parametrize("hidden_norm", [True, False])
@pytest.mark.parametrize("tau", TAUS)
def test_without_memory_equals_the_double_loop(tau, hidden_norm):
    z = rand(8, 5)
    norm = unit if hidden_norm else np.array
    x = tf.constant(z, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        normed = objective.normalize(x, hidden_norm)
        got = objective.nt_xent(normed, normed, tau)
        total = tf.reduce_sum(got.loss)
    loss, accuracy, entropy = nt_xent_loop(norm(z), norm(z), tau)
    assert error(got.loss, loss) < 1e-4
    np.testing.assert_array_equal(got.accuracy, accuracy)
    np.testing.assert_allclose(got.entropy, entropy, atol=2e-4)
    expected = numeric_gradient(lambda v: np.sum(nt_xent_loop(norm(v), norm(v), tau)[0]), z)
    assert error(tape.gradient(total, x), expected) < 1e-3


@pytest.mark.parametrize("hidden_norm", [True, False])
@pytest.mark.parametrize("tau", TAUS)
def test_with_memory_equals_the_double_loop(tau, hidden_norm):
    z, keys, past = rand(8, 5), rand(8, 5, seed=1), rand(6, 5, seed=2)
    norm = unit if hidden_norm else np.array
    valid = np.array([True, True, False, True, False, False])
    queue = tf.constant(np.where(valid[:, None], norm(past), 100.0), tf.float32)  # what is unfilled must not count
    x = tf.constant(z, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        candidates = objective.normalize(tf.constant(keys), hidden_norm)
        got = objective.nt_xent(objective.normalize(x, hidden_norm), candidates, tau, 0, queue, tf.constant(valid))
        total = tf.reduce_sum(got.loss)

    def loop(v):
        return nt_xent_loop(norm(v), norm(keys), tau, past=norm(past)[valid])

    loss, accuracy, entropy = loop(z)
    assert error(got.loss, loss) < 1e-4
    np.testing.assert_array_equal(got.accuracy, accuracy)
    np.testing.assert_allclose(got.entropy, entropy, atol=2e-4)
    assert error(tape.gradient(total, x), numeric_gradient(lambda v: np.sum(loop(v)[0]), z)) < 1e-3


def whole_matrix(anchors, candidates, tau, first, queue, valid):
    """Eq. 1 on the whole matrix of logits, for TensorFlow to differentiate: loss, accuracy and entropy."""
    n, total = len(anchors) // 2, len(candidates) // 2
    images = first + np.arange(n)
    own, positive = np.concatenate([images, images + total]), np.concatenate([images + total, images])
    logits = tf.concat([tf.matmul(anchors, keys, transpose_b=True) / tau for keys in (candidates, queue)], axis=1)
    counts = np.tile(np.concatenate([np.ones(2 * total, bool), valid]), [2 * n, 1])
    counts[np.arange(2 * n), own] = False
    log_p = tf.nn.log_softmax(tf.where(counts, logits, -1e9))
    accuracy = np.argmax(log_p, axis=1) == positive
    return -tf.gather(log_p, positive, batch_dims=1), accuracy, -tf.reduce_sum(tf.exp(log_p) * log_p, axis=1)


def value_and_gradients(function, anchors, candidates, *more):
    """Loss, accuracy and entropy, and the gradients of an uneven sum of the losses."""
    with tf.GradientTape() as tape:
        tape.watch([anchors, candidates])
        loss, accuracy, entropy = function(anchors, candidates, *more)
        total = tf.reduce_sum(loss * np.linspace(-1, 2, anchors.shape[0], dtype=np.float32))
    return loss, accuracy, entropy, *tape.gradient(total, [anchors, candidates])


@pytest.mark.parametrize("compiled", [None, False, True], ids=["eager", "graph", "xla"])
@pytest.mark.parametrize("keys", [0, 13])
def test_blocks_of_any_size_give_the_value_and_the_gradient_of_the_whole_matrix(keys, compiled):
    """Some blocks are not full; the queue is filled in part, and what is in its other slots does not count."""
    valid = np.arange(keys) < 8
    queue = np.where(valid[:, None], unit(rand(keys, 6, seed=2)), 100.0).astype(np.float32)
    anchors, candidates = rand(10, 6), rand(16, 6, seed=1)
    candidates[[*range(10, 15), *range(2, 7)]] += 0.8 * anchors  # the positives
    tensors = [tf.constant(unit(z), tf.float32) for z in (anchors, candidates)]
    more = (0.2, 2, tf.constant(queue), tf.constant(valid))
    expected = value_and_gradients(whole_matrix, *tensors, *more)
    assert 0 < np.mean(expected[1]) < 1
    for block in (1, 3, 5, 10, 100) if compiled is None else (3,):

        def in_blocks(*tensors, block=block):
            return value_and_gradients(objective.nt_xent, *tensors, *more, block)

        function = in_blocks if compiled is None else tf.function(in_blocks, autograph=False, jit_compile=compiled)
        for got, value in zip(function(*tensors), expected, strict=True):
            np.testing.assert_allclose(got, value, rtol=0, atol=1e-5)


def test_the_number_of_rows_need_not_be_known_beforehand():
    rows = tf.TensorSpec([None, 6], tf.float32)
    z, keys, queue = (tf.constant(unit(rand(count, 6, seed=count)), tf.float32) for count in (8, 10, 7))
    for block in (0, 3):

        def loss(z, keys, queue, block=block):
            return objective.nt_xent(z, keys, 0.2, 1, queue, tf.ones(tf.shape(queue)[:1], tf.bool), block)

        compiled = tf.function(loss, [rows] * 3, autograph=False)
        for got, expected in zip(compiled(z, keys, queue), loss(z, keys, queue), strict=True):
            assert error(got, expected) < 1e-5


@pytest.mark.parametrize("keys", [0, 500])
def test_no_tensor_is_larger_than_the_logits_of_a_block(keys):
    """Neither in the forward nor in the backward pass."""
    past = (tf.zeros([keys, 4]), tf.ones([keys], tf.bool))

    @tf.function(autograph=False)
    def step(anchors, candidates):
        return value_and_gradients(objective.nt_xent, anchors, candidates, 0.2, 0, *past, 8)

    graph = step.get_concrete_function(tf.zeros([64, 4]), tf.zeros([100, 4])).graph.as_graph_def(add_shapes=True)
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    shapes = [[side.size for side in shape.dim] for node in nodes for shape in node.attr["_output_shapes"].list.shape]
    assert [8, 100 + keys] in shapes and all(min(shape, default=0) >= 0 for shape in shapes)
    assert max(np.prod(shape) for shape in shapes) == 8 * (100 + keys)


def test_a_block_takes_as_many_rows_as_fit():
    assert objective.blocks_of(10, 7, 4) == (3, 4)
    assert objective.blocks_of(9, 7, 4) == (3, 3)
    assert objective.blocks_of(10, 7, 100) == (1, 10)
    assert objective.blocks_of(512, 1024) == (1, 512)
    for rows, columns in ((8192, 73728), (8192, 10**9), (1, 10**9)):
        blocks, in_block = objective.blocks_of(rows, columns)
        assert (blocks - 1) * in_block < rows <= blocks * in_block
        assert in_block == 1 or 0.9 < in_block * columns * 4 / objective.BLOCK_BYTES < 1.1


def test_accuracy_is_one_only_where_the_positive_wins():
    z = tf.constant([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [1.0, 0.5]])  # the last is nearest to the other image's view
    z = objective.normalize(z)
    np.testing.assert_array_equal(objective.nt_xent(z, z, 0.1).accuracy, [1, 1, 1, 0])


def test_the_metrics_have_no_gradient():
    x = tf.constant(rand(6, 4), tf.float32)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        got = objective.nt_xent(x, x, 1.0)
    assert tape.gradient(got.accuracy, x) is None
    entropy = tape.gradient(got.entropy, x)
    assert entropy is None or not np.any(entropy)


@pytest.mark.parametrize("first", [0, 2, 4])
def test_anchors_from_the_middle_of_the_global_batch(first):
    z, past = unit(rand(12, 5)), unit(rand(3, 5, seed=1))
    local = np.concatenate([z[:6][first : first + 2], z[6:][first : first + 2]])
    tensors = [tf.constant(a, tf.float32) for a in (local, z)]
    memory = tf.constant(past, tf.float32), tf.ones([3], tf.bool)
    loss, accuracy, entropy = nt_xent_loop(local, z, 0.3, first, past)
    got = objective.nt_xent(*tensors, 0.3, tf.constant(first), *memory)
    assert error(got.loss, loss) < 1e-5
    assert error(got.entropy, entropy) < 1e-5
    np.testing.assert_array_equal(got.accuracy, accuracy)
    whole = objective.nt_xent(tensors[1], tensors[1], 0.3, 0, *memory)
    np.testing.assert_allclose(got.loss, tf.gather(whole.loss, [first, first + 1, 6 + first, 7 + first]), rtol=1e-5)


@pytest.mark.parametrize("tau", TAUS)
def test_equals_keras_cv(tau):
    """Its loss adds those of an image's two anchors, same-view negatives included, and takes the mean over images."""
    losses = pytest.importorskip("keras_cv.losses", reason="keras_cv does not import here")
    z = rand(10, 6).astype(np.float32)
    expected = losses.SimCLRLoss(tau)(z[:5], z[5:])
    normed = objective.normalize(tf.constant(z))
    assert error(2 * tf.reduce_mean(objective.nt_xent(normed, normed, tau).loss), expected) < 1e-5


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("replicas", [2, 4])
def test_replicas_add_up_to_one(mirrored, replicas, memory):
    views = {name: rand(8, 6) + 0.7 * rand(8, 6, seed=1 + i) for i, name in enumerate(("z_1", "z_2", "key_1", "key_2"))}
    batch = {name: view.astype(np.float32) for name, view in views.items()}
    past = objective.normalize(tf.constant(rand(5, 6, seed=9)))

    def share(batch):
        context = tf.distribute.get_replica_context()
        views = [batch["z_1"], batch["z_2"]]
        with tf.GradientTape() as tape:
            tape.watch(views)
            z = objective.normalize(tf.concat(views, axis=0))
            keys = objective.normalize(tf.concat([batch["key_1"], batch["key_2"]], axis=0)) if memory else z
            first = tf.shape(views[0])[0] * context.replica_id_in_sync_group
            queue = (past, tf.range(5) < 3) if memory else (None, None)
            # One replica computes the loss in uneven blocks, several compute that of their anchors as a whole.
            block = 3 if context.num_replicas_in_sync == 1 else 0
            got = objective.nt_xent(z, objective.gather_views(keys), 0.2, first, *queue, block)
            loss = tf.reduce_sum(got.loss) / 16
        return loss, *tape.gradient(loss, views), *tf.split(got.accuracy, 2), *tf.split(got.entropy, 2)

    results = {}
    for count in (1, replicas):
        strategy = mirrored(count)
        results[count] = [per_replica(strategy, r) for r in run(strategy, share, split(strategy, batch))]
    one, several = results[1], results[replicas]
    assert error(np.sum(several[0]), one[0][0]) < 1e-5
    assert 0 < np.mean(one[3][0]) < 1
    for result, expected in zip(several[1:], one[1:], strict=True):
        assert error(np.concatenate(result), expected[0]) < 1e-5


@pytest.mark.parametrize("tau", (0.5, 1.0, 4.0))
def test_distillation_is_equation_2(tau):
    student, teacher = rand(4, 3), 3 * rand(4, 3, seed=1)
    xs = tf.constant(student, tf.float32), tf.constant(teacher, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(xs)
        got = objective.distillation(*xs, tau)
        total = tf.reduce_sum(got)
    to_student, to_teacher = tape.gradient(total, xs)

    def equation(s):
        pairs = zip(s, teacher, strict=True)
        return np.array([-np.sum(np.exp(log_softmax(t / tau)) * log_softmax(r / tau)) for r, t in pairs])

    assert error(got, equation(student)) < 1e-5
    assert error(to_student, numeric_gradient(lambda s: np.sum(equation(s)), student)) < 1e-4
    assert to_teacher is None


def test_supervised_leaves_out_the_unlabelled():
    logits, labels = rand(6, 4), np.array([0, -1, 3, 1, -1, 2], np.int32)
    labels[2] = np.argmax(logits[2])
    labels[3] = np.argmin(logits[3])
    x = tf.constant(logits, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss, correct = objective.supervised(x, tf.constant(labels))
        total = tf.reduce_sum(loss)
    expected = [0.0 if y < 0 else -log_softmax(row)[y] for row, y in zip(logits, labels, strict=True)]
    assert error(loss, expected) < 1e-5
    np.testing.assert_array_equal(correct, (np.argmax(logits, axis=1) == labels).astype(np.float32))
    assert correct[2] == 1 and correct[3] == 0
    gradient = np.array(
        [(y >= 0) * (np.exp(log_softmax(r)) - np.eye(4)[y]) for r, y in zip(logits, labels, strict=True)]
    )
    assert error(tape.gradient(total, x), gradient) < 1e-5


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_label_smoothing_spreads_a_share_of_each_label_over_all_classes(smoothing):
    logits, labels = rand(6, 4), np.array([0, -1, 3, 1, -1, 2], np.int32)
    loss, correct = objective.supervised(tf.constant(logits, tf.float32), tf.constant(labels), smoothing)
    expected = []
    for row, y in zip(logits, labels, strict=True):
        target = smoothing / 4 + (1 - smoothing) * np.eye(4)[y]
        expected.append(0.0 if y < 0 else -np.sum(target * log_softmax(row)))
    assert error(loss, expected) < 1e-5
    np.testing.assert_array_equal(correct, objective.supervised(tf.constant(logits, tf.float32), labels)[1])


def test_weight_decay_counts_ranks_above_one():
    values = [rand(3, 4), rand(3), rand(2, 2, 3, 4), np.float64(7.0)]
    variables = [keras.Variable(value) for value in values]
    expected = 0.1 * 0.5 * (np.sum(values[0] ** 2) + np.sum(values[2] ** 2))
    assert error(objective.weight_decay_loss(variables, 0.1), expected) < 1e-5
    assert float(objective.weight_decay_loss([variables[1], variables[3]], 0.1)) == 0.0
    half = objective.weight_decay_loss([tf.Variable(values[0], dtype=tf.float16)], 0.1)
    assert half.dtype == tf.float32


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_half_precision_inputs_give_float32_losses(dtype):
    z, other = (tf.cast(rand(8, 5, seed=seed), dtype) for seed in (0, 1))
    labels = tf.constant([0, 1, 2, 3, 4, -1, 0, 1])

    def losses(z, other):
        normed = objective.normalize(z)
        supervised = objective.supervised(z, labels)
        return *objective.nt_xent(normed, normed, 0.1), objective.distillation(z, other, 2.0), *supervised

    exact = losses(tf.cast(z, tf.float32), tf.cast(other, tf.float32))  # the same values, no rounding on the way
    for got, expected in zip(losses(z, other), exact, strict=True):
        assert got.dtype == tf.float32
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("replicas", "held"), [(2, 5), *(pytest.param(*given, marks=pytest.mark.slow) for given in ((2, 0), (4, 24)))]
)
def test_a_queue_in_shards_gives_the_loss_of_the_whole_queue(mirrored, replicas, held):
    """Value, metrics and the gradients to anchors and candidates; the queue is empty, partly filled or full."""
    rng = np.random.default_rng(held)
    z, keys, queue = (rng.standard_normal([rows, 6]).astype(np.float32) for rows in (16, 16, 24))
    keys += 2 * np.roll(z, 8, axis=0)  # most positives are the highest
    queue[3] = 9 * z[2]  # a past key that beats the positive
    valid = np.arange(24) < held
    weights = rng.random(16).astype(np.float32)

    def results(anchors, candidates, weights, first, **past):
        with tf.GradientTape() as tape:
            tape.watch([anchors, candidates])
            found = objective.nt_xent(anchors, candidates, 0.5, first, block=3, **past)
            loss = tf.reduce_sum(found.loss * weights)
        return [*found, *tape.gradient(loss, [anchors, candidates])]

    alone = results(
        tf.constant(z), tf.constant(keys), tf.constant(weights), 0, queue=tf.constant(queue), queue_valid=valid
    )

    def of_replica(part):
        n = part["z"].shape[0]
        anchors, weights = tf.reshape(part["z"], [-1, 6]), tf.reshape(part["weights"], [-1])
        first = n * tf.distribute.get_replica_context().replica_id_in_sync_group
        past = {"queue": part["queue"], "queue_valid": part["valid"], "sharded": True}
        by_view = tf.reshape(tf.transpose(tf.reshape(anchors, [n, 2, 6]), [1, 0, 2]), [-1, 6])
        by_view_weights = tf.reshape(tf.transpose(tf.reshape(weights, [n, 2])), [-1])
        return results(by_view, tf.constant(keys), by_view_weights, first, **past)

    order = np.concatenate([np.arange(replica, 24, replicas) for replica in range(replicas)])
    by_image = {"z": z.reshape(2, 8, 6).transpose(1, 0, 2), "weights": weights.reshape(2, 8).T}
    batch = split(mirrored(replicas), {**by_image, "queue": queue[order], "valid": valid[order]})
    several = [per_replica(mirrored(replicas), part) for part in run(mirrored(replicas), of_replica, batch)]
    for name, expected, parts in zip(("loss", "accuracy", "entropy", "to anchors"), alone, several, strict=False):
        halves = [np.split(part, 2) for part in parts]
        whole = np.concatenate([half[view] for view in (0, 1) for half in halves])
        np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(np.sum(several[4], axis=0), alone[4], rtol=1e-5, atol=1e-5)
    assert 0 < np.sum(alone[1]) < 16 and (alone[1][2] == 0 or held == 0)
