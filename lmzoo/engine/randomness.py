"""Random numbers of each replica's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras
import tensorflow as tf


@contextlib.contextmanager
def own_randomness(model: keras.Model) -> Iterator[None]:
    """Lets each of several replicas draw random numbers of its own from the model's seed generators; in a replica.

    Keras mirrors the states of seed generators, so that all replicas would drop the same units. A state is [seed,
    counter]: inside, the seed is that of (seed, number of the replica); afterwards it is what it was, and the counter
    has moved on. So the states are the same on all replicas between steps, and a checkpoint holds one.
    """
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        yield
        return
    states = [variable for variable in model.variables if variable.name == "seed_generator_state"]
    before = [tf.convert_to_tensor(state) for state in states]
    for state, value in zip(states, before, strict=True):
        seed = tf.stack([tf.cast(value[0], tf.int64), tf.cast(context.replica_id_in_sync_group, tf.int64)])
        mixed = tf.random.stateless_uniform([], seed, minval=None, maxval=None, dtype=value.dtype)
        state.assign(tf.stack([mixed, value[1]]))
    yield
    for state, value in zip(states, before, strict=True):
        state.assign(tf.stack([value[0], tf.convert_to_tensor(state)[1]]))
