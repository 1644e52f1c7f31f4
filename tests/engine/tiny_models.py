"""Models of a few weights, defined without anything of lmzoo but the engine."""

import keras
import numpy as np
import tensorflow as tf

from lmzoo.engine.metrics import GlobalMean, Perplexity
from lmzoo.engine.model import ReplicatedModel

VOCABULARY = 11
LENGTH = 4


@keras.saving.register_keras_serializable("tiny")
class TokenModel(ReplicatedModel):
    """An embedding and two Dense layers that guess a token from a token; reports loss, perplexity and accuracy."""

    def __init__(self, dropout_rate=0.0, **kwargs):
        super().__init__(**kwargs)
        self.dropout_rate = dropout_rate
        policy, layers = self.dtype_policy, keras.layers
        table = keras.initializers.RandomNormal(seed=1)
        kernels = [keras.initializers.GlorotUniform(seed=seed) for seed in (2, 3)]
        self.embedding = layers.Embedding(VOCABULARY, 8, embeddings_initializer=table, dtype=policy, name="embedding")
        self.hidden = layers.Dense(16, "tanh", kernel_initializer=kernels[0], dtype=policy, name="hidden")
        self.dropout = layers.Dropout(dropout_rate, seed=4, dtype=policy)
        self.head = layers.Dense(VOCABULARY, kernel_initializer=kernels[1], dtype=policy, name="head")
        self(np.zeros((1, LENGTH), "int32"))

    def call(self, inputs, training=None):
        hidden = self.dropout(self.hidden(self.embedding(inputs)), training=training)
        return tf.cast(self.head(hidden), tf.float32)

    def get_config(self):
        return {**super().get_config(), "dropout_rate": self.dropout_rate}

    def sum_metrics(self):
        return {"loss": [GlobalMean(name="loss"), Perplexity()], "accuracy": GlobalMean(name="accuracy")}

    def compute_sums(self, inputs, labels, weights, training):
        logits = self(inputs, training=training)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        weights = tf.ones_like(losses) if weights is None else weights
        hits = tf.cast(tf.equal(tf.argmax(logits, axis=-1, output_type=labels.dtype), labels), tf.float32)
        total = tf.reduce_sum(weights)
        return {"loss": (tf.reduce_sum(weights * losses), total), "accuracy": (tf.reduce_sum(weights * hits), total)}


class LinearModel(ReplicatedModel):
    """minus x . kernel, so that the gradient of its sum is minus the sum of the rows of x."""

    def __init__(self, dim=2):
        super().__init__()
        self.kernel = self.add_weight(name="kernel", shape=(dim,), initializer="zeros")
        self.built = True

    def call(self, inputs, training=None):
        return -tf.linalg.matvec(inputs, self.kernel)

    def compute_sums(self, inputs, labels, weights, training):
        values = self(inputs)
        weights = tf.ones_like(values) if weights is None else weights
        return {"loss": (tf.reduce_sum(weights * values), tf.reduce_sum(weights))}


def token_data(rows=80, seed=0):
    """Ids, labels that follow from them, and weights: 40% are 0, and those of the first half of the rows are small."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, VOCABULARY, (rows, LENGTH)).astype("int32")
    weights = generator.uniform(0.0, 2.0, (rows, LENGTH)).astype("float32")
    weights[generator.uniform(size=weights.shape) < 0.4] = 0.0
    weights[: rows // 2] *= 0.1
    return ids, ((ids * 3 + 1) % VOCABULARY).astype("int32"), weights


def flat_weights(model):
    """All weights of a model in one vector."""
    return np.concatenate([variable.numpy().ravel() for variable in model.weights])


def mean_loss(model, ids, labels, weights):
    """The weighted mean loss over all tokens at once, in float64."""
    logits = model.predict(ids, verbose=0).astype("float64")
    logits -= logits.max(axis=-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    losses = -np.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]
    return float((losses * weights).sum() / weights.sum())
