"""Loss and gradients of 8 x 512 tokens over a vocabulary of 50,257, 768 wide: chunked against plain logits.

Memory is what the step adds: the most that the process holds while it runs, less what it held before.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

from harness import main, resident_mb, time_calls

TOKENS, WIDTH, VOCAB = 8 * 512, 768, 50257


def measure(loss_of: Callable[[Any, Any, Any, Any], Any]) -> dict[str, float]:
    import tensorflow as tf

    hidden = tf.random.stateless_normal((TOKENS, WIDTH), seed=(0, 1))
    table = tf.Variable(tf.random.stateless_normal((VOCAB, WIDTH), seed=(0, 2)) * 0.02)
    labels = tf.random.stateless_uniform((TOKENS,), (0, 3), 0, VOCAB, tf.int32)
    weights = tf.ones((TOKENS,))

    @tf.function
    def step() -> Any:
        with tf.GradientTape() as tape:
            tape.watch(hidden)
            loss = loss_of(hidden, tf.convert_to_tensor(table), labels, weights)
        return loss, tape.gradient(loss, [hidden, table])

    tf.matmul(tf.ones((512, 512)), tf.ones((512, 512)))  # What the first product sets up is nobody's.
    before, peak, done = resident_mb(), [0.0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident_mb())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    seconds = time_calls(step, warmup=1, calls=3)
    done.set()
    watcher.join()
    return {"ms": 1000 * seconds, "added MB": peak[0] - before, "loss": float(step()[0]) / TOKENS}


def plain(hidden: Any, table: Any, labels: Any, weights: Any) -> Any:
    import tensorflow as tf

    logits = tf.matmul(hidden, table, transpose_b=True)
    return tf.reduce_sum(weights * tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))


def chunked(chunk_tokens: int | None, hidden: Any, table: Any, labels: Any, weights: Any) -> Any:
    from lmzoo.layers import token_cross_entropy

    return token_cross_entropy(hidden, table, labels, weights, training=True, chunk_tokens=chunk_tokens).loss


if __name__ == "__main__":
    main(
        {
            "plain": lambda: measure(plain),
            "chunked": lambda: measure(functools.partial(chunked, None)),
            "chunked 256": lambda: measure(functools.partial(chunked, 256)),
            "chunked 512": lambda: measure(functools.partial(chunked, 512)),
            "chunked 1024": lambda: measure(functools.partial(chunked, 1024)),
        },
        __doc__,
        ["ms", "added MB", "loss"],
    )
