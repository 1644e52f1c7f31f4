"""From the scores of a step to the next token of each row: options, filters, and a stateless draw. No state, no loop.

Every row is worked on by itself, and its randomness is a function of its own seed and of the number of the token
alone. So a row gives the same tokens alone, inside a batch, and at any place in the batch.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

import tensorflow as tf

Tensor = Any

# The nucleus is first looked for among this many candidates, in order; few texts need more.
_NUCLEUS_CANDIDATES = 1024
# Scores are 0 for the most likely token; what lies below this cannot be drawn from any vocabulary that fits in memory.
_LOWEST_SCORE = -40.0
# A temperature that arrives as a tensor cannot be refused, so it is brought into this range.
_TEMPERATURE_RANGE = (1e-6, 1e6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen. The defaults draw from the model's own distribution.

    A field that is off (its default, or None) adds nothing to the graph. `temperature`, `top_k`, `top_p`, `min_p` and
    `repetition_penalty` may also be tensors, a scalar or one value a row [B], so that a served request can set them;
    the value of a tensor cannot be refused, so there 0 turns `top_k` and `min_p` off, 1 turns `top_p` and
    `repetition_penalty` off, a penalty that is not above 0 is off too, and other values out of range act as the
    nearest one in range.

    The steps run in the order of Hugging Face transformers: repetition penalty, n-gram blocking, bad words, suppressed
    tokens, minimum length, the forced first token, temperature, top-k, top-p, min-p. Where the rules before the
    temperature leave a row no token at all, they are dropped for that token of that row. Tokens that tie with the last
    one kept are kept too.

    Raises:
        ValueError: a number is outside the range given for its field.

    Reference:
        Nucleus sampling: Holtzman et al. 2020, https://arxiv.org/abs/1904.09751, section 3.1. Min-p: Nguyen et al.
        2024, https://arxiv.org/abs/2407.01082, section 3. Repetition penalty: Keskar et al. 2019 (CTRL),
        https://arxiv.org/abs/1909.05858, section 4.1; as in transformers, a negative score is multiplied by the
        penalty and a positive one divided by it.
    """

    temperature: float = 1.0
    """Divides the logits before the draw, >= 0. 0 takes the most likely token (greedy)."""

    top_k: int | None = None
    """Draw from the k most likely tokens only, >= 1."""

    top_p: float | None = None
    """Draw from the smallest set of tokens whose probabilities sum to at least this, in (0, 1]."""

    min_p: float | None = None
    """Draw from tokens at least this many times as likely as the most likely one, in [0, 1)."""

    repetition_penalty: float | None = None
    """Makes tokens of the prompt and of the text so far less likely, > 0. 1 changes nothing, 1.2 is common."""

    no_repeat_ngram_size: int | None = None
    """Never give a run of this many tokens a second time, >= 1. The prompt counts."""

    min_new_tokens: int = 0
    """Neither the end token nor a stop sequence ends a row before it has this many new tokens, >= 0."""

    stop_sequences: tuple[tuple[int, ...], ...] = ()
    """Runs of token ids, each of which ends its row when the new tokens end in it. The run itself is kept."""

    suppressed_token_ids: tuple[int, ...] = ()
    """Token ids that are never given."""

    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Runs of token ids that are never given whole. One may begin in the prompt."""

    forced_bos_token_id: int | None = None
    """The first new token of every row, such as the language to translate to."""

    def __post_init__(self) -> None:
        for name in ("stop_sequences", "bad_words_ids"):
            runs = tuple(tuple(int(token) for token in run) for run in getattr(self, name))
            object.__setattr__(self, name, runs)
            if any(not run or min(run) < 0 for run in runs):
                raise ValueError(f"{name}={runs}: each must hold one token id or more, all >= 0.")
        object.__setattr__(self, "suppressed_token_ids", tuple(int(token) for token in self.suppressed_token_ids))
        self._require("temperature", _is_finite_and(lambda value: value >= 0), "a finite number >= 0; 0 is greedy")
        self._require("top_k", _is_integer_from(1), "an integer >= 1, or None for off")
        self._require("top_p", _is_finite_and(lambda value: 0 < value <= 1), "in (0, 1], or None for off")
        self._require("min_p", _is_finite_and(lambda value: 0 <= value < 1), "in [0, 1), or None for off")
        self._require("repetition_penalty", _is_finite_and(lambda value: value > 0), "finite and > 0, or None for off")
        self._require("no_repeat_ngram_size", _is_integer_from(1), "an integer >= 1, or None for off")
        self._require("min_new_tokens", _is_integer_from(0), "an integer >= 0")
        self._require("forced_bos_token_id", _is_integer_from(0), "a token id >= 0, or None for off")
        if any(token < 0 for token in self.suppressed_token_ids):
            raise ValueError(f"suppressed_token_ids={self.suppressed_token_ids}: token ids must be >= 0.")

    def _require(self, name: str, holds: Callable[[Any], bool], rule: str) -> None:
        value = getattr(self, name)
        may_be_off = value is None and getattr(type(self), name) is None
        may_be_tensor = name not in ("no_repeat_ngram_size", "min_new_tokens", "forced_bos_token_id")
        if may_be_off or (may_be_tensor and tf.is_tensor(value)):
            return
        if not holds(value):
            raise ValueError(f"{name}={value!r}: must be {rule}.")

    @property
    def is_greedy(self) -> bool:
        """Whether the graph needs no randomness: the temperature is a number, and 0."""
        return not tf.is_tensor(self.temperature) and self.temperature == 0

    @property
    def needs_history(self) -> bool:
        """Whether a rule looks at the tokens read and given so far."""
        return (
            self.no_repeat_ngram_size is not None
            or is_on(self.repetition_penalty, 1)
            or any(len(word) > 1 for word in self.bad_words_ids)
        )


def sample(logits: Tensor, options: SamplingOptions, *, seeds: Tensor | None = None, index: Tensor = 0) -> Tensor:
    """The next token of each row: the most likely one, or a draw from the filtered distribution.

    The draw is the largest of score + Gumbel noise, which has the softmax of the scores as its distribution. Unlike
    a search in cumulated probabilities it changes with a rounding error only where two tokens tie.

    Shapes:
        logits [B, V] float32, seeds [B] integers, index int32 scalar -> [B] int32.

    Args:
        logits: the constrained scores.
        options: temperature and filters.
        seeds: one a row; not needed where `options.is_greedy`.
        index: number of the new token, counted from 0; with the row's seed it fixes the randomness.
    """
    if options.is_greedy:
        return tf.argmax(logits, axis=-1, output_type=tf.int32)
    scores = filter_scores(logits, options)
    noise = gumbel_noise(seeds, index, vocab_size_of(logits))
    if tf.is_tensor(options.temperature):
        noise = tf.where(column(options.temperature) > 0, noise, 0.0)
    return tf.argmax(scores + noise, axis=-1, output_type=tf.int32)


def filter_scores(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Logits over temperature, up to a constant a row, with -inf for the tokens that top-k, top-p and min-p remove.

    Each filter comes down to a least score, so the vocabulary need never be sorted: top-p works on the k candidates of
    top-k where both are set, and otherwise on the most likely tokens as long as they hold the nucleus.

    Shapes:
        logits [B, V] -> [B, V], with 0 for the most likely token.
    """
    scores = logits - tf.reduce_max(logits, axis=-1, keepdims=True)
    if tf.is_tensor(options.temperature):
        # Greedy rows keep their logits: any temperature leaves the most likely token where it is.
        temperature = column(options.temperature)
        scores /= tf.where(temperature > 0, tf.clip_by_value(temperature, *_TEMPERATURE_RANGE), 1.0)
    elif options.temperature != 1:
        scores /= max(options.temperature, _TEMPERATURE_RANGE[0])

    least_scores = []
    if options.top_k is not None:
        candidates, least = _top_k(scores, options.top_k)
        least_scores.append(least)
        if is_on(options.top_p, 1):
            log_total = tf.reduce_logsumexp(candidates, axis=-1, keepdims=True)
            least_scores.append(_nucleus(candidates, log_total, column(options.top_p))[0])
    elif is_on(options.top_p, 1):
        least_scores.append(_top_p(scores, column(options.top_p)))
    if is_on(options.min_p, 0):
        least_scores.append(tf.math.log(tf.clip_by_value(column(options.min_p), 0.0, 1.0)))
    for least in least_scores:
        scores = tf.where(scores >= least, scores, float("-inf"))
    return scores


