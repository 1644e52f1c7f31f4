"""Beam search: follow the most likely beginnings of a text at a time, and keep the best of those that have ended."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from lmzoo.generation.decode import GenerationLoop, InitCache, Step, static_or_dynamic, write_column
from lmzoo.generation.rules import constrain, end_lengths
from lmzoo.generation.sampling import SamplingOptions, is_integer

Tensor = Any
# reorder(cache, rows [R]) -> the cache with its row rows[i] in row i
Reorder = Callable[[Any, Tensor], Any]

# The score of what is not there. Not minus infinity, which a forbidden token has, and which no token lifts again.
_NOTHING = -1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamOptions:
    """How a beam search goes.

    The score of a text is the sum of its tokens' log-probabilities over its length ** `length_penalty`, where the
    length counts the new tokens, the end token included.

    Raises:
        ValueError: a number is outside the range given for its field.

    Reference:
        Groups: Vijayakumar et al. 2018, "Diverse Beam Search", algorithm 1, with the Hamming diversity of section 5.1.
    """

    num_beams: int = 4
    """Texts that are followed at a time, >= 1."""

    length_penalty: float = 1.0
    """Above 0 favours long texts, below 0 short ones; 0 compares sums."""

    early_stopping: bool | str = False
    """When a row has `num_beams` ended texts: True ends it; False ends it once the best text that goes on would score
    less than all of them if it ended now; "never" reckons with the longest text that it may become."""

    num_return_sequences: int = 1
    """How many texts a row gives, best first, 1 to `num_beams`."""

    num_beam_groups: int = 1
    """Groups that the beams are shared out to, each of which searches for itself; a divisor of `num_beams`."""

    diversity_penalty: float = 0.0
    """Taken from the score of a token, as a group chooses, for each beam of the groups before it that has just chosen
    that token; >= 0. Scores of texts are without it."""

    def __post_init__(self) -> None:
        for name in ("num_beams", "num_return_sequences", "num_beam_groups"):
            self._require(name, is_integer(getattr(self, name), 1), "an integer >= 1")
        self._require("num_return_sequences", self.num_return_sequences <= self.num_beams, "at most num_beams")
        self._require("num_beam_groups", self.num_beams % self.num_beam_groups == 0, "a divisor of num_beams")
        self._require("length_penalty", math.isfinite(self.length_penalty), "a finite number")
        known = self.early_stopping == "never" or isinstance(self.early_stopping, bool)
        self._require("early_stopping", known, 'True, False or "never"')
        self._require("diversity_penalty", 0 <= self.diversity_penalty < math.inf, "a finite number >= 0")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r} with num_beams={self.num_beams!r}: must be {rule}.")


class BeamResult(NamedTuple):
    """The texts that were found, best first.

    Attributes:
        token_ids: [B, n, max_new_tokens] int32, the new tokens, the end token or stop sequence included, then padding.
        lengths: [B, n] int32, number of new tokens; 0 where there are fewer texts than were asked for.
        end_lengths: [B, n] int32, how many of the last of them ended the text; 0 where its limit cut it.
        scores: [B, n] float32, see `BeamOptions`; minus infinity where there is no text.
    """

    token_ids: Tensor
    lengths: Tensor
    end_lengths: Tensor
    scores: Tensor


class _Ended(NamedTuple):
    """The K best texts of a group that have ended, best first. What is not there has a length of 0."""

    scores: Tensor  # [B, K]
    token_ids: Tensor  # [B, K, max_new_tokens]
    lengths: Tensor  # [B, K]
    end_lengths: Tensor  # [B, K]


class _Group(NamedTuple):
    """Beams that compete with one another."""

    sums: Tensor  # [B, K], of log-probabilities
    token_ids: Tensor  # [B, K, max_new_tokens]
    ended: _Ended
    is_open: Tensor  # [B], whether the row may yet find a better text


class _State(NamedTuple):
    """What the loop carries. `history` is () where it is not needed."""

    num_steps: Tensor  # scalar, how many tokens each beam has
    groups: tuple[_Group, ...]
    history: Any  # [B * beams, P + max_new_tokens]
    cache: Any


class BeamSearch(GenerationLoop):
    """A model's decoding step with the settings of a beam search; call it for a result.

    Calling it builds one `tf.while_loop` over tensors of fixed shape, as that of a `Decoder`: it can be compiled and
    exported. All beams of a row follow one another in the batch that the step reads. A row's result depends on its own
    prompt and limit alone. Beams draw nothing: of `options`, the rules apply, to log-probabilities.

    Args:
        reorder: `reorder(cache, rows [R]) -> cache`, with what is in its row `rows[i]` in row i. It is called with
            all rows of the prompts repeated, and then after each step.
        beams: how the search goes.
        options: the rules; None is none.
        step, init_cache, kwargs: as in `GenerationLoop`.

    Raises:
        ValueError: an argument is out of its range, or `options` ask for a draw.
    """

    def __init__(
        self,
        step: Step,
        init_cache: InitCache,
        reorder: Reorder,
        *,
        beams: BeamOptions,
        options: SamplingOptions | None = None,
        **kwargs: Any,
    ):
        options = SamplingOptions() if options is None else options
        for name in ("top_k", "top_p", "min_p"):
            if getattr(options, name) is not None:
                raise ValueError(f"{name}={getattr(options, name)!r}: a beam search draws nothing, so leave it out.")
        if tf.is_tensor(options.temperature) or options.temperature not in (0, 1):
            raise ValueError(f"temperature={options.temperature!r}: a beam search draws nothing, so leave it out.")
        super().__init__(step, init_cache, options=options, **kwargs)
        self._reorder = reorder
        self.beams = beams

    def __call__(
        self, token_ids: Tensor, lengths: Tensor, *, limits: Tensor | None = None, source: Any = None
    ) -> BeamResult:
        """Finds the best texts after the prompts; arguments are those of a `Decoder`'s call."""
        token_ids, lengths, limits = self._prompts(token_ids, lengths, limits)
        logits, history, lengths, cache = self._read(token_ids, lengths, source)
        rows = static_or_dynamic(lengths)[0]
        width, size = self.beams.num_beams, self.beams.num_beams // self.beams.num_beam_groups
        copies = tf.repeat(tf.range(rows), width)  # [B * beams]
        lengths, logits = tf.gather(lengths, copies), tf.gather(logits, copies)
        if self.options.needs_history:
            history = tf.gather(history, copies)
        # All beams of a group are the same at first, so only one of them counts.
        sums = tf.tile([[0.0] + [_NOTHING] * (size - 1)], [rows, 1])
        blank = tf.fill([rows, size, self.max_new_tokens], self.pad_token_id)
        none = tf.zeros([rows, size], tf.int32)
        ended = _Ended(tf.fill([rows, size], _NOTHING), blank, none, none)
        group = _Group(sums, blank, ended, limits > 0)
        state = _State(tf.constant(0), (group,) * self.beams.num_beam_groups, history, self._reorder(cache, copies))
        state = self._choose(state, logits, lengths, limits)

        def advance(state: _State) -> tuple[_State]:
            token_ids = tf.concat([group.token_ids for group in state.groups], axis=1)
            token = tf.reshape(token_ids[:, :, state.num_steps - 1], [-1, 1])  # [B * beams, 1]
            is_open = tf.gather(self._is_open(state), copies)
            logits, cache = self._step(token, state.cache, tf.expand_dims(is_open, -1))
            return (self._choose(state._replace(cache=cache), logits, lengths, limits, state.cache),)

        state = tf.while_loop(lambda state: tf.reduce_any(self._is_open(state)), advance, (state,))[0]
        return self._result(state)

    @staticmethod
    def _is_open(state: _State) -> Tensor:
        """[B] bool, True for rows in which a group goes on."""
        return tf.reduce_any(tf.stack([group.is_open for group in state.groups]), axis=0)

    def _choose(self, state: _State, logits: Tensor, lengths: Tensor, limits: Tensor, like: Any = None) -> _State:
        """Gives each beam of the next step its beginning and its token."""
        rows, width = static_or_dynamic(limits)[0], self.beams.num_beams
        log_probs = constrain(
            tf.nn.log_softmax(tf.cast(logits, tf.float32)),
            self.options,
            index=state.num_steps,
            eos_token_ids=self.eos_token_ids,
            history=state.history,
            history_lengths=lengths + state.num_steps,
        )
        vocab_size = static_or_dynamic(log_probs)[1]
        log_probs = tf.split(tf.reshape(log_probs, [rows, width, vocab_size]), len(state.groups), axis=1)
        groups: list[_Group] = []
        origins: list[Tensor] = []
        tokens: list[Tensor] = []
        for number, group in enumerate(state.groups):
            chosen = log_probs[number]
            if number and self.beams.diversity_penalty:
                counts = tf.reduce_sum(tf.one_hot(tf.concat(tokens, axis=1), vocab_size), axis=1, keepdims=True)
                chosen -= self.beams.diversity_penalty * counts  # [B, 1, V] of the groups before
            group, origin = self._choose_in_group(group, log_probs[number], chosen, state.num_steps, limits)
            groups.append(group)
            origins.append(origin + number * origin.shape[1])
            tokens.append(group.token_ids[:, :, state.num_steps])
        sources = tf.reshape(tf.concat(origins, axis=1) + tf.expand_dims(tf.range(rows) * width, 1), [-1])
        cache = self._reorder(state.cache, sources)
        if like is not None:
            # A loop refuses a tensor that comes back with a vaguer shape than it went in with.
            tf.nest.map_structure(lambda new, old: new.set_shape(old.shape), cache, like)
        history = state.history
        if self.options.needs_history:
            token = tf.reshape(tf.concat(tokens, axis=1), [-1])
            place = tf.expand_dims(lengths + state.num_steps, -1)
            history = write_column(tf.gather(history, sources), place, token)
        return _State(state.num_steps + 1, tuple(groups), history, cache)

    def _choose_in_group(
        self, group: _Group, log_probs: Tensor, chosen: Tensor, index: Tensor, limits: Tensor
    ) -> tuple[_Group, Tensor]:
        """The group after this step, and the beam [B, K] that each of its beams goes on from.

        Shapes:
            log_probs [B, K, V], chosen [B, K, V] what tokens are chosen by.
        """
        size = group.sums.shape[1]
        # So many that K of them go on even if all others end. What ends must be among the first K.
        count = size * (1 + max(1, len(self.eos_token_ids)))
        sums, by, origin, token = _candidates(group.sums, log_probs, chosen, count)
        rows, count = static_or_dynamic(token)
        token_ids = tf.gather(group.token_ids, origin, axis=1, batch_dims=1)  # [B, C, S]
        flat = write_column(tf.reshape(token_ids, [-1, self.max_new_tokens]), index, tf.reshape(token, [-1]))
        token_ids = tf.reshape(flat, [rows, count, self.max_new_tokens])
        ends = tf.reshape(end_lengths(flat, index + 1, self.options, self.eos_token_ids), [rows, count])
        is_last = tf.expand_dims(index + 1 >= limits, 1)
        has_ended = (ends > 0) | is_last

        goes_on = tf.math.top_k(by + _NOTHING * tf.cast(has_ended, tf.float32), size).indices
        next_sums = tf.gather(sums + _NOTHING * tf.cast(has_ended, tf.float32), goes_on, axis=1, batch_dims=1)

        may_end = has_ended & (tf.range(count) < size) & tf.expand_dims(group.is_open, 1) & (sums > _NOTHING / 2)
        length = tf.cast(index + 1, tf.float32)
        new = _Ended(
            tf.where(may_end, sums / length**self.beams.length_penalty, _NOTHING),
            token_ids,
            tf.where(may_end, index + 1, 0),
            tf.where(may_end, ends, 0),
        )
        ended = _best(tf.nest.map_structure(lambda old, new: tf.concat([old, new], axis=1), group.ended, new), size)
        is_open = group.is_open & self._may_improve(next_sums, ended, index + 1, limits)
        go = [tf.gather(each, goes_on, axis=1, batch_dims=1) for each in (token_ids, origin)]
        return _Group(next_sums, go[0], ended, is_open), go[1]

    def _may_improve(self, sums: Tensor, ended: _Ended, length: Tensor, limits: Tensor) -> Tensor:
        """[B] bool, whether a text that goes on may yet be among the best."""
        is_full = tf.reduce_all(ended.lengths > 0, axis=1)
        if self.beams.early_stopping is True:
            return ~is_full & (length < limits)
        penalty = self.beams.length_penalty
        reckons_with_limit = self.beams.early_stopping == "never" and penalty > 0
        best_length = tf.cast(limits if reckons_with_limit else length, tf.float32)
        best = sums[:, 0] / best_length**penalty
        return (~is_full | (best > ended.scores[:, -1])) & (length < limits)

    def _result(self, state: _State) -> BeamResult:
        groups = [group.ended for group in state.groups]
        ended = tf.nest.map_structure(lambda *each: tf.concat(each, axis=1), *groups)
        ended = _best(ended, self.beams.num_return_sequences)
        is_there = ended.lengths > 0
        token_ids = tf.where(tf.expand_dims(is_there, -1), ended.token_ids, self.pad_token_id)
        return BeamResult(token_ids, ended.lengths, ended.end_lengths, tf.where(is_there, ended.scores, -math.inf))


