"""What several replicas have to agree on: sums over all of them, the gradient norm, clipping, finiteness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

# What every replica knows after the reduction: name -> (sum of weighted values, sum of weights).
Sums = dict[str, tuple[tf.Tensor, tf.Tensor]]


def all_reduce_sum(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Adds up each tensor over all replicas of all workers, in one batch; called inside a replica.

    Args:
        tensors: dense tensors, of the same shapes on every replica.

    Returns:
        The sums, the same on every replica.
    """
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return list(tensors)
    return list(context.all_reduce(tf.distribute.ReduceOp.SUM, list(tensors)))


def dense(gradient: tf.Tensor | tf.IndexedSlices | None) -> tf.Tensor | None:
    """Returns a gradient as a dense float32 (or float64) tensor; None stays None.

    An embedding's gradient arrives as (rows, values). Rows differ between replicas, so they could only be gathered,
    which XLA refuses on GPUs; and clipping needs the sum over repeated rows, not the rows.
    """
    if gradient is None:
        return None
    gradient = tf.convert_to_tensor(gradient)
    return gradient if gradient.dtype == tf.float64 else tf.cast(gradient, tf.float32)


def global_norm(gradients: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns the L2 norm over all gradients together, a float32 scalar.

    It is not finite if any element is not, or if the squares overflow (a norm above 1.8e19).
    """
    squares = [tf.cast(2.0 * tf.nn.l2_loss(gradient), tf.float32) for gradient in gradients]
    return tf.sqrt(tf.add_n(squares))


def clip(
    gradients: Sequence[tf.Tensor],
    norm: tf.Tensor,
    factor: tf.Tensor | float = 1.0,
    *,
    global_clipnorm: float | None = None,
    clipnorm: float | None = None,
    clipvalue: float | None = None,
) -> list[tf.Tensor]:
    """Multiplies gradients by `factor`, then clips them as a Keras optimizer with these arguments would.

    Args:
        gradients: dense gradients, reduced over all replicas.
        norm: scalar, the global norm of the gradients *after* the multiplication.
        factor: what turns the gradients given into those of the mean loss.
        global_clipnorm: largest L2 norm of all gradients together.
        clipnorm: largest L2 norm of each gradient by itself.
        clipvalue: largest absolute value of each element.

    Returns:
        The gradients to apply, in the order given.
    """
    if global_clipnorm:
        factor = factor * (global_clipnorm / tf.maximum(norm, global_clipnorm))
    if not (isinstance(factor, float) and factor == 1.0):
        gradients = [gradient * tf.cast(factor, gradient.dtype) for gradient in gradients]
    if clipnorm:
        gradients = [tf.clip_by_norm(gradient, clipnorm) for gradient in gradients]
    elif clipvalue:
        gradients = [tf.clip_by_value(gradient, -clipvalue, clipvalue) for gradient in gradients]
    return list(gradients)


def pack(sums: Sums, names: Sequence[str]) -> tf.Tensor:
    """Returns the pairs of `names` as one float32 vector [2 * len(names)], so that they travel as one tensor."""
    return tf.stack([tf.cast(tf.reshape(part, []), tf.float32) for name in names for part in sums[name]])


def unpack(vector: tf.Tensor, names: Sequence[str]) -> Sums:
    """Undoes `pack`."""
    parts = tf.unstack(vector, num=2 * len(names))
    return {name: (parts[2 * index], parts[2 * index + 1]) for index, name in enumerate(names)}


def micro_batch(batch: Any, index: tf.Tensor, count: int, *, static: bool = False) -> Any:
    """Returns the `index`-th of `count` nearly equal runs of rows of a batch.

    Shapes: every tensor of `batch` is [B, ...]; the result holds rows floor(index * B / count) up to
        floor((index + 1) * B / count).

    Args:
        batch: nested structure of dense tensors and None.
        index: int32 scalar, 0 to count - 1.
        count: how many micro-batches there are.
        static: whether the number of rows must be a constant, as XLA needs it.

    Raises:
        ValueError: `static`, and B is unknown or not a multiple of `count`.
    """
    first = next(leaf for leaf in keras.tree.flatten(batch) if leaf is not None)
    rows = first.shape[0]
    if rows is not None and rows % count == 0:
        begin, size = index * (rows // count), rows // count
    elif static:
        raise ValueError(
            f"micro_batches={count} with XLA needs a batch whose size is known and a multiple of it, but each replica "
            f"gets {rows or 'an unknown number of'} rows. Batch with drop_remainder=True, and make the global batch a "
            "multiple of micro_batches times the number of replicas."
        )
    else:
        total = tf.shape(first)[0]
        begin = index * total // count
        size = (index + 1) * total // count - begin

    def take(tensor: tf.Tensor | None) -> tf.Tensor | None:
        if tensor is None:
            return None
        return tf.slice(
            tensor,
            tf.concat([[begin], tf.zeros([tensor.shape.rank - 1], tf.int32)], axis=0),
            tf.concat([[size], tf.fill([tensor.shape.rank - 1], -1)], axis=0),
        )

    return keras.tree.map_structure(take, batch)


def weighted_sums(values: tf.Tensor, *weights: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns (sum of weighted values, sum of weights), float32 scalars.

    Shapes: values [B, ...]; each of weights [B], [B, 1] or another leading part of the shape of values, which it is
        spread over.

    Args:
        values: unreduced losses.
        weights: sample weights, masks, or None; they multiply. A value with weight 0 does not count, even if NaN.
    """
    values = tf.cast(values, tf.float32)
    total = tf.ones_like(values)
    for weight in weights:
        if weight is None:
            continue
        weight = tf.cast(weight, tf.float32)
        if weight.shape.rank == values.shape.rank + 1:
            weight = tf.squeeze(weight, axis=-1)
        while weight.shape.rank < values.shape.rank:
            weight = tf.expand_dims(weight, axis=-1)
        total *= weight
    return tf.reduce_sum(tf.math.multiply_no_nan(values, total)), tf.reduce_sum(total)


def unreduced(loss: Any) -> Callable[[Any, Any], tf.Tensor]:
    """Returns `function(labels, outputs) -> losses [B, ...]` for a Keras loss, the name of one, or a function."""
    loss = keras.losses.get(loss)
    function = loss.call if isinstance(loss, keras.losses.Loss) else loss

    def losses(labels: Any, outputs: Any) -> tf.Tensor:
        labels, outputs = tf.convert_to_tensor(labels), tf.cast(outputs, tf.float32)
        if labels.shape.rank == outputs.shape.rank - 1 and outputs.shape[-1] == 1:
            labels = tf.expand_dims(labels, axis=-1)
        return tf.convert_to_tensor(function(labels, outputs))

    return losses
