"""Text to text: a model with an encoder and a decoder learns to write a text for each source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf

from lmzoo.checkpoints import CheckpointError
from lmzoo.data.corruption import SentinelFacts
from lmzoo.data.labelled import Examples
from lmzoo.data.records import Records
from lmzoo.data.text_to_text import Mixture, encode_text_to_text, pack_pairs
from lmzoo.data.tokenizers import Tokenizer
from lmzoo.generation import BeamOptions, SamplingOptions
from lmzoo.models import Seq2SeqLM, find_architecture
from lmzoo.models.describe import readme
from lmzoo.training.building import TABLES
from lmzoo.training.finetune_recipe import Outputs, TaskRecipe
from lmzoo.training.metrics import Scores, text_scores


@dataclass(frozen=True, eq=False)
class WrittenExamples(Examples):
    """Pairs of a source and a target, to be scored by what is written.

    Args:
        targets: texts of the targets, whole.
        tokenizer: makes texts of what is written.
    """

    targets: list[str]
    tokenizer: Tokenizer

    def texts(self, outputs: Outputs) -> list[str]:
        """The texts that were written."""
        return self.tokenizer.decode([row.tolist() for row in outputs])  # type: ignore[return-value]


class TextToText(TaskRecipe):
    """A text for a text: a translation, a summary, an answer. Each source of the training part is a task of its own."""

    usual_metric = "bleu"

    def longest(self, directory: Path) -> int:
        """What the settings say: the positions of such models are relative."""
        return self.config.length

    def load(self, directory: Path, **options: Any) -> Seq2SeqLM:
        """The whole model.

        Raises:
            CheckpointError: the checkpoint is of a model that does not answer texts with texts.
        """
        model_class = find_architecture(directory)
        if not issubclass(model_class, Seq2SeqLM):
            raise CheckpointError(
                f"{directory} holds a {model_class.__name__}, but text-to-text needs an encoder and a decoder: begin "
                "with a T5."
            )
        return model_class.from_pretrained(directory, **options)

    def encode(self, records: Records, tokenizer: Tokenizer, max_length: int) -> WrittenExamples:
        """A pair of each record, in their order."""
        prefixes = [self._prefix(number) for number in records.sources]
        pairs = self._pairs(records, prefixes, tokenizer, max_length)
        assert self.label is not None
        return WrittenExamples(**vars(pairs), targets=records.texts(self.label), tokenizer=tokenizer)

    def encode_training(self, records: Records, tokenizer: Tokenizer, max_length: int) -> Examples:
        """The tasks, packed if asked to, and mixed if there are several."""
        config = self.config
        tasks = []
        for number in sorted(set(records.sources)):
            own = records.take(place for place, source in enumerate(records.sources) if source == number)
            pairs = self._pairs(own, self._prefix(number), tokenizer, max_length)
            tasks.append(pack_pairs(pairs, max_length, config.max_target_length) if config.packing else pairs)
        if len(tasks) == 1:
            return tasks[0]
        return Mixture.of(tasks, cap=config.mixing_cap, temperature=config.mixing_temperature)

    def generation_config(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """How texts are written, as transformers reads it, and the prefix if there is one for all."""
        config = self.config
        settings: dict[str, Any] = {
            "decoder_start_token_id": SentinelFacts.of(tokenizer).start_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "max_new_tokens": config.max_new_tokens or config.max_target_length,
        }
        if config.num_beams > 1:
            settings |= {"num_beams": config.num_beams, "length_penalty": config.length_penalty}
        if len(config.prefix) == 1:
            settings["prefix"] = config.prefix[0]
        return settings

    def readme(self, model: Seq2SeqLM, config: Mapping[str, Any]) -> str:
        """As the model writes it itself."""
        return readme(model, config)

    def optimizer_arguments(self, model: Seq2SeqLM) -> dict[str, Any]:
        """The learning rate of the tables of tokens."""
        rate = self.config.embedding_rate
        return {} if rate == 1.0 else {"learning_rate_factors": {TABLES: rate}}

    def compile_arguments(self, examples: Examples) -> dict[str, Any]:
        """Label smoothing and z-loss."""
        return {"label_smoothing": self.config.label_smoothing, "z_loss": self.config.z_loss}

    def outputs(self, model: Seq2SeqLM, inputs: dict[str, tf.Tensor]) -> tf.Tensor:
        """The tokens that the model writes for each source: [B, max_new_tokens]."""
        config = self.config
        source = {name: inputs[name] for name in ("token_ids", "padding_mask")}
        prompts, lengths = model.start_tokens(tf.shape(source["token_ids"])[0])
        length = config.max_new_tokens or config.max_target_length
        if config.num_beams == 1:
            decoder = model.decoder(length, SamplingOptions(temperature=0.0))
            return decoder(prompts, lengths, source=source).token_ids
        beams = BeamOptions(num_beams=config.num_beams, length_penalty=config.length_penalty)
        return model.beam_decoder(length, beams)(prompts, lengths, source=source).token_ids[:, 0]

    def scores(self, examples: WrittenExamples, outputs: Outputs) -> Scores:
        """sacreBLEU, chrF, ROUGE and exact matches of what is written."""
        return text_scores(examples.targets, examples.texts(outputs))

    def predictions(self, examples: WrittenExamples, outputs: Outputs) -> list[dict[str, Any]]:
        """The text that is written."""
        return [{"prediction": text} for text in examples.texts(outputs)]

    def _prefix(self, source: int) -> str:
        """What stands in front of the texts of a source, by its number."""
        prefixes = self.config.prefix or ("",)
        return prefixes[source] if len(prefixes) > 1 else prefixes[0]

    def _pairs(self, records: Records, prefix: str | list[str], tokenizer: Tokenizer, max_length: int) -> Examples:
        assert self.label is not None
        return encode_text_to_text(
            records,
            tokenizer,
            source=self.text,
            target=self.label,
            prefix=prefix,
            max_source_length=max_length,
            max_target_length=self.config.max_target_length,
        )
