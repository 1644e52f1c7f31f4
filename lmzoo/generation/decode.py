"""The decoding loop: read the prompts once, then choose, feed and write one token a row until every row has ended."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from lmzoo.generation.rules import constrain, end_lengths
from lmzoo.generation.sampling import SamplingOptions, chosen_log_probs, is_integer, sample

Tensor = Any
# step(token_ids [B, T], cache, padding_mask [B, T]) -> (logits [B, V] float32 at each row's last real token, cache)
Step = Callable[[Tensor, Any, Tensor], tuple[Tensor, Any]]
# init_cache(batch_size, cache_length) -> cache, a nest of tensors; with a source, that comes first
InitCache = Callable[[Any, Any], Any]

# Streamed prompts are padded to one of these widths or a multiple of the last, so that few functions are compiled.
_STREAM_WIDTHS = (16, 32, 64, 128)


class DecodeResult(NamedTuple):
    """What was generated.

    Attributes:
        token_ids: [B, max_new_tokens] int32, the new tokens, the end token or stop sequence included, then padding.
        lengths: [B] int32, number of new tokens in each row.
        end_lengths: [B] int32, how many of the last of them ended the row: 1 for the end token, the length of the
            stop sequence, or 0 where the row was cut by its limit. A text leaves them out.
        log_probs: [B, max_new_tokens] float32, log-probability of each new token under the model's own distribution
            (before rules, temperature and filters), 0 in the padding; None if it was not asked for.
    """

    token_ids: Tensor
    lengths: Tensor
    end_lengths: Tensor
    log_probs: Tensor | None


class StreamedTokens(NamedTuple):
    """One step of a stream.

    Attributes:
        token_ids: [B] int32, the new token of each row, the padding id in rows that have ended before.
        is_new: [B] bool, True in rows that got a new token.
    """

    token_ids: np.ndarray
    is_new: np.ndarray


class _Request(NamedTuple):
    """What stays the same over the loop. `seeds` is () where nothing is drawn."""

    prompt_lengths: Tensor  # [B]
    seeds: Any  # [B] int64
    limits: Tensor  # [B]


class _State(NamedTuple):
    """What the loop carries. `history` and `log_probs` are () where they are not needed."""

    num_steps: Tensor  # scalar, how many tokens have been chosen
    token: Tensor  # [B], the last of them
    has_ended: Tensor  # [B]
    token_ids: Tensor  # [B, max_new_tokens]
    lengths: Tensor  # [B]
    end_lengths: Tensor  # [B]
    log_probs: Any  # [B, max_new_tokens]
    history: Any  # [B, P + max_new_tokens], prompt and new tokens from the left
    cache: Any


class GenerationLoop:
    """What loops around a model's decoding step have in common: the settings, and reading the prompts.

    Args:
        step: `step(token_ids [B, T], cache, padding_mask [B, T]) -> (logits [B, V], cache)`, with the logits at the
            last real token of each row. It is called with the prompts once, padded on the right, and then with T = 1.
            The mask is True for real tokens; the token of a row that has ended is not one, and its logits are not
            looked at.
        init_cache: `init_cache(batch_size, cache_length) -> cache`, a nest of tensors. Either number is a Python
            integer where it is known when the graph is built, and a scalar tensor otherwise. Where a call has a
            `source`, it takes that in place of the number of rows.
        max_new_tokens: width of the result, >= 1.
        options: how tokens are chosen.
        eos_token_id: the token that ends a row (kept in the result), several of them, or None.
        pad_token_id: fills rows that have ended; also stands in for the prompt of an empty row.

    Raises:
        ValueError: `max_new_tokens` is not an integer >= 1, or a token id is negative.
    """

    def __init__(
        self,
        step: Step,
        init_cache: InitCache,
        *,
        max_new_tokens: int,
        options: SamplingOptions,
        eos_token_id: int | Sequence[int] | None,
        pad_token_id: int,
    ):
        if not is_integer(max_new_tokens, least=1):
            raise ValueError(f"max_new_tokens={max_new_tokens!r}: must be an integer >= 1.")
        if eos_token_id is None:
            eos_token_ids: tuple[int, ...] = ()
        else:
            eos_token_ids = tuple(int(token) for token in np.atleast_1d(eos_token_id))
        if any(token < 0 for token in eos_token_ids):
            raise ValueError(f"eos_token_id={eos_token_id!r}: token ids must be >= 0; None means that there is none.")
        if not is_integer(pad_token_id, least=0):
            raise ValueError(f"pad_token_id={pad_token_id!r}: must be a token id >= 0.")
        self._step = step
        self._init_cache = init_cache
        self.max_new_tokens = int(max_new_tokens)
        self.options = options
        self.eos_token_ids = eos_token_ids
        self.pad_token_id = int(pad_token_id)

    def _prompts(
        self, token_ids: Tensor, lengths: Tensor, limits: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts, lengths and limits as tensors of one shape: [B, P] with P >= 1, [B] and [B]."""
        token_ids = tf.cast(token_ids, tf.int32)
        if token_ids.shape.rank != 2:
            raise ValueError(f"token_ids has shape {token_ids.shape}: prompts must be one padded [B, P] tensor.")
        if token_ids.shape[1] is None or token_ids.shape[1] < 1:
            token_ids = tf.pad(token_ids, [[0, 0], [0, tf.maximum(0, 1 - tf.shape(token_ids)[1])]])
        rows = [static_or_dynamic(token_ids)[0]]
        limits = self.max_new_tokens if limits is None else tf.minimum(limits, self.max_new_tokens)
        return token_ids, *(tf.broadcast_to(tf.cast(each, tf.int32), rows) for each in (lengths, limits))

    def _read(self, token_ids: Tensor, lengths: Tensor, source: Any) -> tuple[Tensor, Any, Tensor, Any]:
        """Reads the prompts: logits [B, V] after them, history (() if no rule needs it), lengths [B], and the cache."""
        rows, width = static_or_dynamic(token_ids)
        token_ids = tf.where(tf.sequence_mask(lengths, width), token_ids, self.pad_token_id)
        lengths = tf.clip_by_value(lengths, 1, width)
        # The last new token is not read, so it needs no slot.
        cache = self._init_cache(rows if source is None else source, width + self.max_new_tokens - 1)
        logits, cache = self._step(token_ids, cache, tf.sequence_mask(lengths, width))
        history: Any = ()
        if self.options.needs_history:
            history = tf.pad(token_ids, [[0, 0], [0, self.max_new_tokens]])
        return logits, history, lengths, cache


