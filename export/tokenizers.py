"""Convert checkpoints' tokenizers to `tokenizers` objects, whose format the runtime reads, and make synthetic ones.

They are built directly from vocabulary and merge rules. A library's tokenizer classes have changed, between versions,
what they make of the same files, while the ids that a checkpoint was trained with have not changed.
"""

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from export.added_tokens import (
    CONFIG_NAME,
    check_embeddings,
    number_tokens,
    read_json_object,
    read_tokens,
    tokens_with_embeddings,
)
from moma_rt.errors import CheckpointError
from moma_rt.files import atomic_write

Vocabulary = Mapping[str, int]
Merges = list[tuple[str, str]]
_Result = TypeVar("_Result")

_CLIP_FILES = (("vocab.json", "merges.txt"), ("tokenizer.json",))
_WHOLE = "tokenizer.json"
_CLIP_BEGIN, _CLIP_END = "<|startoftext|>", "<|endoftext|>"
_CLIP_NAMES = MappingProxyType(
    {"eos_token": _CLIP_END, "bos_token": _CLIP_BEGIN, "pad_token": _CLIP_END, "unk_token": _CLIP_END}
)
# The original reads prompts with CLIPTokenizer of transformers 4, the one written in Python, without the package ftfy.
# It removes control and format characters, private and unassigned ones;
_REMOVED = r"[[\p{C}\x{FFFD}]&&[^\t\n\r]]"
# lowercases as Python does, with a sigma of its own at the end of a word;
_CASED, _SKIPPED = r"[\p{Cased}&&\P{Case_Ignorable}]", r"\p{Case_Ignorable}*"
_FINAL_SIGMA = rf"{_CASED}{_SKIPPED}\KΣ(?!{_SKIPPED}{_CASED})"
# sets CJK characters apart, in exactly these blocks;
_CJK = r"\x{3400}-\x{4DBF}\x{4E00}-\x{9FFF}\x{F900}-\x{FAFF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2CEAF}\x{2F800}-\x{2FA1F}"
# and then takes contractions, runs of letters, single digits, and runs of anything else. It ignores case once more,
# although all is lowercase: that lets a long s stand for an s, and loses the iota below, whose capital is a letter.
_CLIP_WORDS = (
    r"<\|[sſ]tartoftext\|>|<\|endoftext\|>|'[sſ]|'t|'re|'ve|'m|'ll|'d|"
    rf"[{_CJK}]|[\p{{L}}&&[^{_CJK}]]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}\x{{345}}]+"
)
_END_OF_WORD = "</w>"
_SPACE = "▁"
_LLAMA_UNKNOWN, _LLAMA_BEGIN, _LLAMA_END = "<unk>", "<s>", "</s>"
_LLAMA_NAMES = MappingProxyType({"unk_token": _LLAMA_UNKNOWN, "bos_token": _LLAMA_BEGIN, "eos_token": _LLAMA_END})
# What the original's sequence begins with, and what it must not end with.
_LLAMA_ADDS = MappingProxyType({"add_bos_token": True, "add_eos_token": False})

# Each is one token of both synthetic tokenizers; other words are split into letters and common prefixes.
_WORDS = (
    *("photo", "of", "a", "an", "the", "car", "teddy", "bear", "dog", "cat", "hat", "in", "on", "with", "and", "new"),
    *("image", "same", "sculpture", "autumn", "leaves", "falling", "beach", "snow", "street", "table", "red", "blue"),
)
_LANGUAGE_MODEL_WORDS = ("USER", "ASSISTANT", "A", "Describe")


def has_text_tokenizer(folder: Path) -> bool:
    """Return whether a folder has the files that `text_tokenizer` reads a vocabulary from."""
    return any(all((folder / name).is_file() for name in names) for names in _CLIP_FILES)


def text_tokenizer(folder: Path, embeddings: int | None = None) -> Tokenizer:
    """Read CLIP's tokenizer from a diffusers `tokenizer/` folder: vocab.json and merges.txt, else tokenizer.json.

    It cleans the text as the original does, adds the begin and end tokens, and has padding enabled with the pad token,
    but no fixed length. Added and special tokens are read from all files that transformers reads them from.

    Args:
        embeddings: how many the text encoder has; None if it is not known. Those beyond the last token are taken for
            padding, with a `MomaWarning`, if they fill up to a multiple of 64.

    Raises:
        CheckpointError: files are missing, corrupt, not CLIP's or contradict each other; or tokens and embeddings do
            not belong together.
    """
    vocabulary, merges, source = _clip_vocabulary(folder)
    found = read_tokens(folder)
    names = {**_CLIP_NAMES, **found.names}
    # Any other special token may be a new one.
    known = {*vocabulary, *(token.content for token in found.tokens if token.id is not None)}
    missing = [names[key] for key in ("bos_token", "eos_token") if names[key] not in known]
    if missing:
        raise CheckpointError(f"{folder} has no CLIP vocabulary: it has no {', '.join(missing)}")
    numbered = number_tokens(vocabulary, found.tokens)
    if embeddings is not None:
        check_embeddings(folder, numbered, found.tokens, embeddings)
    added = {name: AddedToken(name, normalized=False, special=True) for name in names.values()}
    added |= {token.content: token.as_added() for token in found.tokens}
    return _parsed(functools.partial(_clip, numbered, merges, names, list(added.values())), source)


