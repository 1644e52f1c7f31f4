"""Makes tests/golden/bert/: small checkpoints of BERT and its kin, and what transformers computes with them.

So tests need neither torch nor transformers. Run it with the `parity` extra installed:

    python tests/golden/make_bert_golden.py

The parity tests use `reference` live, on configurations that nobody chose.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

DIRECTORY = Path(__file__).parent / "bert"
NAMES = {
    "distilbert": {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
    }
}
# Case -> model_type, the classes of transformers for it, and the shape.
SHAPE = {
    "vocab_size": 31,
    "max_position_embeddings": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 8,
    "intermediate_size": 12,
}
CASES = {
    "bert": ("bert", SHAPE),
    "bert-other": ("bert", {**SHAPE, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3, "type_vocab_size": 3}),
    "roberta": ("roberta", {**SHAPE, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "distilbert": ("distilbert", SHAPE),
    "albert": ("albert", {**SHAPE, "embedding_size": 6, "type_vocab_size": 2}),
    "electra": ("electra", {**SHAPE, "embedding_size": 6}),
    "electra-generator": ("electra", {**SHAPE, "embedding_size": 6}),
}
HEADS = {
    "bert": "BertForPreTraining",
    "roberta": "RobertaForMaskedLM",
    "distilbert": "DistilBertForMaskedLM",
    "albert": "AlbertForPreTraining",
    "electra": "ElectraForPreTraining",
    "electra-generator": "ElectraForMaskedLM",
}


def make_model(model_type, seed, head=None, **shape):
    """A model of transformers in float32, in evaluation mode, whose every weight, biases included, is random."""
    import torch
    import transformers

    torch.manual_seed(seed)
    names = NAMES.get(model_type, {})
    config = transformers.AutoConfig.for_model(model_type, **{names.get(name, name): shape[name] for name in shape})
    model = getattr(transformers, head or HEADS[model_type])(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def make_batch(seed, vocab_size, num_types, rows, length, padding):
    """A batch of pairs with padding on the "left", the "right", or no side (None), and as many hidden tokens a row.

    No id is that of padding, whose row torch leaves out of the gradient.
    """
    random = np.random.default_rng(seed)
    token_ids, labels = random.integers(2, vocab_size, (2, rows, length)).astype("int32")
    mask = np.ones((rows, length), bool)
    for row in range(rows if padding else 0):
        size = int(random.integers(0, length))
        mask[row, slice(0, size) if padding == "left" else slice(length - size, length)] = False
    count = int(mask.sum(1).min())
    places = [random.choice(np.flatnonzero(each), count, replace=False) for each in mask]
    types = np.sort(random.integers(0, max(num_types, 1), (rows, length)), axis=1).astype("int32")
    places = np.sort(np.array(places, "int32"), axis=1)
    return {
        "token_ids": token_ids,
        "padding_mask": mask,
        "token_type_ids": types,
        "mask_positions": places,
        "labels": np.take_along_axis(labels, places, axis=1),
        "next_sentence_labels": random.integers(0, 2, rows).astype("int32"),
    }


def reference(model, batch):
    """Hidden states, logits, losses, pooled vectors and gradients by name, as transformers has them."""
    import torch

    tensors = {name: torch.tensor(value).long() for name, value in batch.items()}
    model_type = model.config.model_type
    positions = (tensors["padding_mask"].cumsum(1) - 1).clamp(min=0)
    inputs = {"attention_mask": tensors["padding_mask"], "output_hidden_states": True}
    if model_type != "distilbert":
        inputs["token_type_ids"] = tensors["token_type_ids"]
        offset = model.config.pad_token_id + 1 if model_type == "roberta" else 0
        inputs["position_ids"] = positions + offset
    else:  # It takes no positions: give it the vectors that are looked up by position already.
        table = model.distilbert.embeddings.position_embeddings
        by_place = torch.arange(positions.shape[1])
        words = model.distilbert.embeddings.word_embeddings(tensors["token_ids"])
        inputs["inputs_embeds"] = words + table(positions) - table(by_place)
    if "inputs_embeds" not in inputs:
        inputs["input_ids"] = tensors["token_ids"]
    model.zero_grad()
    output = model(**inputs)
    if output.get("logits") is not None and output.logits.dim() == 2:
        return _answers(model, output, {}, *_detection(output.logits, tensors))
    logits = output.prediction_logits if "prediction_logits" in output else output.logits
    rows = torch.arange(len(positions)).unsqueeze(1)
    loss = torch.nn.functional.cross_entropy(
        logits[rows, tensors["mask_positions"]].flatten(0, 1), tensors["labels"].flatten()
    )
    answers = {"masked_lm_loss": loss}
    sentence_logits = output.get("seq_relationship_logits", output.get("sop_logits"))
    if sentence_logits is not None:
        answers["next_sentence_logits"] = sentence_logits
        if model_type == "albert":
            answers["pooled"] = model.albert.pooler(output.hidden_states[-1][:, 0]).tanh()
        else:
            answers["pooled"] = model.bert.pooler(output.hidden_states[-1])
        answers["next_sentence_loss"] = torch.nn.functional.cross_entropy(
            sentence_logits, tensors["next_sentence_labels"]
        )
        loss = loss + answers["next_sentence_loss"]
    return _answers(model, output, answers, logits, loss)


def _detection(logits, tensors):
    """Scores of replaced tokens, and their mean loss, as if all odd ids had been replaced."""
    import torch

    mask = tensors["padding_mask"].bool()
    labels = (tensors["token_ids"] % 2).float()
    return logits, torch.nn.functional.binary_cross_entropy_with_logits(logits[mask], labels[mask])


def _answers(model, output, answers, logits, loss):
    loss.backward()
    answers |= {"logits": logits, "loss": loss}
    answers |= {f"hidden.{number}": state for number, state in enumerate(output.hidden_states)}
    for name, parameter in model.base_model.named_parameters():
        if parameter.grad is not None:
            answers[f"gradient.{name}"] = parameter.grad
    return {name: value.detach().numpy() for name, value in answers.items()}


def main():
    """Writes checkpoint, batch and answers of each case."""
    import safetensors.numpy

    for seed, (name, (model_type, shape)) in enumerate(CASES.items(), 2):
        model = make_model(model_type, seed, head=HEADS[name if name in HEADS else model_type], **shape)
        model.save_pretrained(DIRECTORY / name)
        batch = make_batch(
            seed, shape["vocab_size"], shape.get("type_vocab_size", 2), 3, 7, padding=("right", "left")[seed % 2]
        )
        answers = reference(model, batch)
        kept = [key for key in answers if not key.startswith("gradient.") or "embeddings.Lay" in key or ".query" in key]
        kept += [key for key in answers if key.endswith("word_embeddings.weight") or "layer.0.attention.q_lin" in key]
        answers = {key: np.ascontiguousarray(answers[key]) for key in kept}
        safetensors.numpy.save_file({**batch, **answers}, DIRECTORY / name / "answers.safetensors")
    total = sum(path.stat().st_size for path in DIRECTORY.rglob("*") if path.is_file())
    print(f"{DIRECTORY}: {total} bytes in {len(os.listdir(DIRECTORY))} cases")


if __name__ == "__main__":
    main()
