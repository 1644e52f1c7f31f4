"""Numbers of a request that a model could not work with end it with an error, and never the server."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

Tensor = Any


def checked_ids(ids: Tensor, size: int) -> Tensor:
    """Ids as they are. Outside of [0, size) they are an InvalidArgument error, which says which and where.

    It is the lookup in a table that checks on every device, which needs no string, unlike an assertion.
    """
    with tf.device("CPU:0"):
        return tf.gather(tf.range(size), ids)


def with_room(token_ids: Tensor, used: Tensor, size: int) -> Tensor:
    """Ids [B, T] as they are; an InvalidArgument error if `used`, a scalar or [B], exceeds `size` anywhere.

    The ids wait for the check by adding 0 from it, as control dependencies on what has no effect are optimised away.
    """
    nothing = tf.minimum(checked_ids(used, size + 1), 0)
    return token_ids + tf.reshape(nothing, [-1, 1])
