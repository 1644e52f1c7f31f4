"""Answers texts with texts: translations, summaries, whatever an encoder-decoder was trained for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from lmzoo.checkpoints import read_config
from lmzoo.data.tokenizers import Tokenizer
from lmzoo.models import Seq2SeqLM
from lmzoo.models.generative import TEXT_MULTIPLE
from lmzoo.pipelines.attention import MAX_TOKENS
from lmzoo.pipelines.base import padded
from lmzoo.pipelines.generative import GenerativePipeline, Prompts, id_specs, on_ids
from lmzoo.pipelines.guards import checked_ids
from lmzoo.pipelines.scoring import Continuations

Tensor = Any

# What config.json and generation_config.json of a fine-tuned checkpoint say, by their names there -> arguments here.
_SAVED = {
    "prefix": "prefix",
    "max_new_tokens": "max_new_tokens",
    "num_beams": "num_beams",
    "num_return_sequences": "num_return_sequences",
    "num_beam_groups": "num_beam_groups",
    "diversity_penalty": "diversity_penalty",
    "length_penalty": "length_penalty",
    "early_stopping": "early_stopping",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "min_new_tokens": "min_new_tokens",
    "bad_words_ids": "bad_words_ids",
    "suppress_tokens": "suppressed_token_ids",
    "forced_bos_token_id": "forced_bos_token_id",
}
_DRAWS = ("temperature", "top_k", "top_p", "min_p")
_GENERATION_CONFIG = "generation_config.json"


class TextToText(GenerativePipeline):
    """Answers texts. A str gives a str, a list a list, a tf.string tensor a tensor.

    ```python
    translator = TextToText(model, tokenizer, prefix="translate English to German: ", num_beams=4)
    translator("The file is open.")
    translator.n_best("The file is open.")  # with num_return_sequences: several, with their scores
    translator.export("saved_models/translator")
    ```

    From string to string it is one graph, traced once: the encoder reads a text once, and the decoder writes with a
    cache, drawing nothing unless it is told to. A text is read behind the prefix, and before the end token; what does
    not fit `max_length` loses its end. Bytes that are not UTF-8 count as U+FFFD. The new text stops before the end
    token, and before the first stop string.

    `from_pretrained` takes the prefix and the settings of decoding that a checkpoint has in its config.json or
    generation_config.json; arguments come first.

    What is exported has the signatures

    - `serving_default`: text [B] -> text [B], with this pipeline's settings;
    - `generate`: the same, with the optional inputs `seed` (below 0 draws one), `max_new_tokens` and each sampling
      option that the pipeline has on, [1] or [B]. The settings of the pipeline are their defaults;
    - `n_best`, if it searches with beams: as `generate`, -> text [B, n] and score [B, n], best first;
    - `score`: text [B] and continuation [B] -> log_likelihood [B] float32, num_tokens [B] int32, is_greedy [B] bool;
      the end token is not counted;
    - `tokens`: token_ids [B, T] and decoder_token_ids [B, U] int32, padding_mask [B, T] bool -> logits [B, U, V]
      float32, without strings and tables, as the next three;
    - `encode`: token_ids and padding_mask [B, T] -> hidden [B, T, D], what the encoder makes of them;
    - `prefill`: token_ids and padding_mask [B, T] -> logits [B, V] float32 of the first token, and a cache for
      `max_new_tokens` (see `steps`);
    - `decode`: token_ids [B, 1] int32 and a cache -> logits [B, V] float32 and the cache.

    In these four, an id outside the vocabulary is an InvalidArgument error.

    Shapes:
        text: tf.string [B]; options of a call: scalars, or [B] for one a row. Returns tf.string [B].

    Args:
        model: an encoder-decoder.
        tokenizer: the one whose ids the model was trained on. It must have an end token and an in-graph twin.
        max_new_tokens: the most tokens of an answer, >= 1.
        prefix: stands in front of each text and says which task it is.
        max_length: tokens of a text, prefix and end token included. None is the model's context length; there may be
            more, since positions are relative.
        temperature: divides the logits before the draw; 0 is greedy.
        stop_strings: one or several strings that end a text; they are not in it.
        seed: of calls and served requests that give none, >= 0; None draws a new one for each text.
        options: other fields of `SamplingOptions`, such as top_k, forced_bos_token_id, bad_words_ids or min_new_tokens,
            and of `BeamOptions`: num_beams, length_penalty, early_stopping, num_return_sequences and so on.

    Raises:
        ValueError: the model is no encoder-decoder, the tokenizer does not fit it or has no end token, or an argument
            is outside its range.
    """

    def __init__(
        self,
        model: Seq2SeqLM,
        tokenizer: Tokenizer,
        max_new_tokens: int = 128,
        prefix: str = "",
        max_length: int | None = None,
        temperature: float = 0.0,
        *,
        stop_strings: str | Sequence[str] = (),
        seed: int | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, Seq2SeqLM):
            raise ValueError(f"{type(model).__name__} does not answer texts: TextToText needs an encoder-decoder.")
        max_length = model.config.context_length if max_length is None else max_length
        for name, value in (("max_new_tokens", max_new_tokens), ("max_length", max_length)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, but must be an integer of 1 or more.")
        self.prefix, self.max_length = prefix, max_length
        ends = [token for token in (tokenizer.eos_token_id, model.config.eos_token_id) if token is not None]
        if not ends:
            raise ValueError("neither tokenizer nor model has an end token, and a text is read with one behind it.")
        self._source_end = ends[0]
        options["temperature"] = temperature
        super().__init__(model, tokenizer, max_new_tokens, stop_strings=stop_strings, seed=seed, **options)

    @classmethod
    def _checkpoint_settings(cls, directory: Path) -> dict[str, Any]:
        saved = read_config(directory)
        if (directory / _GENERATION_CONFIG).is_file():
            saved |= read_config(directory, _GENERATION_CONFIG)
        settings = {name: saved[key] for key, name in _SAVED.items() if saved.get(key) is not None}
        if saved.get("do_sample"):
            settings |= {"temperature": 1.0} | {name: saved[name] for name in _DRAWS if saved.get(name) is not None}
        return settings

    def _prompts(self, text: Tensor, is_streamed: bool = False) -> Prompts:
        source = self._source(text, TEXT_MULTIPLE if is_streamed else 1)
        token_ids, lengths = self.model.start_tokens(tf.shape(text)[0])
        return Prompts(token_ids, lengths, source)

    def _attend(self, *texts: Tensor) -> tuple[Tensor, Tensor]:
        (text,) = texts
        source = self._source(text, max_length=min(self.max_length, MAX_TOKENS))
        self.model.encode(source, training=False)
        return source["token_ids"], source["padding_mask"]

    def _source(self, text: Tensor, multiple: int = 1, max_length: int | None = None) -> dict[str, Tensor]:
        """Texts [B] as the encoder reads them, [B, T] with T a multiple of `multiple`.

        Args:
            max_length: tokens of a text; None is the pipeline's own number.
        """
        size = (self.max_length if max_length is None else max_length) - 1
        token_ids = self._graph_tokenizer.encode(tf.strings.join([self.prefix, text]))[:, :size]
        end = tf.fill([tf.size(text), 1], self._source_end)
        token_ids = tf.concat([token_ids, end], axis=1)
        width = tf.maximum(-(-token_ids.bounding_shape(axis=1) // multiple), 1) * multiple
        mask = tf.sequence_mask(token_ids.row_lengths(), width)
        return {"token_ids": padded(token_ids, self.model.config.pad_token_id or 0, width), "padding_mask": mask}

    def _continuations(self, text: Tensor, continuation: Tensor) -> Continuations:
        token_ids = self._graph_tokenizer.encode(continuation)
        start = tf.fill([tf.size(text), 1], self.model.config.start_token_id)
        labels = token_ids.to_tensor()
        batch = {**self._source(text), "decoder_token_ids": tf.concat([start, labels], axis=1)[:, :-1]}
        return Continuations(batch, labels, tf.sequence_mask(token_ids.row_lengths(), tf.shape(labels)[1]))

    # ---- signatures on ids

    def _id_specs(self) -> dict[str, dict[str, tf.TensorSpec]]:
        source = id_specs(token_ids=tf.int32, padding_mask=tf.bool)
        return {"tokens": {**source, **id_specs(decoder_token_ids=tf.int32)}, "prefill": source}

    def _signatures(self) -> dict[str, Any]:
        encode = on_ids(
            lambda **inputs: {"hidden": self.model.encode(self._checked_ids(inputs), training=False)},
            self._id_specs()["prefill"],
        )
        return {**super()._signatures(), "encode": encode}

    def _logits(self, **inputs: Tensor) -> Tensor:
        return self.model(self._checked_ids(inputs), training=False)

    def _prefilled(self, **inputs: Tensor) -> tuple[Tensor, Tensor, Any, int]:
        token_ids, lengths = self.model.start_tokens(tf.shape(inputs["token_ids"])[0])
        return token_ids, lengths, self._checked_ids(inputs), self.max_new_tokens

    def _checked_ids(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs whose ids are of the vocabulary; an InvalidArgument error if they are not."""
        size = self.model.config.vocab_size
        return {name: checked_ids(each, size) if each.dtype == tf.int32 else each for name, each in inputs.items()}
