"""The added and special tokens of a tokenizer's folder, which transformers spreads over up to four files.

Read as transformers 4 and 5 read them: if tokenizer_config.json has an `added_tokens_decoder`, only it and the special
tokens in the same file count. Otherwise special_tokens_map.json overrides tokenizer_config.json, and tokenizer.json
overrides added_tokens.json.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from moma_rt.errors import CheckpointError
from moma_rt.messages import first_line, short_repr, warn

CONFIG_NAME = "tokenizer_config.json"
_MAP_NAME, _ADDED_NAME, _WHOLE_NAME = "special_tokens_map.json", "added_tokens.json", "tokenizer.json"
# In this order transformers gives ids to special tokens that have none.
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What versions 4 and 5 call the other special tokens.
_OTHER_SPECIAL = ("additional_special_tokens", "extra_special_tokens")
# What transformers' resize_token_embeddings is usually told to pad to.
_PADDING = 64
_STRIPS = ("lstrip", "rstrip", "single_word")


@dataclass(frozen=True)
class FoundToken:
    """A token at which a text is split before anything else is done to it, and the file that names it.

    `id` is None if no file gives one. `strips` are the options of `AddedToken` that say what is around it.
    """

    content: str
    id: int | None
    file: Path
    strips: Mapping[str, bool]
    special: bool

    def as_added(self) -> AddedToken:
        """For a `Tokenizer`. Not normalized: the original looks for added tokens in the text as it was typed."""
        return AddedToken(self.content, normalized=False, special=self.special, **self.strips)


@dataclass(frozen=True)
class FoundTokens:
    """What a folder says of its tokens: those it adds to the vocabulary, and the names of the special ones.

    `names` maps bos_token, eos_token, pad_token and so on to their content, where the folder names them. `tokens` has
    those with ids first, and each content once.
    """

    names: Mapping[str, str]
    tokens: tuple[FoundToken, ...]


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object, empty if there is no such file.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read the tokenizer {path}: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


def read_tokens(folder: Path) -> FoundTokens:
    """Read the added and special tokens of a tokenizer's folder; it may have none of the files.

    Raises:
        CheckpointError: a file is corrupt, or an entry is no token.
    """
    path = folder / CONFIG_NAME
    config = read_json_object(path)
    if "added_tokens_decoder" in config:
        special = dict(_special(config, path))
        numbered = {token.id: token for token in _decoder(config["added_tokens_decoder"], path)}
    else:
        map_file = folder / _MAP_NAME
        special = {**dict(_special(config, path)), **dict(_special(read_json_object(map_file), map_file))}
        listed = (*_added(folder / _ADDED_NAME), *_whole(folder / _WHOLE_NAME))
        numbered = {token.id: token for token in listed}
    # Special tokens in transformers' order, which gives ids to those that have none.
    order = sorted(special, key=lambda name: _SPECIAL.index(name) if name in _SPECIAL else len(_SPECIAL))
    described = {special[name].content: special[name] for name in order}
    tokens = {token.content: _described(token, described.get(token.content)) for token in numbered.values()}
    tokens |= {content: token for content, token in described.items() if content not in tokens}
    names = {name: token.content for name, token in special.items() if name in _SPECIAL}
    return FoundTokens(names, tuple(token for content, token in tokens.items() if content))


def number_tokens(vocabulary: Mapping[str, int], tokens: Iterable[FoundToken]) -> dict[str, int]:
    """Return the vocabulary with the tokens in it. Those that have no id follow the last one, as in transformers.

    Raises:
        CheckpointError: an id is another token's, or the token has another id.
    """
    numbered = dict(vocabulary)
    contents = {index: content for content, index in numbered.items()}
    for token in tokens:
        known = numbered.get(token.content)
        index = token.id if token.id is not None else known if known is not None else max(contents, default=-1) + 1
        if known is not None and known != index:
            raise CheckpointError(
                f"{token.file} gives {token.content!r} the id {index}, the vocabulary beside it {known}"
            )
        if contents.setdefault(index, token.content) != token.content:
            raise CheckpointError(
                f"{token.file} gives {token.content!r} the id {index}, which is {contents[index]!r} already"
            )
        numbered[token.content] = index
    return numbered


def check_embeddings(
    folder: Path, vocabulary: Mapping[str, int], tokens: Iterable[FoundToken], embeddings: int
) -> None:
    """Check that each token of a text encoder's tokenizer has an embedding, and each embedding a token.

    Embeddings beyond the last token are taken for padding, with a `MomaWarning`, if they fill up to a multiple of 64.

    Raises:
        CheckpointError: one has none.
    """
    ids, named = set(vocabulary.values()), {token.content: token for token in tokens}
    beyond = [content for content, index in vocabulary.items() if index >= embeddings]
    if not named.keys() >= set(beyond):
        raise CheckpointError(
            f"the vocabulary in {folder} has ids up to {max(ids)}, but the text encoder has {embeddings} embeddings; "
            "take the tokenizer that was saved with it"
        )
    if beyond:
        raise CheckpointError(
            f"{named[beyond[0]].file} names {beyond[0]!r}, whose id is {vocabulary[beyond[0]]}, but the text encoder "
            f"has {embeddings} embeddings; take the text encoder that was saved with it, or remove this token"
        )
    missing = sorted(set(range(embeddings)) - ids)
    if not missing:
        return
    found = f"the text encoder has {embeddings} embeddings, but its tokenizer {folder} has {len(ids)} tokens"
    if missing[0] > max(ids) and len(missing) < _PADDING and embeddings % _PADDING == 0:
        warn(f"{found}; the last {len(missing)} embeddings are taken for padding to a multiple of {_PADDING}")
        return
    raise CheckpointError(
        f"{found}: none has the id {missing[0]}, so a word that was trained as this token would be spelled in letters; "
        f"put the files saved with the text encoder ({_ADDED_NAME}, {CONFIG_NAME}, {_WHOLE_NAME}) into the folder"
    )


def tokens_with_embeddings(
    folder: Path, vocabulary: Mapping[str, int], tokens: Iterable[FoundToken], embeddings: int
) -> tuple[FoundToken, ...]:
    """Return the tokens that a language model has an embedding for, with a `MomaWarning` for the others.

    Raises:
        CheckpointError: the vocabulary itself has more tokens than the language model has embeddings.
    """
    highest = max(vocabulary.values())
    if highest >= embeddings:
        raise CheckpointError(
            f"the vocabulary in {folder} has ids up to {highest}, but the language model has {embeddings} embeddings; "
            "take the tokenizer that was saved with it"
        )
    tokens = tuple(tokens)
    numbered = number_tokens(vocabulary, tokens)
    without = [token for token in tokens if numbered[token.content] >= embeddings]
    if without:
        names = ", ".join(f"{token.content!r} ({numbered[token.content]})" for token in without)
        warn(
            f"{without[0].file} names {names}, but the language model has {embeddings} embeddings; left out: a prompt "
            "with such a token is read as plain text"
        )
    return tuple(token for token in tokens if token not in without)


def _special(config: Mapping[str, Any], file: Path) -> Iterator[tuple[str, FoundToken]]:
    """Yield the special tokens that a config or a map names. What is null or left out has transformers' default."""
    for name in _SPECIAL:
        if config.get(name) is not None:
            yield name, _token(config[name], None, file, f"{name} must be a token")
    for key in _OTHER_SPECIAL:
        listed = config.get(key) or []
        values = listed.values() if isinstance(listed, dict) else listed
        if not isinstance(values, Iterable) or isinstance(values, str):
            raise CheckpointError(f"{file}: {key} must be a list of tokens, not {short_repr(listed)}")
        for value in values:
            token = _token(value, None, file, f"{key} must be a list of tokens")
            yield f"{key} {token.content}", token


