"""Trees of tokens in a graph, to be walked down character by character."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

CODE_POINT_BITS = 21


def token_trees(*groups: Mapping[str, int]) -> tuple[tf.Tensor, tf.lookup.StaticHashTable]:
    """A tree for each group of tokens with their ids; its root is the node of the group's number.

    Returns:
        The id of the token that ends at each node, int64, -1 where none does; and the table of children, from
        (node << CODE_POINT_BITS | code point) to node, -1 where there is none.
    """
    children: dict[int, int] = {}
    token_of = [-1] * len(groups)
    for root, tokens in enumerate(groups):
        for token, index in tokens.items():
            node = root
            for character in token:
                key = node << CODE_POINT_BITS | ord(character)
                child = children.get(key)
                if child is None:
                    child = children[key] = len(token_of)
                    token_of.append(-1)
                node = child
            if token:
                token_of[node] = index
    children = children or {-1: 0}  # a table must not be empty
    keys = tf.constant(np.fromiter(children, np.int64, len(children)))
    values = tf.constant(np.fromiter(children.values(), np.int64, len(children)))
    table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, values), default_value=-1)
    return tf.constant(token_of, tf.int64), table
