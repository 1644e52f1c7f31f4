"""The pipeline for whatever a checkpoint holds."""

from __future__ import annotations

import os
from typing import Any

from lmzoo.checkpoints import CheckpointError, find_checkpoint, read_config
from lmzoo.models import CausalLM, MaskedLM, Seq2SeqLM, find_architecture
from lmzoo.pipelines.base import Pipeline
from lmzoo.pipelines.mask_filler import MaskFiller
from lmzoo.pipelines.question_answerer import QuestionAnswerer
from lmzoo.pipelines.text_classifier import TextClassifier
from lmzoo.pipelines.text_embedder import TextEmbedder
from lmzoo.pipelines.text_generator import TextGenerator
from lmzoo.pipelines.text_to_text import TextToText
from lmzoo.pipelines.token_classifier import TokenClassifier
from lmzoo.tasks import TASKS, find_task, sentence_files

_OF_TASK: dict[str, type[Pipeline]] = {
    "sequence": TextClassifier,
    "tokens": TokenClassifier,
    "answers": QuestionAnswerer,
    "embeddings": TextEmbedder,
}
# What the names of classes with a masked-LM head end with.
_MASKED_LM = ("ForMaskedLM", "ForPreTraining")


def find_pipeline(directory: str | os.PathLike[str]) -> type[Pipeline]:
    """The pipeline for a checkpoint or a run, by its task; without one, by whether it continues texts, answers
    them or fills masks.

    Raises:
        CheckpointError: it cannot be read, or no pipeline serves it.
    """
    directory = find_checkpoint(directory)
    model_class = find_architecture(directory)
    if issubclass(model_class, Seq2SeqLM):
        return TextToText
    continues = issubclass(model_class, CausalLM)
    names = read_config(directory).get("architectures") or []
    try:
        task = find_task(directory)
    except CheckpointError:
        if continues:
            return TextGenerator
        if issubclass(model_class, MaskedLM) and any(name.endswith(_MASKED_LM) for name in names):
            return MaskFiller
        raise CheckpointError(
            f"{directory} holds {', '.join(names) or 'a checkpoint that names no class'}, which no pipeline serves as "
            "it is: call from_pretrained of the pipeline that it is meant for."
        ) from None
    pipeline_class = _OF_TASK[next(name for name, task_class in TASKS.items() if task_class is task)]
    # The bare model of an architecture that continues texts has all that is needed for it.
    is_bare = pipeline_class is TextEmbedder and not (directory / sentence_files.MODULES).is_file()
    return TextGenerator if continues and is_bare else pipeline_class


def load_pipeline(directory: str | os.PathLike[str], *, dtype: Any = None, **settings: Any) -> Any:
    """The pipeline for whatever a checkpoint or a run holds; see `find_pipeline` and `Pipeline.from_pretrained`.

    ```python
    load_pipeline("my-classifier")("What a film!")["label"]
    ```

    Args:
        directory: of the checkpoint with its tokenizer, or of the run.
        dtype: Keras dtype or policy of the model.
        settings: arguments of the pipeline's constructor.

    Raises:
        CheckpointError, FileNotFoundError, ValueError: it cannot be read, or no pipeline serves it.
    """
    return find_pipeline(directory).from_pretrained(directory, dtype=dtype, **settings)
