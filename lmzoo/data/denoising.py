"""Objectives of encoders with decoders: what is missing from a text is to be written.

| objective | the encoder reads | the decoder writes |
|---|---|---|
| `SpanCorruption` | the text with a sentinel for each span of noise | the noise, each span behind its sentinel |
| `UL2` | the same, by one of several denoisers, drawn for each row | the same |
| `PrefixLM` | the text up to a random place | the rest of it |
| `DecoderLM` | nothing but the end of a text | the text |

Both sides end with the token that ends texts, so a corpus needs none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias

import numpy as np

from lmzoo.data.corruption import Pieces, SentinelFacts, put_together, random_spans, replace_spans, span_counts
from lmzoo.data.objectives import Batch, Rows
from lmzoo.data.packing import Method
from lmzoo.data.randomness import uniform

Mode: TypeAlias = Literal["NLU", "NLG", "S2S"]
_Side: TypeAlias = tuple[np.ndarray, np.ndarray]  # tokens, and which of them are on it

_DENOISER, _SPLIT = range(210, 212)  # what random numbers are for; others than those of masking and of spans


@dataclass(frozen=True)
class _Denoising:
    """Rows of text become two texts each, or two for each document in them.

    Args:
        facts: of the tokenizer that made the corpus.
        separate_documents: whether documents are kept apart, several of them in a row if there is room for what is made
            of them: then there are `segment_ids` and `positions`, and those of the decoder. If not, rows are cut from
            one long text, as T5's were, or have a document each, and there is a `padding_mask`.
    """

    facts: SentinelFacts
    separate_documents: bool = field(default=False, kw_only=True)

    frame: ClassVar[int] = 0
    needs_other: ClassVar[bool] = False

    @property
    def packings(self) -> tuple[Method, ...]:
        """The methods of packing whose rows it can take."""
        return ("best-fit", "pad") if self.separate_documents else ("stream", "pad")

    def costs(self, seq_length: int) -> np.ndarray:
        """Places, of T, of what is made of pieces of 0, 1, ... tokens, up to the longest that has room.

        A piece that takes a greater share of the decoder's places than of the encoder's costs that share.

        Raises:
            ValueError: there is no room for a text of two tokens, or there are fewer sentinels than spans.
        """
        source, target = self._lengths(seq_length)
        if len(source) < 3:
            raise ValueError(f"seq_length: {seq_length}; it is too short for what is made of two tokens")
        return np.maximum(source, -(-target * seq_length // target.max()))

    def target_length(self, seq_length: int) -> int:
        """U, places of the decoder where the encoder has T: as many as it takes to fill the encoder's."""
        return int(self._lengths(seq_length)[1].max())

    def __call__(self, rows: Rows) -> Batch:
        """Gives both sides: token ids [B, T] and [B, U], labels [B, U] and weights [B, U]."""
        facts, seq_length = self.facts, rows.seq_length or rows.token_ids.shape[1]
        pieces = Pieces.of(rows.segment_ids)
        tokens = rows.token_ids[pieces.real]
        noise, modes = self._noise(pieces, rows.seeds)
        (read, left), (written, hidden) = self._sides(tokens, noise, pieces)
        source = put_together(read, left, pieces, self._source_width(seq_length), facts, modes)
        target = put_together(written, hidden, pieces, self.target_length(seq_length), facts, None)
        inputs = {"token_ids": source.token_ids}
        if self.separate_documents:
            inputs |= {"segment_ids": source.segment_ids, "positions": source.positions}
        else:
            inputs["padding_mask"] = source.segment_ids > 0
        inside = target.segment_ids > 0
        shifted = np.roll(target.token_ids, 1, axis=1)
        shifted = np.where(target.positions == 0, np.int32(facts.start_token_id), shifted)
        inputs["decoder_token_ids"] = np.where(inside, shifted, np.int32(facts.pad_token_id))
        if self.separate_documents:
            inputs |= {"decoder_segment_ids": target.segment_ids, "decoder_positions": target.positions}
        return inputs, target.token_ids * inside, inside.astype(np.float32)

    def _lengths(self, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens on both sides, at most, of pieces of 0, 1, ... tokens, as far as T is enough for either side."""
        # Each token is on a side, and each side has an end: so one of the sides is too long for 2 * T tokens.
        source, target = self._sizes(np.arange(1, 2 * seq_length + 1))
        end = int((np.maximum(source, target) > seq_length).argmax())
        source, target = (np.concatenate([[0], lengths[:end]]).astype(np.int64) for lengths in (source, target))
        return source, target

    def _source_width(self, seq_length: int) -> int:
        return seq_length

    def _sizes(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens on both sides, at most, of pieces of some lengths."""
        raise NotImplementedError

    def _noise(self, pieces: Pieces, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Which tokens are noise, and the mode token of each piece, if there are any."""
        raise NotImplementedError

    def _sides(self, tokens: np.ndarray, noise: np.ndarray, pieces: Pieces) -> tuple[_Side, _Side]:
        """For both sides, the tokens and which of them are on it."""
        return (tokens, ~noise), (tokens, noise)


@dataclass(frozen=True)
class Denoiser:
    """How much of a text is noise, and in how many spans.

    Args:
        noise_density: the share of tokens that are noise, more than 0 and less than 1.
        mean_span_length: tokens of a span of noise on average, at least 1. None: there is one span, the end of the
            text, of a random length between half of the share and one and a half times it.
        mode: the mode token that stands in front of what is read.
        rate: how often it is drawn, in proportion to the others.

    Raises:
        ValueError: a number is out of range.
    """

    noise_density: float = 0.15
    mean_span_length: float | None = 3.0
    mode: Mode | None = None
    rate: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.noise_density < 1:
            raise ValueError(f"noise_density: {self.noise_density}; it must be more than 0 and less than 1")
        if self.mean_span_length is not None and not self.mean_span_length >= 1:
            raise ValueError(f"mean_span_length: {self.mean_span_length}; it must be at least 1")
        if not self.rate > 0:
            raise ValueError(f"rate: {self.rate}; it must be more than 0")

    def counts(self, lengths: np.ndarray, share: float | np.ndarray = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of noise tokens and of spans in texts of some lengths; an end has this share of the density."""
        if self.mean_span_length is None:
            return span_counts(lengths, self.noise_density * share, np.inf)
        return span_counts(lengths, self.noise_density, self.mean_span_length)


class _Spans(_Denoising):
    """Span corruption by one of several denoisers, drawn for each row."""

    def _mixture(self) -> tuple[tuple[Denoiser, ...], bool]:
        """The denoisers, and whether there are mode tokens."""
        raise NotImplementedError

    def _sizes(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sources, targets = [], []
        denoisers, modes = self._mixture()
        for denoiser in denoisers:
            least, _ = denoiser.counts(lengths, 0.5)
            most, spans = denoiser.counts(lengths, 1.5)
            sources.append(lengths - least + spans + 1 + modes)
            targets.append(most + spans + 1)
        return np.max(sources, axis=0), np.max(targets, axis=0)

    def costs(self, seq_length: int) -> np.ndarray:
        costs = super().costs(seq_length)
        longest = np.array([len(costs) - 1])
        needed = max(int(denoiser.counts(longest)[1][0]) for denoiser in self._mixture()[0])
        if needed > len(self.facts.sentinel_ids):
            raise ValueError(
                f"seq_length: {seq_length}; texts then have up to {needed} spans, but the tokenizer has "
                f"{len(self.facts.sentinel_ids)} sentinels: take shorter rows, longer spans, or a tokenizer with more"
            )
        return costs

    def _noise(self, pieces: Pieces, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        denoisers, modes = self._mixture()
        rates = np.cumsum([denoiser.rate for denoiser in denoisers])
        drawn = np.searchsorted(rates[:-1], uniform(seeds, _DENOISER, 1)[:, 0] * rates[-1], side="right")[pieces.rows]
        share = 0.5 + uniform(seeds, _SPLIT, pieces.real.shape[1])[pieces.real][pieces.place == 0]
        noise, spans = np.zeros_like(pieces.lengths), np.ones_like(pieces.lengths)
        for number, denoiser in enumerate(denoisers):
            here = drawn == number
            noise[here], spans[here] = denoiser.counts(pieces.lengths[here], share[here])
        noisy = random_spans(pieces, noise, spans, seeds)
        if not modes:
            return noisy, None
        ids = dict(self.facts.mode_ids)
        return noisy, np.asarray([ids[denoiser.mode or ""] for denoiser in denoisers], np.int32)[drawn]

    def _sides(self, tokens: np.ndarray, noise: np.ndarray, pieces: Pieces) -> tuple[_Side, _Side]:
        return replace_spans(tokens, noise, pieces, self.facts), replace_spans(tokens, ~noise, pieces, self.facts)


@dataclass(frozen=True)
class SpanCorruption(_Spans):
    """Write what has been taken out of a text: T5's own objective.

    A row of T places is made of as many tokens as fill it: of 568 tokens come 512 to be read, and 114 to be written.
    The encoder reads the text with a sentinel of its own for each span of noise; the decoder writes sentinel and span,
    one after the other. A text begins with no noise and ends with some.

    Args:
        facts: of the tokenizer that made the corpus.
        noise_density: the share of tokens that are noise, more than 0 and less than 1.
        mean_span_length: tokens of a span of noise on average, at least 1.
        separate_documents: whether documents are kept apart, several in a row, each corrupted by itself.

    Raises:
        ValueError: a number is out of range, or the tokenizer has no sentinels.

    Reference: Raffel et al. 2020, section 3.1.4, and the released code. There both sides lack the last sentinel of the
        paper's figure, as here.
    """

    noise_density: float = 0.15
    mean_span_length: float = 3.0

    def __post_init__(self) -> None:
        Denoiser(self.noise_density, self.mean_span_length)
        _need_sentinels(self.facts)

    def _mixture(self) -> tuple[tuple[Denoiser, ...], bool]:
        return (Denoiser(self.noise_density, self.mean_span_length),), False


UL2_DENOISERS = (
    Denoiser(0.15, 3.0, "NLU"),
    Denoiser(0.15, 8.0, "NLU"),
    Denoiser(0.25, None, "S2S"),
    Denoiser(0.5, 3.0, "NLG"),
    Denoiser(0.5, 8.0, "NLG"),
    Denoiser(0.15, 64.0, "NLG"),
    Denoiser(0.5, 64.0, "NLG"),
)
"""Regular, sequential and extreme ones, in equal parts."""


@dataclass(frozen=True)
class UL2(_Spans):
    """A mixture of denoisers, one of which is drawn for each row.

    A row is made of as many tokens as all of them have room for, so that rows of some have padding.

    Args:
        facts: of the tokenizer that made the corpus.
        denoisers: to draw from.
        modes: whether the mode token of its denoiser stands in front of each text that is read.
        separate_documents: whether documents are kept apart, several in a row, each corrupted by itself.

    Raises:
        ValueError: there is no denoiser, or the tokenizer has no sentinels or not the mode tokens that are wanted.

    Reference: Tay et al. 2023, "UL2: Unifying Language Learning Paradigms", section 3.1. There spans are of normally
        distributed lengths; here all ways to cut the noise into spans are equally likely, as in T5.
    """

    denoisers: tuple[Denoiser, ...] = UL2_DENOISERS
    modes: bool = False

    def __post_init__(self) -> None:
        if not self.denoisers:
            raise ValueError("denoisers: none; name at least one")
        _need_sentinels(self.facts)
        known = [mode for mode, _ in self.facts.mode_ids]
        for denoiser in self.denoisers if self.modes else ():
            if denoiser.mode not in known:
                raise ValueError(
                    f"modes: a denoiser is of mode {denoiser.mode}, but the tokenizer has mode tokens for "
                    f"{', '.join(known) or 'none'}; give it [NLU], [NLG] and [S2S], or set modes to False"
                )

    def _mixture(self) -> tuple[tuple[Denoiser, ...], bool]:
        return self.denoisers, self.modes


@dataclass(frozen=True)
class PrefixLM(_Denoising):
    """Write how a text goes on: it is cut in two at a random place, where each is as likely.

    T and U are as long as the text, so that half of the places are padding, on average.

    Reference: Raffel et al. 2020, section 3.2.3, and the released code (`prefix_lm`).
    """

    def _sizes(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return lengths, np.maximum(lengths, 2)

    def _noise(self, pieces: Pieces, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        numbers = uniform(seeds, _SPLIT, pieces.real.shape[1])[pieces.real][pieces.place == 0]
        prefix = np.minimum(1 + (numbers * (pieces.lengths - 1)).astype(np.int64), pieces.lengths - 1)
        return pieces.place >= prefix[pieces.number], None


@dataclass(frozen=True)
class DecoderLM(_Denoising):
    """Write a text, from nothing: causal language modelling by the decoder alone.

    The encoder reads the end of a text, one token, so a row holds one text; T is the number of the decoder's places, U.
    """

    @property
    def packings(self) -> tuple[Method, ...]:
        """The methods of packing whose rows it can take."""
        return ("pad",) if self.separate_documents else ("stream", "pad")

    def _source_width(self, seq_length: int) -> int:
        return 1

    def _sizes(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.ones_like(lengths), lengths + 1

    def _noise(self, pieces: Pieces, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return np.ones(len(pieces.number), bool), None


def _need_sentinels(facts: SentinelFacts) -> None:
    if not facts.sentinel_ids:
        raise ValueError(
            "the tokenizer has no sentinels, <extra_id_0> and so on; train one of kind 'unigram' with num_sentinels=100"
        )
