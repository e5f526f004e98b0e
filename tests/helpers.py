"""What the tests of the numbers share: values split over replicas and back, and weights."""

import numpy as np
import tensorflow as tf


def split(strategy, batch):
    """`batch`, an array or a dict of arrays, as what each replica gets: consecutive parts."""
    replicas = strategy.num_replicas_in_sync

    def part(index):
        return tf.nest.map_structure(lambda x: tf.constant(np.split(x, replicas)[index]), batch)

    if replicas == 1:
        return part(0)
    return strategy.experimental_distribute_values_from_function(lambda context: part(context.replica_id_in_sync_group))


def per_replica(strategy, value):
    """What each replica holds of `value`, as arrays."""
    return [np.asarray(local) for local in strategy.experimental_local_results(value)]


def run(strategy, function, *inputs):
    """The results of `function` on every replica, as a compiled step would have them."""
    return tf.function(lambda *args: strategy.run(function, args), autograph=False)(*inputs)


def randomize(variables, seed=0):
    """Gives every weight a value of its own: no scale stays at 0 or 1, no variance below 1."""
    rng = np.random.default_rng(seed)
    for variable in variables:
        noise = rng.standard_normal(variable.shape).astype(np.float32)
        if variable.name == "kernel":
            noise *= np.sqrt(2.0 / np.prod(variable.shape[:-1]))
        variable.assign({"gamma": 1 + 0.1 * noise, "moving_variance": 1 + np.abs(noise)}.get(variable.name, noise))
