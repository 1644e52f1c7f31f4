"""What a model tells of itself in the README.md of its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmzoo import __version__
from lmzoo.checkpoints import ModelCard

# End of the name of a class of transformers -> what such a model does, as the Hugging Face hub names it.
_TASKS = {
    "ElectraForPreTraining": "feature-extraction",
    "ForPreTraining": "fill-mask",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForConditionalGeneration": "text2text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}

_USAGE = """\
```python
import numpy as np
from {module} import {loader}

model = {loader}(".")  # The directory of this file.
token_ids = np.array([[0, 1, 2]], "int32")
outputs = {call}
```

Or with transformers:

```python
from transformers import {hugging_face}

model = {hugging_face}.from_pretrained(".")
```"""


def readme(
    model: Any,
    config: Mapping[str, Any],
    *,
    loader: str = "lmzoo.models.load_pretrained",
    task: str | None = None,
    library: str = "transformers",
) -> str:
    """Content of README.md: what `model.card` says, and what the model knows.

    Args:
        model: a language model, or one for a task on top of it.
        config: content of its config.json.
        loader: function that opens the checkpoint.
        task: what it does, as the Hugging Face hub names it; None goes by config.json.
        library: whose layout the checkpoint has.
    """
    hugging_face = config["architectures"][0]
    if task is None:
        task = next((task for end, task in _TASKS.items() if hugging_face.endswith(end)), "feature-extraction")
    module, _, function = loader.rpartition(".")
    kind = type(model).__name__
    writes = task in ("text-generation", "text2text-generation")
    call = "model.generate(token_ids, max_new_tokens=16, seed=1)" if writes else 'model({"token_ids": token_ids})'
    facts = {
        "Class": f"{kind} of lmzoo {__version__}, {hugging_face} of transformers",
        "Parameters": f"{model.count_params():,}",
        "Vocabulary": f"{model.config.vocab_size:,} tokens",
        "Context": f"{model.config.context_length:,} tokens",
        "Weights": str(config["dtype"]),
    }
    return (model.card or ModelCard()).render(
        name=kind,
        task=task,
        library=library,
        tags=("lmzoo", "keras", model.config.model_type),
        facts=facts,
        usage=_USAGE.format(module=module, loader=function, hugging_face=hugging_face, call=call),
    )
