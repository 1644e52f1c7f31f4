"""Continues texts: strings in, strings out, in one graph."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import tensorflow as tf

from lmzoo.data.tokenizers import Tokenizer
from lmzoo.generation import SamplingOptions, StreamedTokens
from lmzoo.models import CausalLM, Seq2SeqLM
from lmzoo.pipelines.base import Pipeline, as_text

Tensor = Any

# What the sampling options of a request are in the graph.
_OPTION_DTYPES = {
    "temperature": tf.float32,
    "top_k": tf.int32,
    "top_p": tf.float32,
    "min_p": tf.float32,
    "repetition_penalty": tf.float32,
}
# A character of which not all bytes are there yet decodes to this.
_INCOMPLETE = "�"


class TextGenerator(Pipeline):
    """Continues texts. A str gives a str, a list a list, a tf.string tensor a tensor: the new text only.

    ```python
    generator = TextGenerator(model, tokenizer, temperature=0.7)
    generator("Once upon a time", seed=1)
    for piece in generator.stream("Once upon a time", seed=1):  # the same text
        print(piece, end="", flush=True)
    generator.export("saved_models/gpt")
    ```

    From string to string it is one graph, traced once. A text that leaves no room for `max_new_tokens` in the model's
    context loses its beginning; an empty text starts from the end token, as a new document does. Bytes that are not
    UTF-8 count as U+FFFD. A new text stops before the end token of the model or of the tokenizer, and before the first
    stop string.

    What is exported has the signatures

    - `serving_default`: text [B] -> text [B], with this pipeline's settings;
    - `generate`: the same, with the optional inputs `seed` (below 0 draws one), `max_new_tokens` and each sampling
      option that the pipeline has on, [1] or [B]. The settings of the pipeline are their defaults;
    - `tokens`: token_ids [B, T] int32 -> logits [B, T, V] float32, without strings and tables.

    In Python, `tf.saved_model.load(path).generate(text)` is a function with the same defaults.

    Shapes:
        text: tf.string [B]; options of a call: scalars, or [B] for one a row. Returns tf.string [B].

    Args:
        model: a language model that decodes from left to right.
        tokenizer: the one whose ids the model was trained on. It must have an in-graph twin.
        max_new_tokens: the most new tokens a text, from 1 to the model's context length - 1.
        temperature: divides the logits before the draw; 0 is greedy.
        top_k: draw from the k most likely tokens only; None is off.
        top_p: draw from the smallest set of tokens whose probabilities sum to this; None is off.
        stop_strings: one or several strings that end a text; they are not in it.
        seed: of calls and served requests that give none, >= 0; None draws a new one for each text.
        options: other fields of `SamplingOptions`, such as min_p, repetition_penalty or no_repeat_ngram_size. (Unlike
            a stop string, a stop sequence of token ids stays in the text and waits for `min_new_tokens`.)

    Raises:
        ValueError: the tokenizer has more tokens than the model or no in-graph twin, `max_new_tokens` does not fit the
            context, or an option is outside its range.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        top_k: int | None = 40,
        top_p: float | None = None,
        *,
        stop_strings: str | Sequence[str] = (),
        seed: int | None = None,
        **options: Any,
    ) -> None:
        if not hasattr(model, "decoder") or isinstance(model, Seq2SeqLM):
            raise ValueError(f"{type(model).__name__} does not continue texts: TextGenerator needs a causal LM.")
        super().__init__(model, tokenizer)
        config = model.config
        if not isinstance(max_new_tokens, int) or not 1 <= max_new_tokens < config.context_length:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens!r}, but must be an integer from 1 to {config.context_length - 1}: "
                f"prompt and new tokens share the model's context_length of {config.context_length}."
            )
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        ends = (config.eos_token_id, tokenizer.eos_token_id)
        self._end_token_ids = tuple(dict.fromkeys(token for token in ends if token is not None))
        self._stop_strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        options["stop_sequences"] = (*options.get("stop_sequences", ()), *self._stop_sequences())
        self.options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, **options)
        starts = (*ends, tokenizer.bos_token_id, config.pad_token_id, 0)
        self._start_token_id = next(token for token in starts if token is not None)
        self._generate = self._make_function()
        self._stream_decoder = functools.lru_cache(maxsize=8)(functools.partial(model.decoder, self.max_new_tokens))

    # ---- calling

    @overload
    def __call__(self, text: str, *, seed: Any = None, max_new_tokens: Any = None, **options: Any) -> str: ...
    @overload
    def __call__(
        self, text: Iterable[str], *, seed: Any = None, max_new_tokens: Any = None, **options: Any
    ) -> list[str]: ...
    def __call__(self, text: Any, *, seed: Any = None, max_new_tokens: Any = None, **options: Any) -> Any:
        """The new text after each text.

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
            return self._generate(text, **self._request(text.shape[0], values))["text"]
        texts = [as_text(item) for item in ([text] if isinstance(text, str) else text)]
        request = self._request(len(texts), values)
        new = self._generate(tf.constant(texts, tf.string, [len(texts)]), **request)["text"]
        new_texts = [item.decode() for item in new.numpy()]
        return new_texts[0] if isinstance(text, str) else new_texts

    def stream(self, text: str, *, seed: Any = None, max_new_tokens: Any = None, **options: Any) -> Iterator[str]:
        """Yields the new text after one text piece by piece, as its tokens come.

        The pieces joined are what a call with the same arguments gives. A piece never ends inside a character, and
        what may turn out to begin a stop string is held back until that is clear.

        Args:
            text: the text to continue.
            seed, max_new_tokens, options: as in a call.

        Raises:
            TypeError, ValueError: as in a call.
        """
        texts = tf.constant([as_text(text)])
        request = self._request(1, {"seed": seed, "max_new_tokens": max_new_tokens, **options})
        settings = {name: request[name].numpy().item() for name in options if name in request}
        decoder = self._stream_decoder(dataclasses.replace(self.options, **settings))
        request = {**self._defaults, **request}
        seeds = _drawn(request["seed"])
        return self._pieces(decoder.stream(*self._prompts(texts), seeds=seeds, limits=request["max_new_tokens"]))

    def _signatures(self) -> dict[str, Any]:
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "text")], autograph=False)
        def serve(text: Tensor) -> dict[str, Tensor]:
            return self._generate(text)

        @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int32, "token_ids")], autograph=False)
        def tokens(token_ids: Tensor) -> dict[str, Tensor]:
            return {"logits": self.model(token_ids, training=False)}

        return {"serving_default": serve, "generate": self._generate, "tokens": tokens}

    # ---- the graph

    def _make_function(self) -> Any:
        """The graph from text and its optional inputs, named and with their defaults, to new text."""
        defaults = {
            "seed": tf.constant([-1] if self.seed is None else _checked_seeds(self.seed), tf.int64),
            "max_new_tokens": tf.constant([self.max_new_tokens], tf.int32),
        }
        for name, dtype in _OPTION_DTYPES.items():
            value = getattr(self.options, name)
            # A greedy graph draws nothing, so there is nothing to temper or to filter.
            if value is not None and (name == "repetition_penalty" or not self.options.is_greedy):
                defaults[name] = tf.constant([value], dtype)
        self._defaults = defaults

        def generate(text: Tensor, *values: Tensor) -> dict[str, Tensor]:
            return {"text": self._new_text(text, dict(zip(defaults, values, strict=True)))}

        # Which inputs there are depends on the settings, and a signature takes names and defaults from parameters.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind, default=value) for name, value in defaults.items()]
        generate.__signature__ = inspect.Signature([inspect.Parameter("text", kind), *parameters])  # type: ignore[attr-defined]
        specs = [tf.TensorSpec([None], value.dtype) for value in defaults.values()]
        return tf.function(generate, input_signature=[tf.TensorSpec([None], tf.string), *specs], autograph=False)

    def _new_text(self, text: Tensor, request: dict[str, Tensor]) -> Tensor:
        rows = tf.shape(text)
        request = {name: tf.broadcast_to(value, rows) for name, value in request.items()}
        seeds, limits = _drawn(request.pop("seed")), request.pop("max_new_tokens")
        decoder = self.model.decoder(self.max_new_tokens, dataclasses.replace(self.options, **request))
        result = decoder(*self._prompts(text), seeds=seeds, limits=limits)
        token_ids = result.token_ids
        for token in self._end_token_ids:
            token_ids = tf.where(token_ids == token, -1, token_ids)  # Has no text, whatever the tokenizer thinks of it.
        new = self._graph_tokenizer.decode(tf.RaggedTensor.from_tensor(token_ids, result.lengths))
        if self._stop_strings:
            # The usual tokens of a stop string have ended the row; the string may have come in other tokens before.
            stops = "|".join(_pattern(stop) for stop in self._stop_strings)
            new = tf.strings.regex_replace(new, f"(?s)(?:{stops}).*", "", replace_global=False)
        return new

    def _prompts(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Texts [B] as prompts [B, P], padded on the right, and their lengths [B]; both sizes are 1 or more."""
        token_ids = self._graph_tokenizer.encode(text)
        token_ids = token_ids[:, self.max_new_tokens - self.model.config.context_length :]
        lengths = tf.maximum(tf.cast(token_ids.row_lengths(), tf.int32), 1)
        token_ids = token_ids.to_tensor(self._start_token_id)
        missing = tf.maximum(1 - tf.shape(token_ids)[1], 0)
        return tf.pad(token_ids, [[0, 0], [0, missing]], constant_values=self._start_token_id), lengths

    def _stop_sequences(self) -> tuple[tuple[int, ...], ...]:
        """Token ids that end a row: those of the stop strings, and an end token that only the tokenizer knows."""
        known_end = self.model.config.eos_token_id
        sequences: list[tuple[int, ...]] = [(token,) for token in self._end_token_ids if token != known_end]
        for stop in self._stop_strings:
            if not isinstance(stop, str) or not stop:
                raise ValueError(f"stop_strings has {stop!r}, but each must be a str of one character or more.")
            token_ids = self.tokenizer.encode(stop)
            special = [token for token in token_ids if self._is_special(token, stop)]
            if special and special != token_ids:
                raise ValueError(f"the stop string {stop!r} mixes text and special tokens: give them one by one.")
            if special:
                sequences.append(tuple(special))
                continue
            # Behind a space it is often another token. Tokens that do not hold the string end nothing.
            for held_by in (token_ids, self.tokenizer.encode(" " + stop)):
                if stop in self.tokenizer.decode(held_by):
                    sequences.append(tuple(held_by))
        return tuple(sequences)

    def _is_special(self, token: int, stop: str) -> bool:
        """Whether a token of a stop string is written out in it, but has no text, unlike one for unknown text."""
        return self.tokenizer.decode([token]) == "" and (self.tokenizer.id_to_token(token) or "") in stop

    # ---- requests and streams

    def _request(self, rows: int | None, values: dict[str, Any]) -> dict[str, Tensor]:
        """The inputs that a call gives, checked, as tensors [1] or [B]; None is left out."""
        request = {}
        for name, value in values.items():
            if value is None:
                continue
            if name not in self._defaults:
                known = ", ".join(self._defaults)
                if name not in _OPTION_DTYPES:
                    raise TypeError(f"a call has no option {name!r}. This pipeline takes: {known}.")
                raise ValueError(
                    f"{name} is {value!r}, but this pipeline was made without it: make it with a value for {name} "
                    f"(and a temperature above 0, if it is not a penalty). It takes: {known}."
                )
            dtype = self._defaults[name].dtype
            if tf.is_tensor(value):
                request[name] = tf.reshape(tf.cast(value, dtype), [-1])
            else:
                request[name] = tf.constant(self._checked(name, value), dtype)
            size = request[name].shape[0]
            if None not in (size, rows) and size not in (1, rows):
                raise ValueError(f"{name} has {size} values for {rows} texts: give one, or one a text.")
        return request

    def _checked(self, name: str, value: Any) -> list[Any]:
        if name == "seed":
            return _checked_seeds(value)
        values = np.ravel(value).tolist()
        for number in values:
            if name != "max_new_tokens":
                dataclasses.replace(self.options, **{name: number})  # Knows the ranges.
            elif not isinstance(number, int) or not 1 <= number <= self.max_new_tokens:
                raise ValueError(f"max_new_tokens is {number!r}, but this pipeline gives 1 to {self.max_new_tokens}.")
        return values

    def _pieces(self, tokens: Iterator[StreamedTokens]) -> Iterator[str]:
        token_ids: list[int] = []
        text, given = "", 0
        for step in tokens:
            token = int(step.token_ids[0])
            if token not in self._end_token_ids:
                token_ids.append(token)
            text = self._graph_tokenizer.decode(tf.constant([token_ids], tf.int32)).numpy()[0].decode()
            known = text.rstrip(_INCOMPLETE)
            text_before_stop = self._until_stop(known)
            if text_before_stop != known:
                text = text_before_stop
                break
            end = len(known) - self._held_back(known)
            if end > given:
                yield known[given:end]
                given = end
        text = self._until_stop(text)
        if len(text) > given:
            yield text[given:]

    def _until_stop(self, text: str) -> str:
        starts = [text.index(stop) for stop in self._stop_strings if stop in text]
        return text[: min(starts, default=len(text))]

    def _held_back(self, text: str) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        beginnings = (stop[:size] for stop in self._stop_strings for size in range(1, len(stop)))
        return max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)


def _drawn(seeds: Tensor) -> Tensor:
    """Seeds [B], with new ones for those below 0."""
    return tf.where(seeds < 0, tf.random.uniform(tf.shape(seeds), maxval=tf.int64.max, dtype=tf.int64), seeds)


def _checked_seeds(seeds: Any) -> list[int]:
    values = np.ravel(seeds).tolist()
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            raise ValueError(f"seed is {value!r}, but must be an integer from 0 to 2**63 - 1, or None to draw one.")
    return values


def _pattern(text: str) -> str:
    """A regular expression for just this text, whatever it holds."""
    return "".join(f"\\x{{{ord(character):X}}}" for character in text)