def language_tokenizer(folder: Path, embeddings: int | None = None) -> Tokenizer:
    """Read Llama's tokenizer from a LLaVA folder: sentencepiece's tokenizer.model, else tokenizer.json.

    It adds only the begin token, does not split at spaces, and encodes unknown characters as bytes. Added and special
    tokens are read from all files that transformers reads them from.

    Args:
        embeddings: how many the language model has; None if it is not known. Added tokens without one are left out,
            with a `MomaWarning`: such a pad token is common, and stands in no text.

    Raises:
        CheckpointError: files are missing, corrupt, not Llama's or contradict each other; or the vocabulary has more
            tokens than the language model has embeddings.
    """
    vocabulary, merges, whole = _llama_vocabulary(folder)
    config, found = read_json_object(folder / CONFIG_NAME), read_tokens(folder)
    for key, needed in _LLAMA_ADDS.items():
        if config.get(key, needed) not in (None, needed):
            raise CheckpointError(f"{folder / CONFIG_NAME} has {key} {config[key]!r}; only {needed} is supported")
    tokens = (
        found.tokens if embeddings is None else tokens_with_embeddings(folder, vocabulary, found.tokens, embeddings)
    )
    numbered = number_tokens(vocabulary, tokens)
    names = {**_LLAMA_NAMES, **found.names}
    if names["bos_token"] not in numbered:
        raise CheckpointError(f"{folder} has no Llama tokenizer: its vocabulary has no {names['bos_token']}")
    special = [name for name in names.values() if name in vocabulary]
    added = {name: AddedToken(name, normalized=False, special=True) for name in special}
    added |= {piece: AddedToken(piece, normalized=False) for piece in whole}
    added |= {token.content: token.as_added() for token in tokens}
    legacy = config.get("legacy")
    if legacy is None:
        # The default of the original's transformers. Only later versions write folders without tokenizer.model.
        legacy = (folder / "tokenizer.model").is_file()
    build = functools.partial(_llama, numbered, merges, list(added.values()), names["bos_token"], bool(legacy))
    return _parsed(build, str(folder))


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Write `tokenizer.json` atomically; equal tokenizers make equal files."""
    with atomic_write(path) as temporary:
        temporary.write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")


def synthetic_text_tokenizer() -> Tokenizer:
    """Make a CLIP-like tokenizer of some 610 ids that knows a few words, always the same."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [[*word[:-1], word[-1] + _END_OF_WORD] for word in _WORDS]
    merges = _merges_of(words)
    tokens = [*alphabet, *(letter + _END_OF_WORD for letter in alphabet), *map("".join, merges), _CLIP_BEGIN, _CLIP_END]
    special = [AddedToken(token, normalized=False, special=True) for token in (_CLIP_BEGIN, _CLIP_END)]
    return _clip(_numbered(tokens), merges, _CLIP_NAMES, special)


def synthetic_language_tokenizer() -> Tokenizer:
    """Make a Llama-like tokenizer of some 480 ids that knows a few words, always the same."""
    merges = _merges_of([_SPACE, *word] for word in (*_WORDS, *_LANGUAGE_MODEL_WORDS))
    control = [_LLAMA_UNKNOWN, _LLAMA_BEGIN, _LLAMA_END]
    characters = [_SPACE, *map(chr, range(0x21, 0x7F))]
    tokens = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *map("".join, merges), *characters]
    special = [AddedToken(token, normalized=False, special=True) for token in control]
    return _llama(_numbered(tokens), merges, special, _LLAMA_BEGIN, legacy=False)


def _clip_vocabulary(folder: Path) -> tuple[Vocabulary, Merges, str]:
    """Return CLIP's vocabulary without added tokens, its merge rules, and which files they are from."""
    vocabulary_file, merges_file = (folder / name for name in _CLIP_FILES[0])
    if vocabulary_file.is_file() and merges_file.is_file():
        source = f"{vocabulary_file} and {merges_file.name}"
        vocabulary, merges = _parsed(lambda: BPE.read_file(str(vocabulary_file), str(merges_file)), source)
        return vocabulary, merges, source
    path = folder / _WHOLE
    if not path.is_file():
        raise CheckpointError(f"no tokenizer in {folder}: neither vocab.json and merges.txt nor tokenizer.json")
    model = _model_of(path)
    if model.get("end_of_word_suffix") != _END_OF_WORD:
        raise CheckpointError(f"{path} is no CLIP tokenizer: not byte-pair with words that end in {_END_OF_WORD}")
    return model["vocab"], model["merges"], str(path)


