"""Turns texts into vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lmzoo.data.tokenizers import Tokenizer
from lmzoo.models import LanguageModel
from lmzoo.pipelines.base import EncoderPipeline, Outputs, Tensor, check_task
from lmzoo.tasks import EmbeddingModel

# Where sentence-transformers says how long a text may be.
_SENTENCE_CONFIG = "sentence_bert_config.json"


class TextEmbedder(EncoderPipeline):
    """Vectors of texts, near to one another for texts that mean the same.

    ```python
    embedder = TextEmbedder.from_pretrained("all-minilm-l6-v2")
    vectors = embedder(["A man eats.", "Somebody has dinner.", "Stocks fell."])
    vectors @ vectors.T  # cosines, where the model normalises
    ```

    A str gives a NumPy vector [D] float32, a list of str [B, D], and a tf.string tensor the outputs of the graph. Of a
    checkpoint with the files of sentence-transformers, `from_pretrained` takes pooling, normalisation and `max_length`.

    What is exported has the signatures

    - `serving_default`: text [B] -> embedding [B, D] float32;
    - `tokens`: token_ids and token_type_ids [B, T] int32, padding_mask [B, T] bool -> embedding [B, D] float32.

    Args:
        model: a model of embeddings; of an encoder, the normalised mean of the tokens is taken.
        tokenizer: the one whose ids the model was trained on. It must have an in-graph twin.
        max_length: tokens of a text, special ones included; what is longer loses its end. None is the model's context
            length.

    Raises:
        ValueError: the model is neither, the tokenizer does not fit it, or `max_length` is outside its range.
    """

    _model_output = "embedding"

    def __init__(
        self, model: EmbeddingModel | LanguageModel, tokenizer: Tokenizer, max_length: int | None = None
    ) -> None:
        if isinstance(model, LanguageModel):
            model = EmbeddingModel(model)
        check_task(self, model, EmbeddingModel)
        super().__init__(model, tokenizer, max_length)

    @classmethod
    def _load_model(cls, directory: Path, dtype: Any) -> Any:
        return EmbeddingModel.from_pretrained(directory, dtype=dtype)

    @classmethod
    def _checkpoint_settings(cls, directory: Path) -> dict[str, Any]:
        file = directory / _SENTENCE_CONFIG
        if not file.is_file():
            return {}
        return {"max_length": json.loads(file.read_text(encoding="utf-8")).get("max_seq_length")}

    def __call__(self, text: Any, *, batch_size: int = 32) -> Any:
        """The vector of each text.

        Args:
            text: a str, an iterable of str, or a tf.string tensor [B].
            batch_size: texts of a list that go through the model at a time.

        Raises:
            TypeError: a text is not a str.
        """
        vectors = self._call(self._run, {"text": text}, batch_size)
        if not isinstance(vectors, list):
            return vectors
        return np.stack(vectors) if vectors else np.zeros((0, self.model.config.model_dim), np.float32)

    def _result(self, row: dict[str, Any], texts: tuple[str, ...]) -> np.ndarray:
        return row["embedding"]

    def _outputs(self, *texts: Tensor) -> Outputs:
        encodings = self._graph_tokenizer.encode_pairs(texts[0], max_length=self.max_length)
        return {"embedding": self.model(self._batch(encodings.token_ids, encodings.token_type_ids), training=False)}