def _candidates(sums: Tensor, log_probs: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best continuations of all beams, best first: sums, what they were chosen by, beams and tokens, [B, C] each.

    Shapes:
        sums [B, K], log_probs and chosen [B, K, V]; C is `count`, or K * V if that is less.
    """
    rows, size, vocab_size = static_or_dynamic(log_probs)
    least = min if isinstance(vocab_size, int) else tf.minimum
    # First among the tokens of each beam, then among all: the same, with less to sort.
    each = least(count, vocab_size)
    values, tokens = tf.math.top_k(chosen, each)  # [B, K, each]
    sums = tf.expand_dims(sums, -1)
    reached = sums + tf.gather(log_probs, tokens, axis=2, batch_dims=2)
    flat = [tf.reshape(tensor, [rows, size * each]) for tensor in (sums + values, reached, tokens)]
    by, places = tf.math.top_k(flat[0], least(count, size * each))
    sums, tokens = (tf.gather(tensor, places, axis=1, batch_dims=1) for tensor in flat[1:])
    return sums, by, places // each, tokens


def _best(ended: _Ended, count: int) -> _Ended:
    """The `count` best of the texts of each row."""
    places = tf.math.top_k(ended.scores, count).indices
    return _Ended(*(tf.gather(each, places, axis=1, batch_dims=1) for each in ended))
