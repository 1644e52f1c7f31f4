"""Continues texts: strings in, strings out, in one graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from lmzoo.data.tokenizers import Tokenizer
from lmzoo.models import CausalLM, Seq2SeqLM
from lmzoo.pipelines.attention import MAX_TOKENS
from lmzoo.pipelines.generative import GenerativePipeline, Prompts, id_specs
from lmzoo.pipelines.guards import checked_ids, with_room
from lmzoo.pipelines.scoring import Continuations, shifted

Tensor = Any


class TextGenerator(GenerativePipeline):
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
    - `n_best`, if it searches with beams: as `generate`, -> text [B, n] and score [B, n], best first;
    - `score`: text [B] and continuation [B] -> log_likelihood [B] float32, num_tokens [B] int32, is_greedy [B] bool;
    - `tokens`: token_ids [B, T] int32 -> logits [B, T, V] float32, without strings and tables, as the next two;
    - `prefill`: token_ids [B, P] and lengths [B] int32 -> logits [B, V] float32 and a cache (see `steps`);
    - `decode`: token_ids [B, 1] int32 and a cache -> logits [B, V] float32 and the cache.

    In these three, an id outside the vocabulary or a row longer than the context is an InvalidArgument error.

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
        options: other fields of `SamplingOptions`, such as min_p, repetition_penalty or no_repeat_ngram_size (unlike
            a stop string, a stop sequence of token ids stays in the text and waits for `min_new_tokens`); and with a
            temperature of 0 those of `BeamOptions`, such as num_beams, for a beam search.

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
        config = model.config
        if not isinstance(max_new_tokens, int) or not 1 <= max_new_tokens < config.context_length:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens!r}, but must be an integer from 1 to {config.context_length - 1}: "
                f"prompt and new tokens share the model's context_length of {config.context_length}."
            )
        starts = (config.eos_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, config.pad_token_id, 0)
        self._start_token_id = next(token for token in starts if token is not None)
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        super().__init__(model, tokenizer, max_new_tokens, stop_strings=stop_strings, seed=seed, **sampling, **options)

    def _prompts(self, text: Tensor, is_streamed: bool = False) -> Prompts:
        return self._ends(text, self._max_prompt_tokens)

    @property
    def _max_prompt_tokens(self) -> int:
        return self.model.config.context_length - self.max_new_tokens

    def _ends(self, text: Tensor, size: int) -> Prompts:
        """The last `size` tokens of each text."""
        token_ids = self._graph_tokenizer.encode(text)[:, -size:]
        lengths = tf.maximum(tf.cast(token_ids.row_lengths(), tf.int32), 1)
        token_ids = token_ids.to_tensor(self._start_token_id)
        missing = tf.maximum(1 - tf.shape(token_ids)[1], 0)
        return Prompts(tf.pad(token_ids, [[0, 0], [0, missing]], constant_values=self._start_token_id), lengths)

    def _attend(self, *texts: Tensor) -> tuple[Tensor, Tensor]:
        (text,) = texts
        token_ids, lengths, _ = self._ends(text, min(self._max_prompt_tokens, MAX_TOKENS))
        self.model.features(token_ids, training=False)
        return token_ids, tf.sequence_mask(lengths, tf.shape(token_ids)[1])

    def _continuations(self, text: Tensor, continuation: Tensor) -> Continuations:
        whole = self._graph_tokenizer.encode(tf.strings.join([text, continuation]))
        # White space belongs to the word behind it.
        before = self._graph_tokenizer.encode(tf.strings.regex_replace(text, r"[\s\p{Z}]+\z", ""))
        lengths, first = (tf.cast(each.row_lengths(), tf.int32) for each in (whole, before))
        return shifted(
            whole.to_tensor(),
            lengths,
            tf.minimum(first, lengths),
            self.model.config.context_length,
            self._start_token_id,
        )

    # ---- signatures on ids

    def _id_specs(self) -> dict[str, dict[str, tf.TensorSpec]]:
        ids = id_specs(token_ids=tf.int32)
        return {"tokens": ids, "prefill": {**ids, "lengths": tf.TensorSpec([None], tf.int32)}}

    def _logits(self, **inputs: Tensor) -> Tensor:
        return self.model(self._checked_ids(inputs["token_ids"]), training=False)

    def _prefilled(self, **inputs: Tensor) -> tuple[Tensor, Tensor, Any, int]:
        token_ids, lengths = self._checked_ids(inputs["token_ids"]), inputs["lengths"]
        rows, width = tf.unstack(tf.shape(token_ids))
        # A row without tokens starts as an empty text does.
        token_ids = tf.concat([token_ids, tf.fill([rows, tf.maximum(1 - width, 0)], self._start_token_id)], axis=1)
        is_start = tf.expand_dims(lengths < 1, 1) & (tf.range(tf.shape(token_ids)[1]) == 0)
        token_ids = tf.where(is_start, self._start_token_id, token_ids)
        lengths = tf.clip_by_value(lengths, 1, tf.shape(token_ids)[1])
        return token_ids, lengths, rows, self.model.config.context_length

    def _checked_ids(self, token_ids: Tensor) -> Tensor:
        """Ids [B, T] of the vocabulary, which fit the context; an InvalidArgument error if they are not."""
        config = self.model.config
        return with_room(checked_ids(token_ids, config.vocab_size), tf.shape(token_ids)[1], config.context_length)