class Decoder(GenerationLoop):
    """A model's decoding step with the settings of a generation: call it for a result, or stream from it.

    Calling it builds one `tf.while_loop` over tensors of fixed shape that ends as soon as every row has ended. Wrap
    the call in a `tf.function` to compile it; it can be exported, and the greedy loop converts to TFLite builtins. The
    batch may have any number of rows, none included.

    Each row depends on its own prompt, seed and limit alone, so it gives the same tokens in any batch, as far as the
    model's own logits are the same.

    Args:
        with_log_probs: also give the log-probabilities of the new tokens.
        args, kwargs: as in `GenerationLoop`.
    """

    def __init__(self, *args: Any, with_log_probs: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.with_log_probs = with_log_probs

    def __call__(
        self,
        token_ids: Tensor,
        lengths: Tensor,
        *,
        seeds: Tensor | int | None = None,
        limits: Tensor | None = None,
        source: Any = None,
    ) -> DecodeResult:
        """Generates after the prompts.

        Shapes:
            token_ids [B, P], lengths [B], seeds [] or [B], limits [] or [B] -> token_ids [B, max_new_tokens].

        Args:
            token_ids: prompts, padded on the right with anything.
            lengths: real tokens in each prompt. An empty prompt is read as one padding token.
            seeds: fixes the draws. A scalar is the seed of every row, so that equal prompts give equal texts; give one
                a row for different ones. None draws them from TensorFlow's global generator. Not used when greedy.
            limits: the most new tokens of each row; at most `max_new_tokens`, which is the default.
            source: a nest of tensors that the rows answer, as an encoder reads it; None if there is only the prompt.
        """
        request, state = self._start(*self._inputs(token_ids, lengths, seeds, limits), source)

        def goes_on(state: _State) -> Tensor:
            return (state.num_steps < self.max_new_tokens) & ~tf.reduce_all(state.has_ended)

        state = tf.while_loop(goes_on, lambda state: (self._advance(request, state),), (state,))[0]
        log_probs = state.log_probs if self.with_log_probs else None
        return DecodeResult(state.token_ids, state.lengths, state.end_lengths, log_probs)

    def stream(
        self,
        token_ids: Tensor,
        lengths: Tensor,
        *,
        seeds: Tensor | int | None = None,
        limits: Tensor | None = None,
        source: Any = None,
    ) -> Iterator[StreamedTokens]:
        """Generates one token a row at a time: the tokens of a call with the same arguments, as soon as they are there.

        The prompts go through one compiled function and each token through another. They are kept, so hold on to a
        decoder that is streamed from more than once. Arguments are those of the call.
        """
        token_ids, *rest = self._inputs(token_ids, lengths, seeds, limits)
        if source is None:
            token_ids = tf.pad(token_ids, [[0, 0], [0, _stream_width(token_ids.shape[1]) - token_ids.shape[1]]])
        start, advance = self._compiled
        request, state = start(token_ids, *rest, source)
        before = np.zeros(state.lengths.shape, np.int32)
        for step in range(self.max_new_tokens):
            if step:
                state = advance(request, state)
            after = state.lengths.numpy()
            is_new = after > before
            if not is_new.any():
                return
            yield StreamedTokens(state.token.numpy(), is_new)
            if state.has_ended.numpy().all():
                return
            before = after

    @functools.cached_property
    def _compiled(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        return tf.function(self._start), tf.function(self._advance)

    def _inputs(
        self, token_ids: Tensor, lengths: Tensor, seeds: Tensor | int | None, limits: Tensor | None
    ) -> tuple[Tensor, Tensor, Any, Tensor]:
        """The arguments as tensors of one shape: [B, P] with P >= 1, [B], [B] or (), [B]."""
        token_ids, lengths, limits = self._prompts(token_ids, lengths, limits)
        rows = static_or_dynamic(lengths)
        if self.options.is_greedy:
            seeds = ()
        elif seeds is None:
            seeds = tf.random.uniform(rows, tf.int64.min, tf.int64.max, tf.int64)
        else:
            seeds = tf.broadcast_to(tf.cast(seeds, tf.int64), rows)
        return token_ids, lengths, seeds, limits

    def _start(
        self, token_ids: Tensor, lengths: Tensor, seeds: Any, limits: Tensor, source: Any
    ) -> tuple[_Request, _State]:
        """Reads the prompts and chooses the first new token of each row."""
        logits, history, lengths, cache = self._read(token_ids, lengths, source)
        rows = static_or_dynamic(lengths)[0]
        request = _Request(lengths, seeds, limits)
        state = _State(
            num_steps=tf.constant(0),
            token=tf.fill([rows], self.pad_token_id),
            has_ended=limits <= 0,
            token_ids=tf.fill([rows, self.max_new_tokens], self.pad_token_id),
            lengths=tf.zeros([rows], tf.int32),
            end_lengths=tf.zeros([rows], tf.int32),
            log_probs=tf.zeros([rows, self.max_new_tokens]) if self.with_log_probs else (),
            history=history,
            cache=cache,
        )
        return request, self._choose(request, state, logits)

    def _advance(self, request: _Request, state: _State) -> _State:
        """Reads the last token of each row and chooses the next one."""
        token = tf.expand_dims(state.token, -1)  # [B, 1]
        # Rows that have ended take no further positions: there may be none left in the model's context.
        logits, cache = self._step(token, state.cache, tf.expand_dims(~state.has_ended, -1))
        # A loop refuses a tensor that comes back with a vaguer shape than it went in with.
        tf.nest.map_structure(lambda new, old: new.set_shape(old.shape), cache, state.cache)
        return self._choose(request, state._replace(cache=cache), logits)

    def _choose(self, request: _Request, state: _State, logits: Tensor) -> _State:
        """Chooses a token for each row that has not ended, and writes it down."""
        index = state.num_steps
        logits = tf.cast(logits, tf.float32)
        scores = constrain(
            logits,
            self.options,
            index=index,
            eos_token_ids=self.eos_token_ids,
            history=state.history,
            history_lengths=request.prompt_lengths + index,
        )
        is_new = ~state.has_ended
        token = sample(scores, self.options, seeds=request.seeds, index=index)
        # Nothing looks at what a row gives that has ended.
        token = tf.where(is_new, token, self.pad_token_id)
        state = state._replace(
            num_steps=index + 1,
            token=token,
            token_ids=write_column(state.token_ids, index, token),
            lengths=state.lengths + tf.cast(is_new, tf.int32),
        )
        if self.with_log_probs:
            log_probs = tf.where(is_new, chosen_log_probs(logits, token), 0.0)
            state = state._replace(log_probs=write_column(state.log_probs, index, log_probs))
        if self.options.needs_history:
            place = tf.expand_dims(request.prompt_lengths + index, -1)
            state = state._replace(history=write_column(state.history, place, token))
        ends = end_lengths(state.token_ids, index + 1, self.options, self.eos_token_ids)
        ends = tf.where(is_new, ends, state.end_lengths)
        return state._replace(end_lengths=ends, has_ended=(ends > 0) | (state.lengths >= request.limits))


def decode(
    step: Step,
    init_cache: InitCache,
    token_ids: Tensor,
    lengths: Tensor,
    *,
    max_new_tokens: int,
    options: SamplingOptions,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int,
    seeds: Tensor | int | None = None,
    limits: Tensor | None = None,
    with_log_probs: bool = False,
) -> DecodeResult:
    """Generates after the prompts: `Decoder` made and called at once; the arguments are described there."""
    decoder = Decoder(
        step,
        init_cache,
        max_new_tokens=max_new_tokens,
        options=options,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        with_log_probs=with_log_probs,
    )
    return decoder(token_ids, lengths, seeds=seeds, limits=limits)


def _stream_width(width: int) -> int:
    """What prompts of a stream are padded to."""
    widest = _STREAM_WIDTHS[-1]
    return next((size for size in _STREAM_WIDTHS if width <= size), -(-width // widest) * widest)


def static_or_dynamic(tensor: Tensor) -> list[Any]:
    """The sizes of a tensor: Python integers where they are known, scalar tensors where not."""
    dynamic = tf.shape(tensor)
    return [dynamic[axis] if size is None else size for axis, size in enumerate(tensor.shape)]


def write_column(rows: Tensor, place: Tensor, values: Tensor) -> Tensor:
    """`rows` [B, S] with `values` [B] at `place`, a scalar or [B, 1]. A selection, which every runtime has."""
    return tf.where(tf.range(tf.shape(rows)[1]) == place, tf.expand_dims(values, -1), rows)
