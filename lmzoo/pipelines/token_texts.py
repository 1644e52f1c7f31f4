"""How the tokens of a vocabulary read."""

from __future__ import annotations

from typing import NamedTuple

from lmzoo.data.tokenizers import Tokenizer


class TokenTexts(NamedTuple):
    """The text of each token of a vocabulary, by id.

    Args:
        alone: as a text that has nothing else: "##ing", " the" with byte-level BPE.
        inside: as it reads behind another token: "ing", " the".
        continues: whether it can only go on with a word, as "##ing" does; all False where a vocabulary does not say so.
    """

    alone: list[str]
    inside: list[str]
    continues: list[bool]


def token_texts(tokenizer: Tokenizer) -> TokenTexts:
    """Asks the tokenizer for the text of each of its tokens."""
    ids = range(tokenizer.vocab_size)
    alone = tokenizer.decode([[index] for index in ids], skip_special_tokens=False)
    anchor = next((index for index in ids if alone[index].isascii() and alone[index].isalnum()), 0)
    both = tokenizer.decode([[anchor, index] for index in ids], skip_special_tokens=False)
    inside = [text[len(alone[anchor]) :] for text in both]
    # WordPiece marks what continues a word, and the mark is not in the text.
    marked = tokenizer.kind == "wordpiece"
    continues = [
        marked and text != after and not after.startswith(" ") for text, after in zip(alone, inside, strict=True)
    ]
    return TokenTexts(list(alone), inside, continues)
