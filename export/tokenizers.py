"""Convert checkpoints' tokenizers to `tokenizers` objects, whose format the runtime reads, and make synthetic ones.

They are built directly from vocabulary and merge rules. A library's tokenizer classes have changed, between versions,
what they make of the same files, while the ids that a checkpoint was trained with have not changed.
"""

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from moma_rt.errors import CheckpointError
from moma_rt.files import atomic_write

Vocabulary = Mapping[str, int]
Merges = list[tuple[str, str]]
_Result = TypeVar("_Result")

_CLIP_BEGIN, _CLIP_END = "<|startoftext|>", "<|endoftext|>"
# CLIP's own pattern: contractions, runs of letters, single digits, runs of anything else.
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_END_OF_WORD = "</w>"
_SPACE = "▁"
_LLAMA_UNKNOWN, _LLAMA_BEGIN, _LLAMA_END = "<unk>", "<s>", "</s>"

# Each is one token of both synthetic tokenizers; other words are split into letters and common prefixes.
_WORDS = (
    *("photo", "of", "a", "an", "the", "car", "teddy", "bear", "dog", "cat", "hat", "in", "on", "with", "and", "new"),
    *("image", "same", "sculpture", "autumn", "leaves", "falling", "beach", "snow", "street", "table", "red", "blue"),
)
_LANGUAGE_MODEL_WORDS = ("USER", "ASSISTANT", "A", "Describe")


def text_tokenizer(folder: Path) -> Tokenizer:
    """Read CLIP's tokenizer from a diffusers `tokenizer/` folder: vocab.json and merges.txt, else tokenizer.json.

    It lowercases, adds the begin and end tokens, and has padding enabled with the pad token, but no fixed length.

    Raises:
        CheckpointError: files are missing, corrupt or not CLIP's.
    """
    vocabulary_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    names = {"bos_token": _CLIP_BEGIN, "eos_token": _CLIP_END, "pad_token": _CLIP_END, **_special_tokens(folder)}
    if vocabulary_file.is_file() and merges_file.is_file():
        vocabulary, merges = _parsed(
            lambda: BPE.read_file(str(vocabulary_file), str(merges_file)), f"{vocabulary_file} and {merges_file.name}"
        )
        missing = [name for name in names.values() if name not in vocabulary]
        if missing:
            raise CheckpointError(f"{vocabulary_file} is no CLIP vocabulary: it has no {', '.join(missing)}")
        return _parsed(functools.partial(_clip, vocabulary, merges, names), str(merges_file))
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"no tokenizer in {folder}: neither vocab.json and merges.txt nor tokenizer.json")
    tokenizer = _parsed(lambda: Tokenizer.from_file(str(folder / "tokenizer.json")), str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    pad = tokenizer.token_to_id(names["pad_token"])
    if len(tokenizer.encode("").ids) != 2 or pad is None:
        raise CheckpointError(f"{folder / 'tokenizer.json'} is no CLIP tokenizer: it must add a begin and an end token")
    tokenizer.enable_padding(pad_id=pad, pad_token=names["pad_token"])
    return tokenizer


def language_tokenizer(folder: Path) -> Tokenizer:
    """Read Llama's tokenizer from a LLaVA folder: sentencepiece's tokenizer.model, else tokenizer.json.

    It adds only the begin token, does not split at spaces, and encodes unknown characters as bytes.

    Raises:
        CheckpointError: files are missing, corrupt or not Llama's.
    """
    model = folder / "tokenizer.model"
    if model.is_file():
        return _from_sentencepiece(model)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"no tokenizer in {folder}: neither tokenizer.model nor tokenizer.json")
    tokenizer = _parsed(lambda: Tokenizer.from_file(str(path)), str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if len(tokenizer.encode("").ids) != 1:
        raise CheckpointError(f"{path} is no Llama tokenizer: it must add a begin token and no end token")
    return tokenizer


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
    names = {"bos_token": _CLIP_BEGIN, "eos_token": _CLIP_END, "pad_token": _CLIP_END}
    return _clip(_numbered(tokens), merges, names)


def synthetic_language_tokenizer() -> Tokenizer:
    """Make a Llama-like tokenizer of some 480 ids that knows a few words, always the same."""
    merges = _merges_of([_SPACE, *word] for word in (*_WORDS, *_LANGUAGE_MODEL_WORDS))
    control = [_LLAMA_UNKNOWN, _LLAMA_BEGIN, _LLAMA_END]
    characters = [_SPACE, *map(chr, range(0x21, 0x7F))]
    tokens = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *map("".join, merges), *characters]
    special = [AddedToken(token, normalized=False, special=True) for token in control]
    return _llama(_numbered(tokens), merges, special, _LLAMA_BEGIN)


def _clip(vocabulary: Vocabulary, merges: Merges, names: Mapping[str, str]) -> Tokenizer:
    """Build CLIP's tokenizer; `names` maps bos_token, eos_token and pad_token to their text."""
    end, begin, pad = names["eos_token"], names["bos_token"], names["pad_token"]
    model = BPE(dict(vocabulary), merges, unk_token=end, continuing_subword_prefix="", end_of_word_suffix=_END_OF_WORD)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in (begin, end)])
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, vocabulary[end]), (begin, vocabulary[begin]), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.enable_padding(pad_id=vocabulary[pad], pad_token=pad)
    return tokenizer


def _llama(vocabulary: Vocabulary, merges: Merges, special: list[AddedToken], begin: str) -> Tokenizer:
    tokenizer = Tokenizer(BPE(dict(vocabulary), merges, unk_token=_LLAMA_UNKNOWN, fuse_unk=True, byte_fallback=True))
    # Sentencepiece does not split text before merging: rules may join characters across a space.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer.add_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, vocabulary[begin])]
    )
    return tokenizer


def _from_sentencepiece(path: Path) -> Tokenizer:
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
    whole = (kinds.UNKNOWN, kinds.CONTROL, kinds.USER_DEFINED)
    vocabulary = _numbered(piece.piece for piece in model.pieces)
    special = [
        AddedToken(piece.piece, normalized=False, special=piece.type != kinds.USER_DEFINED)
        for piece in model.pieces
        if piece.type in whole
    ]
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == kinds.NORMAL}
    build = functools.partial(_llama, vocabulary, _merges_of_scores(scores), special, model.pieces[begin].piece)
    return _parsed(build, str(path))


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


def _special_tokens(folder: Path) -> dict[str, str]:
    """Return those of bos_token, eos_token and pad_token that the folder's special_tokens_map.json names."""
    path = folder / "special_tokens_map.json"
    if not path.is_file():
        return {}
    content: Any = _parsed(lambda: json.loads(path.read_text(encoding="utf-8")), str(path))
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    tokens = {}
    for key in ("bos_token", "eos_token", "pad_token"):
        token = content.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            tokens[key] = text
    return tokens


def _parsed(parse: Callable[[], _Result], what: str) -> _Result:
    """Call a parser whose library raises bare Exception or protobuf's own errors; turn these into CheckpointError."""
    try:
        return parse()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"cannot read the tokenizer {what}: {reason}") from None
