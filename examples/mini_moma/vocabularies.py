"""Small tokenizers in the formats of CLIP and Llama, trained on the texts that prompts are made of."""

import json
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from examples.mini_moma.backgrounds import CONTEXTS
from examples.mini_moma.scenes import TEXTURES, context_prompt, texture_prompt, with_article
from export.tokenizers import synthetic_text_tokenizer
from moma_rt.files import atomic_write
from moma_rt.inputs.tokenizers import text_prompt

# Of CLIP's, besides 512 symbols and two control tokens.
_TEXT_MERGES = 640
_LANGUAGE_TOKENS = 720
_END_OF_WORD = "</w>"
_CONTROL = ("<|startoftext|>", "<|endoftext|>")
# Words of everyday subjects that the icons' names may lack.
_MORE_NAMES = ("coffee cup", "thing", "object", "toy", "animal", "dog", "cat", "person", "chair", "shoe", "bag", "vase")


def train_tokenizers(folder: Path, names: Sequence[str]) -> None:
    """Write CLIP's files to `folder`/text and Llama's to `folder`/language, unless they exist.

    Args:
        names: the subjects that training sees.
    """
    if (folder / "language" / "tokenizer_config.json").exists():
        return
    names = sorted({*names, *_MORE_NAMES})
    for part in ("text", "language"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    _train_text(folder / "text", [text_prompt(name, prompt) for name, prompt in _prompts(names)])
    _train_language(folder / "language", [_language_text(name, prompt) for name, prompt in _prompts(names)])


def _prompts(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every name in one phrase of every context and texture, in turn."""
    for index, name in enumerate(names):
        for phrases in CONTEXTS.values():
            yield name, context_prompt(name, phrases[index % len(phrases)])
        for phrases in TEXTURES.values():
            yield name, texture_prompt(name, phrases[index % len(phrases)])


def _language_text(name: str, prompt: str) -> str:
    return f"A photo of {with_article(name)}. Describe a new image of the same {name} in: {prompt}. USER: ASSISTANT: *"


def _train_text(folder: Path, texts: Sequence[str]) -> None:
    """Train byte-level BPE, numbered as CLIP's: bytes, bytes that end a word, merges, control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=_END_OF_WORD))
    clip = synthetic_text_tokenizer()
    tokenizer.normalizer, tokenizer.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    # Given as special tokens, symbols that end a word have fixed numbers, by which the trainer chooses among equally
    # frequent pairs; else these would come from the order of a hash table, another in every run.
    ends = [symbol + _END_OF_WORD for symbol in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + len(ends) + _TEXT_MERGES,
        initial_alphabet=alphabet,
        special_tokens=ends,
        end_of_word_suffix=_END_OF_WORD,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*alphabet, *ends, *map("".join, merges), *_CONTROL]
    _write_json(folder / "vocab.json", {token: index for index, token in enumerate(dict.fromkeys(tokens))})
    with atomic_write(folder / "merges.txt") as temporary:
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    begin, end = _CONTROL
    config = {"bos_token": begin, "eos_token": end, "pad_token": end, "unk_token": end, "model_max_length": 77}
    _write_json(folder / "tokenizer_config.json", {**config, "tokenizer_class": "CLIPTokenizer"})


def _train_language(folder: Path, texts: Sequence[str]) -> None:
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=_LANGUAGE_TOKENS,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    with atomic_write(folder / "tokenizer.model") as temporary:
        temporary.write_bytes(model.getvalue())
    config = {"add_bos_token": True, "add_eos_token": False, "legacy": False, "tokenizer_class": "LlamaTokenizer"}
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, content: object) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