def gumbel_noise(seeds: Tensor, index: Tensor, vocab_size: Any) -> Tensor:
    """Standard Gumbel noise for every token of the vocabulary, a function of (seed of the row, index) alone.

    Shapes:
        seeds [B] integers, index integer scalar -> [B, V] float32.

    Args:
        seeds: one a row.
        index: number of the new token.
        vocab_size: V; a scalar tensor will do, but then there must be a row.

    Reference:
        The generator is Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), named so that
        every device gives the same bits.
    """
    index = tf.cast(index, tf.int64)

    def row_bits(seed: Tensor) -> Tensor:
        key = tf.stack([seed, index])
        return tf.random.stateless_uniform([vocab_size], key, None, None, tf.uint32, alg="philox")

    seeds = tf.cast(seeds, tf.int64)
    bits = tf.map_fn(row_bits, seeds, fn_output_signature=tf.uint32)
    bits = tf.reshape(bits, [tf.shape(seeds)[0], vocab_size])  # [B, V], for zero rows too
    # Small uniforms make large noise, so it is there that all 32 bits count. 1 itself would make -inf.
    uniform = tf.minimum((tf.cast(bits, tf.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -tf.math.log(-tf.math.log1p(-uniform))


def chosen_log_probs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probability of each row's token under the softmax of `logits`.

    Shapes:
        logits [B, V] float32, token_ids [B] int32 -> [B] float32.
    """
    return tf.gather(logits, token_ids, axis=1, batch_dims=1) - tf.reduce_logsumexp(logits, axis=-1)


def is_integer(value: Any, least: int) -> bool:
    """Whether `value` is an integer of Python or numpy (and no bool), and at least `least`."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


def _is_finite_and(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value) and holds(value)
    )


def _is_integer_from(least: int) -> Callable[[Any], bool]:
    return lambda value: is_integer(value, least)


def is_on(value: Any, neutral: float) -> bool:
    """Whether an option changes anything, or may do so when its tensor comes."""
    return value is not None and (tf.is_tensor(value) or value != neutral)


def vocab_size_of(logits: Tensor) -> Any:
    """V as an integer where it is known when the graph is built, and as a scalar tensor otherwise."""
    return tf.shape(logits)[-1] if logits.shape[-1] is None else logits.shape[-1]


def column(value: Any) -> Tensor:
    """A number, scalar or [B] tensor as something that broadcasts over [B, V]."""
    value = tf.cast(value, tf.float32)
    return tf.expand_dims(value, -1) if value.shape.rank else value


def _top_k(scores: Tensor, top_k: Any) -> tuple[Tensor, Tensor]:
    """The k best scores of each row, best first [B, k] (-inf beyond a row's own k), and the least of them [B, 1]."""
    vocab_size = vocab_size_of(scores)
    if not tf.is_tensor(top_k):
        candidates = tf.math.top_k(scores, tf.minimum(int(top_k), vocab_size)).values
        return candidates, candidates[:, -1:]
    top_k = tf.cast(top_k, tf.int32)
    top_k = tf.where((top_k >= 1) & (top_k < vocab_size), top_k, vocab_size)
    top_k = tf.broadcast_to(top_k, tf.shape(scores)[:1])  # [B]
    # Zero rows have no largest k, but their candidates still need a width.
    widest = tf.maximum(tf.reduce_max(top_k), 1)
    candidates = tf.math.top_k(scores, widest).values
    least = tf.gather(candidates, tf.expand_dims(top_k - 1, -1), axis=1, batch_dims=1)
    inside = tf.range(widest) < tf.expand_dims(top_k, -1)
    return tf.where(inside, candidates, float("-inf")), least


def _nucleus(candidates: Tensor, log_total: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """The least score of the nucleus [B, 1], and whether the candidates hold it whole [B, 1].

    Shapes:
        candidates [B, k] scores, best first, log_total [B, 1] log of the sum of exp over all scores of the row.
    """
    probabilities = tf.exp(candidates - log_total)
    above = tf.cumsum(probabilities, axis=-1, exclusive=True)
    # The most likely token stays, whatever top_p; top_p = 1 removes nothing, whatever the rounding of the sums.
    kept = tf.where(above < tf.maximum(top_p, 1e-9), candidates, float("inf"))
    least = tf.where(top_p >= 1, float("-inf"), tf.reduce_min(kept, axis=-1, keepdims=True))
    return least, (top_p >= 1) | (above[:, -1:] + probabilities[:, -1:] >= top_p)


def _top_p(scores: Tensor, top_p: Tensor) -> Tensor:
    """The least score of each row's nucleus among all tokens [B, 1]."""
    vocab_size = vocab_size_of(scores)
    log_total = tf.reduce_logsumexp(scores, axis=-1, keepdims=True)
    candidates = tf.math.top_k(scores, tf.minimum(_NUCLEUS_CANDIDATES, vocab_size)).values
    least, is_whole = _nucleus(candidates, log_total, top_p)
    if isinstance(vocab_size, int) and vocab_size <= _NUCLEUS_CANDIDATES:
        return least
    return tf.cond(tf.reduce_all(is_whole), lambda: least, lambda: _wide_nucleus(scores, log_total, top_p))


def _wide_nucleus(scores: Tensor, log_total: Tensor, top_p: Tensor) -> Tensor:
    """The least score of the nucleus [B, 1] by halving the range of scores: several times faster than sorting."""
    probabilities = tf.exp(scores - log_total)

    def halve(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        middle = (low + high) / 2
        mass = tf.reduce_sum(tf.where(scores >= middle, probabilities, 0.0), axis=-1, keepdims=True)
        return tf.where(mass >= top_p, middle, low), tf.where(mass >= top_p, high, middle)

    # What lies below the lowest score weighs less than a float32 sum can tell. 24 steps end within 3e-6 of the
    # boundary, on the side that keeps a token rather than loses it.
    high = tf.zeros_like(log_total)
    low = high + _LOWEST_SCORE
    low, _ = tf.while_loop(lambda *_: True, halve, (low, high), maximum_iterations=24)
    return tf.where(top_p >= 1, float("-inf"), low)
