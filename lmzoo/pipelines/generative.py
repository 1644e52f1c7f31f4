"""What pipelines have in common that write texts: from strings to prompts to tokens to strings, in one graph."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, overload

import tensorflow as tf

from lmzoo.data.tokenizers import Tokenizer
from lmzoo.generation import BeamOptions, SamplingOptions, StreamedTokens
from lmzoo.models import GenerativeLM
from lmzoo.pipelines.base import Pipeline, as_text
from lmzoo.pipelines.requests import RequestInputs, drawn
from lmzoo.pipelines.scoring import Continuations, score
from lmzoo.pipelines.steps import decode_function, prefill
from lmzoo.pipelines.stop_strings import StopStrings

Tensor = Any

# A character of which not all bytes are there yet decodes to this.
_INCOMPLETE = "�"
# The score of a text that is not there: finite, as JSON has no infinity.
_NOTHING = -1e9


class Prompts(NamedTuple):
    """What is decoded from, as a `Decoder` takes it.

    Attributes:
        token_ids: [B, P] int32, padded on the right; P is 1 or more.
        lengths: [B] int32, 1 or more.
        source: what an encoder reads, or None.
    """

    token_ids: Tensor
    lengths: Tensor
    source: Any = None


class GenerativePipeline(Pipeline):
    """A pipeline that writes a text for each text, from left to right, by drawing tokens or by a beam search.

    A subclass says how it reads texts, in `_prompts` and `_continuations`, and ids, in `_logits` and `_prefilled`.

    Args:
        model, tokenizer: as in `Pipeline`.
        max_new_tokens: the most new tokens a text.
        stop_strings: one or several strings that end a text; they are not in it.
        seed: of calls and served requests that give none, >= 0; None draws a new one for each text.
        options: fields of `SamplingOptions`, and of `BeamOptions`, where one beam, the default, is no search. A search
            draws nothing, so it needs a temperature of 0.

    Raises:
        ValueError: as `Pipeline`, or an option is outside its range.
    """

    def __init__(
        self,
        model: GenerativeLM,
        tokenizer: Tokenizer,
        max_new_tokens: int,
        *,
        stop_strings: str | Sequence[str],
        seed: int | None,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer)
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        ends = (model.config.eos_token_id, tokenizer.eos_token_id)
        self._end_token_ids = tuple(dict.fromkeys(token for token in ends if token is not None))
        self._stops = StopStrings(stop_strings, tokenizer)
        names = BeamOptions.__dataclass_fields__
        beams = {name: options.pop(name) for name in list(options) if name in names}
        self.beams = BeamOptions(**{"num_beams": 1, **beams})
        # The loop itself ends at the model's own end token only.
        more = ((token,) for token in self._end_token_ids if token != model.config.eos_token_id)
        options["stop_sequences"] = (*options.get("stop_sequences", ()), *more, *self._stops.sequences)
        self.options = SamplingOptions(**options)
        if self.beams.num_beams > 1:
            if not self.options.is_greedy:
                raise ValueError(
                    f"num_beams is {self.beams.num_beams} and temperature {self.options.temperature!r}, but a beam "
                    "search draws nothing: make the pipeline with temperature=0."
                )
            self.options = dataclasses.replace(self.options, top_k=None, top_p=None, min_p=None)
        self._request_inputs = RequestInputs(self.options, max_new_tokens, seed)
        self._generate = self._function(self._new_text)
        self._score = self._score_function()
        self._stream_decoder = functools.lru_cache(maxsize=8)(functools.partial(model.decoder, self.max_new_tokens))

    # ---- calling

    @overload
    def __call__(self, text: str, *, seed: Any = None, max_new_tokens: Any = None, **options: Any) -> str: ...
    @overload
    def __call__(
        self, text: Iterable[str], *, seed: Any = None, max_new_tokens: Any = None, **options: Any
    ) -> list[str]: ...
    def __call__(self, text: Any, *, seed: Any = None, max_new_tokens: Any = None, **options: Any) -> Any:
        """The new text for each text.

        Args:
            text: a str, an iterable of str, or a tf.string tensor [B].
            seed: >= 0, one for all texts or one a text: the same text, seed and options give the same new text, alone
                or among others. None is the pipeline's own.
            max_new_tokens: the most new tokens, at most the pipeline's own.
            options: temperature, top_k, top_p, min_p or repetition_penalty, where the pipeline has it on, that is, was
                made with a value for it (a temperature above 0). Each is a number or one value a text.

        Raises:
            TypeError: a text is not a str.
            ValueError: an option that the pipeline does not have on, or a value outside its range.
        """
        values = {"seed": seed, "max_new_tokens": max_new_tokens, **options}
        if tf.is_tensor(text):
            if text.shape.rank != 1 or text.dtype != tf.string:
                raise TypeError(
                    f"texts are a {text.dtype.name} tensor of shape {text.shape}, but must be tf.string [B]."
                )
            return self._generate(text, **self._request_inputs.tensors(text.shape[0], values))["text"]
        texts = [as_text(item) for item in ([text] if isinstance(text, str) else text)]
        request = self._request_inputs.tensors(len(texts), values)
        new = self._generate(tf.constant(texts, tf.string, [len(texts)]), **request)["text"]
        new_texts = [item.decode() for item in new.numpy()]
        return new_texts[0] if isinstance(text, str) else new_texts

    def n_best(self, text: str | Iterable[str], *, max_new_tokens: Any = None, **options: Any) -> Any:
        """What a beam search finds, `num_return_sequences` texts for each text, best first, with their scores.

        Args:
            text: a str, for a list of `{"text": ..., "score": ...}`, or an iterable of str, for a list of such lists.
            max_new_tokens, options: as in a call.

        Raises:
            TypeError: a text is not a str.
            ValueError: the pipeline was made with one beam, or as in a call.
        """
        self._require_beams()
        texts = [as_text(item) for item in ([text] if isinstance(text, str) else text)]
        request = self._request_inputs.tensors(len(texts), {"max_new_tokens": max_new_tokens, **options})
        outputs = self._n_best(tf.constant(texts, tf.string, [len(texts)]), **request)
        columns = zip(outputs["text"].numpy(), outputs["score"].numpy().tolist(), strict=True)
        found = [
            [{"text": new.decode(), "score": score} for new, score in zip(*row, strict=True) if score > _NOTHING]
            for row in columns
        ]
        return found[0] if isinstance(text, str) else found

    def score(self, text: str | Iterable[str], continuation: str | Iterable[str]) -> Any:
        """How likely the model finds that a text goes on with, or is answered by, another one.

        Args:
            text: a str, or an iterable of str.
            continuation: likewise.

        Returns:
            A dict with `log_likelihood`, the sum over the tokens of the continuation, `num_tokens`, how many these are,
            and `is_greedy`, whether each of them is the most likely one; or a list of such dicts.

        Raises:
            TypeError: a text is not a str, or only one of both is.
            ValueError: there are more texts than continuations, or fewer.
        """
        if isinstance(text, str) != isinstance(continuation, str):
            raise TypeError("text and continuation must both be a str, or both be lists of str.")
        pair = ([text], [continuation]) if isinstance(text, str) else (text, continuation)
        columns = [[as_text(item) for item in each] for each in pair]
        if len(columns[0]) != len(columns[1]):
            raise ValueError(f"there are {len(columns[0])} texts and {len(columns[1])} continuations: give as many.")
        outputs = self._score(*(tf.constant(column, tf.string, [len(column)]) for column in columns))
        values = zip(*(value.numpy().tolist() for value in outputs.values()), strict=True)
        scores = [dict(zip(outputs, row, strict=True)) for row in values]
        return scores[0] if isinstance(text, str) else scores

    def stream(self, text: str, *, seed: Any = None, max_new_tokens: Any = None, **options: Any) -> Iterator[str]:
        """Yields the new text for one text piece by piece, as its tokens come.

        The pieces joined are what a call with the same arguments gives. A piece never ends inside a character, and
        what may turn out to begin a stop string is held back until that is clear.

        Args:
            text: the text to continue or to answer.
            seed, max_new_tokens, options: as in a call.

        Raises:
            TypeError: as in a call.
            ValueError: as in a call, or the pipeline searches with beams, which know a text when it has ended.
        """
        if self.beams.num_beams > 1:
            raise ValueError(
                f"num_beams is {self.beams.num_beams}, and a beam search knows a text when it has ended: call the "
                "pipeline, or make it with num_beams=1 for a stream."
            )
        texts = tf.constant([as_text(text)])
        request = self._request_inputs.tensors(1, {"seed": seed, "max_new_tokens": max_new_tokens, **options})
        settings = {name: request[name].numpy().item() for name in options if name in request}
        decoder = self._stream_decoder(dataclasses.replace(self.options, **settings))
        request = {**self._request_inputs.defaults, **request}
        token_ids, lengths, source = self._prompts(texts, is_streamed=True)
        seeds, limits = drawn(request["seed"]), request["max_new_tokens"]
        return self._pieces(decoder.stream(token_ids, lengths, seeds=seeds, limits=limits, source=source))

    # ---- the graph

    @abstractmethod
    def _prompts(self, text: Tensor, is_streamed: bool = False) -> Prompts:
        """What is decoded from for texts, tf.string [B]; a stream compiles a function for each of its shapes."""

    @abstractmethod
    def _continuations(self, text: Tensor, continuation: Tensor) -> Continuations:
        """What is scored of texts and what follows them, tf.string [B]."""

    @abstractmethod
    def _id_specs(self) -> dict[str, dict[str, tf.TensorSpec]]:
        """Inputs of the signatures on ids: of `tokens`, and of `prefill`."""

    @abstractmethod
    def _logits(self, **inputs: Tensor) -> Tensor:
        """Scores of all tokens, as the signature `tokens` gives them."""

    @abstractmethod
    def _prefilled(self, **inputs: Tensor) -> tuple[Tensor, Tensor, Any, int]:
        """What `steps.prefill` takes of the inputs of the signature `prefill`."""

    def _signatures(self) -> dict[str, Any]:
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "text")], autograph=False)
        def serve(text: Tensor) -> dict[str, Tensor]:
            return self._generate(text)

        beams = {"n_best": self._n_best} if self.beams.num_beams > 1 else {}
        specs = self._id_specs()
        filled = on_ids(lambda **inputs: prefill(self.model, *self._prefilled(**inputs)), specs["prefill"])
        return {
            "serving_default": serve,
            "generate": self._generate,
            **beams,
            "score": self._score,
            "tokens": on_ids(lambda **inputs: {"logits": self._logits(**inputs)}, specs["tokens"]),
            "prefill": filled,
            "decode": decode_function(self.model, filled.get_concrete_function().structured_outputs),
        }

    def _score_function(self) -> Any:
        def run(text: Tensor, continuation: Tensor) -> dict[str, Tensor]:
            return score(self.model, self._continuations(text, continuation))

        specs = [tf.TensorSpec([None], tf.string, name) for name in ("text", "continuation")]
        return tf.function(run, input_signature=specs, autograph=False)

    @functools.cached_property
    def _n_best(self) -> Any:
        return self._function(self._new_texts)

    def _require_beams(self) -> None:
        if self.beams.num_beams == 1:
            raise ValueError("num_beams is 1, which is no search: make the pipeline with 2 or more, and temperature=0.")

    def _function(self, run: Any) -> Any:
        """The graph of `run(text, request)`, whose optional inputs have names and defaults."""
        defaults = self._request_inputs.defaults

        def generate(text: Tensor, *values: Tensor) -> dict[str, Tensor]:
            rows = tf.shape(text)
            request = zip(defaults, (tf.broadcast_to(value, rows) for value in values), strict=True)
            return run(text, dict(request))

        # Which inputs there are depends on the settings, and a signature takes names and defaults from parameters.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind, default=value) for name, value in defaults.items()]
        generate.__signature__ = inspect.Signature([inspect.Parameter("text", kind), *parameters])  # type: ignore[attr-defined]
        specs = [tf.TensorSpec([None], value.dtype) for value in defaults.values()]
        return tf.function(generate, input_signature=[tf.TensorSpec([None], tf.string), *specs], autograph=False)

    def _new_text(self, text: Tensor, request: dict[str, Tensor]) -> dict[str, Tensor]:
        """The new texts [B]."""
        if self.beams.num_beams > 1:
            return {"text": self._new_texts(text, request)["text"][:, 0]}
        seeds, limits = drawn(request.pop("seed")), request.pop("max_new_tokens")
        decoder = self.model.decoder(self.max_new_tokens, dataclasses.replace(self.options, **request))
        token_ids, lengths, source = self._prompts(text)
        result = decoder(token_ids, lengths, seeds=seeds, limits=limits, source=source)
        return {"text": self._decoded(result.token_ids, result.lengths)}

    def _new_texts(self, text: Tensor, request: dict[str, Tensor]) -> dict[str, Tensor]:
        """The best texts of a beam search [B, n], and their scores [B, n]."""
        limits = request.pop("max_new_tokens")
        request.pop("seed")
        options = dataclasses.replace(self.options, **request)
        search = self.model.beam_decoder(self.max_new_tokens, self.beams, options)
        token_ids, lengths, source = self._prompts(text)
        result = search(token_ids, lengths, limits=limits, source=source)
        rows = tf.reshape(result.token_ids, [-1, self.max_new_tokens])
        texts = self._decoded(rows, tf.reshape(result.lengths, [-1]))
        return {
            "text": tf.reshape(texts, tf.shape(result.scores)),
            "score": tf.maximum(result.scores, _NOTHING),
        }

    def _decoded(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """The texts [R] of new tokens [R, S], of which the first `lengths` [R] count."""
        for token in self._end_token_ids:
            token_ids = tf.where(token_ids == token, -1, token_ids)  # Has no text, whatever the tokenizer thinks of it.
        return self._stops.cut(self._graph_tokenizer.decode(tf.RaggedTensor.from_tensor(token_ids, lengths)))

    # ---- streams

    def _pieces(self, tokens: Iterator[StreamedTokens]) -> Iterator[str]:
        token_ids: list[int] = []
        text, given = "", 0
        for step in tokens:
            token = int(step.token_ids[0])
            if token not in self._end_token_ids:
                token_ids.append(token)
            text = self._graph_tokenizer.decode(tf.constant([token_ids], tf.int32)).numpy()[0].decode()
            known = text.rstrip(_INCOMPLETE)
            text_before_stop = self._stops.before(known)
            if text_before_stop != known:
                text = text_before_stop
                break
            end = len(known) - self._stops.held_back(known)
            if end > given:
                yield known[given:end]
                given = end
        text = self._stops.before(text)
        if len(text) > given:
            yield text[given:]


def on_ids(run: Any, specs: dict[str, tf.TensorSpec]) -> Any:
    """The graph of `run`, whose arguments have the names and the kinds of `specs`."""

    def function(*values: Tensor) -> dict[str, Tensor]:
        return run(**dict(zip(specs, values, strict=True)))

    named = [tf.TensorSpec(spec.shape, spec.dtype, name) for name, spec in specs.items()]
    return tf.function(function, input_signature=named, autograph=False)


def id_specs(**dtypes: Any) -> dict[str, tf.TensorSpec]:
    """Kinds of inputs [B, T], each of its dtype."""
    return {name: tf.TensorSpec([None, None], dtype) for name, dtype in dtypes.items()}
