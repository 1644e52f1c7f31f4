"""What stands on an architecture when it is fine-tuned: how its heads pool, and what they are called in checkpoints."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadDropout:
    """Dropout before the output of a head.

    Args:
        name: of its rate in config.json; None if there is no place for it.
        rate: where config.json says nothing; None is the encoder's.
    """

    name: str | None = "classifier_dropout"
    rate: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskHeads:
    """The heads that `transformers` puts on an architecture, so that checkpoints go both ways.

    Args:
        classes: what the names of its classes begin with: "Bert" of "BertForSequenceClassification".
        pools: what a row is classified by: "pooler", or the "first" or "last" token that counts.
        dense: name of a dense layer before the output; None if there is none.
        activation: of that layer.
        drops_first: whether dropout stands before that layer too.
        output: name of the output layer.
        use_bias: whether that has a bias.
        dropout: of the head that classifies rows.
        token_dropout: of the head that classifies tokens; None if it is the same.
    """

    classes: str
    pools: str = "pooler"
    dense: str | None = None
    activation: str = "tanh"
    drops_first: bool = True
    output: str = "classifier"
    use_bias: bool = True
    dropout: HeadDropout = HeadDropout()
    token_dropout: HeadDropout | None = None