def _described(token: FoundToken, special: FoundToken | None) -> FoundToken:
    """Return a token that has an id as a special one, if it is; added_tokens.json says nothing else of its tokens."""
    if special is None:
        return token
    return dataclasses.replace(token, special=True, strips=token.strips or special.strips)


def _decoder(entries: object, file: Path) -> Iterator[FoundToken]:
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file}: added_tokens_decoder must be an object, not {short_repr(entries)}")
    for index, value in entries.items():
        yield _token(value, index, file, "added_tokens_decoder must hold tokens")


def _added(file: Path) -> Iterator[FoundToken]:
    for content, index in read_json_object(file).items():
        yield _token(content, index, file, "an added token must be a text")


def _whole(file: Path) -> Iterator[FoundToken]:
    entries = read_json_object(file).get("added_tokens") or []
    if not isinstance(entries, list):
        raise CheckpointError(f"{file}: added_tokens must be a list, not {short_repr(entries)}")
    for value in entries:
        index = value.get("id", "") if isinstance(value, dict) else ""
        yield _token(value, index, file, "added_tokens must hold tokens")


def _token(value: object, index: object, file: Path, rule: str) -> FoundToken:
    """Return the token that an entry describes, a text or an object with `content`; `index` is its id, if it has one.

    Raises:
        CheckpointError: it describes none; `rule` says what it must be.
    """
    options: dict[Any, Any] = value if isinstance(value, dict) else {}
    content = options.get("content") if options else value
    # A lone surrogate, which JSON can hold, is no character.
    if not isinstance(content, str) or content != content.encode("utf-8", "replace").decode():
        raise CheckpointError(f"{file}: {rule}, not {short_repr(value)}")
    if index is not None:
        try:
            index = int(str(index))
        except ValueError:
            index = -1
        if index < 0:
            raise CheckpointError(f"{file}: the id of {content!r} must be a whole number of at least 0")
    strips = {name: bool(options[name]) for name in _STRIPS if name in options}
    return FoundToken(content, index, file, strips, bool(options.get("special", index is None)))
