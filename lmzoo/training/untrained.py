"""Checkpoints to begin with where nothing has been pretrained."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras

from lmzoo.data.tokenizers import Tokenizer
from lmzoo.models import find_preset
from lmzoo.training.building import with_tokenizer


def make_untrained(
    directory: str | os.PathLike[str],
    preset: str,
    texts: Iterable[str],
    *,
    vocab_size: int | None = None,
    seed: int = 0,
    **shape: Any,
) -> Path:
    """Writes a checkpoint of random weights, with a tokenizer that is trained on texts.

    ```python
    start = make_untrained("start", "t5-small", texts, vocab_size=8000, num_layers=3, model_dim=256)
    lmzoo.finetune(task="text-to-text", model=start, train="pairs.jsonl", directory="run")
    ```

    Args:
        directory: where it goes; a checkpoint that is there is replaced.
        preset: whose shape the model has.
        texts: to train a tokenizer on, of the kind usual for the architecture.
        vocab_size: of the tokenizer.
        seed: of the weights.
        shape: fields of the model's config to replace.

    Returns:
        The directory.
    """
    model_class, config = find_preset(preset)
    tokenizer = Tokenizer.train(iter(texts), kind=model_class.usual_tokenizer(config), vocab_size=vocab_size)
    keras.utils.set_random_seed(seed)
    model = model_class(with_tokenizer(config.replace(**shape), tokenizer))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)
