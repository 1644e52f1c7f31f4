"""Token cross-entropy straight from hidden states, without the logits of all tokens in memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

Tensor = Any

# A chunk's logits should be wide enough to keep the matrix units busy and small enough to be forgotten quickly. Each
# chunk also adds once to the gradient of the table, V * D numbers, so chunks much shorter than D cost more than they
# save. Measured by tests/benchmarks/loss.py.
_MIN_CHUNK_TOKENS = 256
_MAX_CHUNK_TOKENS = 1024
_MAX_CHUNKS = 32
_TABLE_BLOCK_BYTES = 32 * 2**20


class TokenLossSums(NamedTuple):
    """Weighted sums over tokens, float32 scalars: divide them to get means, add them to join batches.

    Attributes:
        loss: sum of weight * loss. The only one with a gradient.
        weight: sum of weights.
        correct: sum of the weights of tokens whose label has the highest logit. In training a label that ties with
            another token counts as well, since finding the first of them would cost a pass over all logits.
    """

    loss: Tensor
    weight: Tensor
    correct: Tensor


def token_cross_entropy(
    hidden: Tensor,
    table: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    training: bool = False,
    chunk_tokens: int | None = None,
) -> TokenLossSums:
    """Cross-entropy of `softmax(hidden @ table.T + bias)` against `labels`, a chunk of tokens at a time.

    Logits exist for one chunk only, in the forward and in the backward pass. In training the gradient is formed along
    with the loss, from the same logits: three matrix products in all, as with plain logits. Outside training a
    gradient is still right, but computes the logits a second time.

    Shapes:
        hidden [..., D], table [V, D], bias [V], labels and weights [...] as the leading shape of hidden.

    Args:
        hidden: final hidden states; their dtype is that of the matrix products. Sums are float32.
        labels: int32 token ids in [0, V); any value where the weight is 0.
        weights: float32, 0 where a label does not count.
        label_smoothing: epsilon in [0, 1): the target is (1 - epsilon) * label + epsilon / V.
        z_loss: factor of log(Z) ** 2, which keeps the normaliser Z near 1.
        training: form the gradient in the forward pass.
        chunk_tokens: tokens a chunk, or more where that would make too many chunks; None chooses by D.

    Reference:
        Szegedy et al. 2016 (label smoothing), section 7; Chowdhery et al. 2022 (z-loss), section 5.
    """
    model_dim = table.shape[-1]
    hidden = tf.reshape(hidden, (-1, model_dim))  # [K, D]
    labels = tf.reshape(tf.cast(labels, tf.int32), (-1,))  # [K]
    weights = tf.reshape(tf.cast(weights, tf.float32), (-1,))  # [K]
    labels = tf.where(tf.equal(weights, 0.0), 0, labels)  # A look-up of -100 would fail, or worse, not fail.
    settings = _Settings(label_smoothing, z_loss, chunk_tokens or longest_chunk(model_dim))

    @tf.custom_gradient
    def weighted_loss(hidden: Tensor, table: Tensor, *bias: Tensor) -> Any:
        inputs = (hidden, table, bias[0] if bias else None)
        sums = _chunked_sums(*inputs, labels, weights, settings, gradients=training, exact_accuracy=not training)

        def gradient(upstream: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
            result = sums
            if not training:
                result = _chunked_sums(*inputs, labels, weights, settings, gradients=True, exact_accuracy=False)
            parts = zip((hidden, table, *bias), result.gradients, strict=True)
            return tuple(tf.cast(part * upstream, tensor.dtype) for tensor, part in parts)

        return (sums.loss, sums.correct), gradient

    loss, correct = weighted_loss(
        hidden, tf.convert_to_tensor(table), *(() if bias is None else (tf.convert_to_tensor(bias),))
    )
    return TokenLossSums(loss=loss, weight=tf.reduce_sum(weights), correct=correct)


class _Settings(NamedTuple):
    label_smoothing: float
    z_loss: float
    chunk_tokens: int


class _Sums(NamedTuple):
    loss: Tensor
    correct: Tensor
    gradients: tuple[Tensor, ...]  # of hidden [K, D], table [V, D] and bias [V]; empty if not asked for


def _chunked_sums(
    hidden: Tensor,
    table: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    settings: _Settings,
    *,
    gradients: bool,
    exact_accuracy: bool,
) -> _Sums:
    """Runs over all tokens, C chunks of them one after the other.

    With p the softmax of the logits, the gradient of a token's loss by its logits is
    factor * p - weight * ((1 - epsilon) * onehot(label) + epsilon / V). The last term needs no logits, and neither do
    the factors: they are applied to hidden states, V / D times fewer numbers.

    The chunks are unrolled rather than a `while_loop`: a loop keeps a copy of everything it carries, here the gradient
    of the table, and runs ahead with several chunks at once.
    """
    vocab_size, model_dim = table.shape
    epsilon, z_loss, chunk_tokens = settings
    num_tokens = hidden.shape[0]
    if num_tokens is None:
        num_tokens = tf.shape(hidden)[0]
        num_chunks = 8
        chunk_tokens = (num_tokens + num_chunks - 1) // num_chunks
    else:  # Even chunks, so that at most a few padding tokens are needed.
        num_chunks, chunk_tokens = cut_tokens(num_tokens, chunk_tokens)
    missing = num_chunks * chunk_tokens - num_tokens
    if not (isinstance(missing, int) and missing == 0):
        hidden = tf.pad(hidden, ((0, missing), (0, 0)))
        labels, weights = tf.pad(labels, ((0, missing),)), tf.pad(weights, ((0, missing),))
    chunks = [tf.split(tensor, num_chunks) for tensor in (hidden, labels, weights)]  # C of [K / C, ...] each
    blocks = table_blocks(vocab_size, model_dim)

    loss, correct = tf.zeros(()), tf.zeros(())
    hidden_gradients: list[Tensor] = []
    table_gradients: list[Tensor] = []
    bias_gradient = tf.zeros((vocab_size,))
    for chunk_hidden, chunk_labels, chunk_weights in zip(*chunks, strict=True):
        chunk_hidden = _after([loss, *hidden_gradients[-1:], *table_gradients], chunk_hidden)
        logits = tf.cast(tf.matmul(chunk_hidden, table, transpose_b=True), tf.float32)  # [K / C, V]
        if bias is not None:
            logits = logits + tf.cast(bias, tf.float32)
        probabilities = tf.nn.softmax(logits)  # [K / C, V]
        # log Z from the largest probability, which is at least 1 / V: two reductions, where exp and sum cost more.
        highest = tf.reduce_max(logits, axis=1)
        log_z = highest - tf.math.log(tf.reduce_max(probabilities, axis=1))  # [K / C]
        label_logits = tf.gather(logits, chunk_labels, axis=1, batch_dims=1)
        losses = log_z - (1.0 - epsilon) * label_logits
        if z_loss:
            losses += z_loss * tf.square(log_z)
        loss += tf.reduce_sum(chunk_weights * losses)
        hits = tf.equal(label_logits, highest)
        if exact_accuracy:
            hits = tf.equal(tf.argmax(logits, axis=1, output_type=tf.int32), chunk_labels)
        correct += tf.reduce_sum(chunk_weights * tf.cast(hits, tf.float32))
        if gradients:
            factor = chunk_weights * (1.0 + 2.0 * z_loss * log_z)  # [K / C]
            label_weights = (1.0 - epsilon) * chunk_weights
            scaled_hidden = tf.cast(tf.expand_dims(factor, 1) * tf.cast(chunk_hidden, tf.float32), hidden.dtype)
            products = tf.cast(probabilities, hidden.dtype)
            by_hidden = tf.cast(tf.matmul(products, table), tf.float32) * tf.expand_dims(factor, 1)
            label_rows = tf.cast(tf.gather(table, chunk_labels), tf.float32)
            hidden_gradients.append(by_hidden - tf.expand_dims(label_weights, 1) * label_rows)
            table_gradients = _add_products(table_gradients, products, scaled_hidden, blocks)
            if bias is not None:
                bias_gradient += tf.linalg.matvec(probabilities, factor, transpose_a=True)

    # What needs no logits is added once, for all tokens.
    hidden, table = tf.cast(hidden, tf.float32), tf.cast(table, tf.float32)
    if epsilon:
        mean_row = tf.reduce_mean(table, axis=0)  # [D]
        mean_logits = tf.linalg.matvec(hidden, mean_row)
        if bias is not None:
            mean_logits += tf.reduce_mean(tf.cast(bias, tf.float32))
        loss -= epsilon * tf.reduce_sum(weights * mean_logits)
    if not gradients:
        return _Sums(loss, correct, ())
    label_weights = (1.0 - epsilon) * weights
    hidden_gradient = tf.concat(hidden_gradients, axis=0)[:num_tokens]
    table_gradient = tf.tensor_scatter_nd_sub(
        tf.concat(table_gradients, axis=0), tf.expand_dims(labels, 1), tf.expand_dims(label_weights, 1) * hidden
    )
    bias_gradient -= tf.math.unsorted_segment_sum(label_weights, labels, vocab_size)
    if epsilon:
        smoothed = (epsilon / vocab_size) * weights
        hidden_gradient -= (tf.expand_dims(epsilon * weights, 1) * mean_row)[:num_tokens]
        table_gradient -= tf.linalg.matvec(hidden, smoothed, transpose_a=True)
        bias_gradient -= tf.reduce_sum(smoothed)
    return _Sums(loss, correct, (hidden_gradient, table_gradient, bias_gradient)[: 2 if bias is None else 3])


def _add_products(
    totals: list[Tensor], products: Tensor, hidden: Tensor, blocks: list[tuple[int, int]]
) -> list[Tensor]:
    """`totals` plus the rows of `products.T @ hidden`, block by block, so that one block at a time is in memory.

    Shapes:
        products [K, V], hidden [K, D]; a total is [V / blocks, D] float32; no totals are zeros.
    """
    sums: list[Tensor] = []
    for number, (start, stop) in enumerate(blocks):
        columns = _after(sums[-1:], products[:, start:stop])
        block = tf.cast(tf.matmul(columns, hidden, transpose_a=True), tf.float32)
        sums.append(totals[number] + block if totals else block)
    return sums


def _after(before: list[Tensor], tensor: Tensor) -> Tensor:
    """`tensor`, which cannot be computed before all of `before` are: a dependency that XLA keeps, unlike TensorFlow's.

    To each number is added min(|x|, 0), where x is the first number of each of `before`: 0 if they are finite.
    """
    for each in before:
        first = tf.reduce_max(tf.reshape(each, [-1])[:1])  # Minus infinity where there is none.
        tensor = tensor + tf.cast(tf.minimum(tf.abs(first), 0.0), tensor.dtype)
    return tensor


def longest_chunk(model_dim: int) -> int:
    """Tokens that a chunk may have, unless there would be too many chunks."""
    return min(max(model_dim // 3, _MIN_CHUNK_TOKENS), _MAX_CHUNK_TOKENS)


def cut_tokens(num_tokens: int, longest: int) -> tuple[int, int]:
    """How many chunks there are, and how many tokens each has."""
    num_chunks = min(max(1, -(-num_tokens // longest)), _MAX_CHUNKS)
    return num_chunks, -(-num_tokens // num_chunks)


def table_blocks(vocab_size: int, model_dim: int) -> list[tuple[int, int]]:
    """Bounds of the parts of the table whose gradients are summed apart, so that no second table is ever needed."""
    num_blocks = -(-vocab_size * model_dim * 4 // _TABLE_BLOCK_BYTES)
    rows = -(-vocab_size // num_blocks)
    return [(start, min(start + rows, vocab_size)) for start in range(0, vocab_size, rows)]