def _model_of(path: Path) -> dict[str, Any]:
    """Return the model in a tokenizer.json: of byte-pair models `vocab` by content and `merges` in pairs."""
    tokenizer = _parsed(lambda: Tokenizer.from_file(str(path)), str(path))
    model = json.loads(tokenizer.to_str())["model"]
    return {**model, "merges": [(left, right) for left, right in model["merges"]]} if "merges" in model else {}


def _clip(vocabulary: Vocabulary, merges: Merges, names: Mapping[str, str], added: list[AddedToken]) -> Tokenizer:
    """Build CLIP's tokenizer; `names` maps bos_token, eos_token, unk_token and pad_token to their text."""
    end, begin, pad, unknown = (names[key] for key in _CLIP_NAMES)
    model = BPE(
        dict(vocabulary), merges, unk_token=unknown, continuing_subword_prefix="", end_of_word_suffix=_END_OF_WORD
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(_REMOVED), ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.NFC(),
            normalizers.Replace(Regex(_FINAL_SIGMA), "ς"),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            # Its own pattern, GPT-2's, would split what CLIP's took as one.
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(added)
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, vocabulary[end]), (begin, vocabulary[begin]), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.enable_padding(pad_id=vocabulary[pad], pad_token=pad)
    return tokenizer


def _llama(vocabulary: Vocabulary, merges: Merges, added: list[AddedToken], begin: str, legacy: bool) -> Tokenizer:
    """Build Llama's tokenizer; `legacy` puts a space before each part of a text, and not only before the first."""
    tokenizer = Tokenizer(BPE(dict(vocabulary), merges, unk_token=_LLAMA_UNKNOWN, fuse_unk=True, byte_fallback=True))
    # Sentencepiece does not split text before merging: rules may join characters across a space.
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer.add_tokens(added)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, vocabulary[begin])]
    )
    return tokenizer


def _llama_vocabulary(folder: Path) -> tuple[Vocabulary, Merges, list[str]]:
    """Return Llama's vocabulary, its merge rules, and the tokens that sentencepiece itself takes whole from a text."""
    if (folder / "tokenizer.model").is_file():
        return _from_sentencepiece(folder / "tokenizer.model")
    path = folder / _WHOLE
    if not path.is_file():
        raise CheckpointError(f"no tokenizer in {folder}: neither tokenizer.model nor tokenizer.json")
    model = _model_of(path)
    if not model.get("byte_fallback") or model.get("end_of_word_suffix"):
        raise CheckpointError(f"{path} is no Llama tokenizer: not byte-pair with byte fallback")
    return model["vocab"], model["merges"], []


def _from_sentencepiece(path: Path) -> tuple[Vocabulary, Merges, list[str]]:
    # Imported here, since nothing else needs its protobuf descriptors.
    from sentencepiece import sentencepiece_model_pb2 as sentencepiece

    model = sentencepiece.ModelProto()
    _parsed(lambda: model.ParseFromString(path.read_bytes()), str(path))
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    begin = trainer.bos_id
    plain = not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces
    bpe = trainer.model_type == sentencepiece.TrainerSpec.BPE and trainer.byte_fallback
    if not (bpe and plain and normalizer.add_dummy_prefix and 0 <= begin < len(model.pieces)):
        raise CheckpointError(f"{path} is no Llama tokenizer: not byte-pair with byte fallback and untouched spaces")
    kinds = sentencepiece.ModelProto.SentencePiece
    vocabulary = _numbered(piece.piece for piece in model.pieces)
    whole = [piece.piece for piece in model.pieces if piece.type == kinds.USER_DEFINED]
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == kinds.NORMAL}
    return vocabulary, _merges_of_scores(scores), whole


def _merges_of_scores(scores: Mapping[str, float]) -> Merges:
    """Convert sentencepiece's rule (merge the neighbors whose union scores highest) to an ordered list of pairs."""
    merges: Merges = []
    # sorted is stable: pieces of equal score stay in the order of their ids.
    for piece in sorted(scores, key=lambda p: -scores[p]):
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [(left, right) for left, right in splits if left in scores and right in scores]
    return merges


def _merges_of(words: Iterable[list[str]]) -> Merges:
    """Return rules that merge each word's symbols from its start, longest words first so that no other cuts them."""
    merges: dict[tuple[str, str], None] = {}
    for symbols in sorted(words, key=lambda s: (-len(s), s)):
        for i in range(1, len(symbols)):
            merges["".join(symbols[:i]), symbols[i]] = None
    return list(merges)


def _numbered(tokens: Iterable[str]) -> Vocabulary:
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def _parsed(parse: Callable[[], _Result], what: str) -> _Result:
    """Call a parser whose library raises bare Exception or protobuf's own errors; turn these into CheckpointError."""
    try:
        return parse()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"cannot read the tokenizer {what}: {reason}") from None
