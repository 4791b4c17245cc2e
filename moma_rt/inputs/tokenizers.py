"""The texts that CLIP and the language model read, worded exactly as in the original MoMA, and their token ids.

CLIP reads `photo of a SUBJECT. PROMPT`. The language model reads

    USER: <image>\\n A photo of a SUBJECT. Describe a new image of the same SUBJECT in: PROMPT. ASSISTANT: *

split at `<image>`, each part tokenized alone. Everything before PROMPT depends on the subject only, so the runtime
caches its keys and values and runs only the tokens after the longest common prefix.
"""

import unicodedata
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from moma_rt.errors import BundleError, InputError
from moma_rt.messages import first_line, short_repr, warn

IMAGE_PLACEHOLDER = "<image>"
MAX_SEQUENCE = 2048

# 77 CLIP tokens minus begin, end, "photo", "of", "a" and the full stop: a word has at least one token.
_MAX_SUBJECT_WORDS = 71
_QUOTED_CHARACTERS = 400

Ids = npt.NDArray[np.int32]


def text_prompt(subject: str, prompt: str) -> str:
    """The text that CLIP reads for a prompt."""
    return f"photo of a {subject}. {prompt}"


def check_prompt(prompt: str, what: str = "prompt") -> None:
    """Check that a prompt can be tokenized as meant. It may be empty.

    Raises:
        InputError: it is not a string, contains the image placeholder, or is not valid Unicode.
    """
    if not isinstance(prompt, str):
        raise InputError(f"{what} must be a text, not {short_repr(prompt)}")
    if IMAGE_PLACEHOLDER in prompt:
        raise InputError(f"{what} must not contain {IMAGE_PLACEHOLDER}, which stands for the photo: {_quoted(prompt)}")
    _check_unicode(prompt, what)


def check_subject_name(name: str) -> None:
    """Check the words of a subject name; `TextTokenizer.check_subject` checks its tokens.

    Raises:
        InputError: the name is empty, has other white space than one space between words, has too many words or
            control characters, or is refused by `check_prompt`.
    """
    check_prompt(name, "subject name")
    words = name.split()
    if not words:
        raise InputError(f"subject name is empty: {_quoted(name)}; name what the photo shows, such as 'teddy bear'")
    if words != name.split(" "):
        raise InputError(f"subject name must be words with one space between them, not {_quoted(name)}")
    if len(words) > _MAX_SUBJECT_WORDS:
        raise InputError(f"subject name has {len(words)} words, at most {_MAX_SUBJECT_WORDS} fit: {_quoted(name)}")
    if any(unicodedata.category(character) == "Cc" for character in name):
        raise InputError(f"subject name must not contain control characters: {_quoted(name)}")


def common_prefix_length(cached: Ids, full: Ids) -> int:
    """Count the leading tokens of `full` that need not run, given the cached keys and values of `cached`.

    At most len(full) - 1: the last token's hidden state is the result, so that token always runs.

    Args:
        cached: int32 [P], may be empty.
        full: int32 [S], S >= 1.

    Returns:
        0 to min(P, S - 1).
    """
    length = min(len(cached), len(full) - 1)
    different = np.flatnonzero(cached[:length] != full[:length])
    return int(different[0]) if len(different) else length


class TextTokenizer:
    """CLIP's tokenizer, from a `tokenizer.json`.

    Args:
        path: the file. Its post-processor adds the begin and end tokens; its padding names the pad token
            (the end token if there is none).
        length: tokens of every encoding, 77 for CLIP.

    Raises:
        BundleError: the file is missing or is not such a tokenizer.
    """

    def __init__(self, path: Path, length: int = 77) -> None:
        self.length = length
        self._tokenizer = _load(path)
        padding = self._tokenizer.padding
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        special = self._tokenizer.encode("").ids
        if len(special) != 2:
            raise BundleError(f"{path} is not a CLIP tokenizer: it must add one begin and one end token to a text")
        self._begin, self._end = special
        self._pad = int(padding["pad_id"]) if padding else self._end

    def encode(self, text: str) -> Ids:
        """Begin token, the text's tokens, end token, padding: int32 [length].

        A text that does not fit loses its end, with a `MomaWarning` that names what was cut.

        Raises:
            InputError: the text is not valid Unicode.
        """
        encoding = self._encode(text)
        ids = encoding.ids
        if len(ids) > self.length:
            # The end token takes the last place, so the first token cut is the one that stood there.
            cut = text[encoding.offsets[self.length - 1][0] :].strip()
            warn(f"the text is {len(ids)} CLIP tokens and {self.length} fit; cut: {_quoted(cut)}")
            ids = [*ids[: self.length - 1], self._end]
        padded = np.full(self.length, self._pad, np.int32)
        padded[: len(ids)] = ids
        return padded

    def check_subject(self, name: str) -> None:
        """Check that the foreground mask can be made from a subject name's tokens, whatever the prompt.

        Raises:
            InputError: refused by `check_subject_name`; contains a control token; does not fit with the words around
                it; or no word's first token occurs in `photo of a NAME.`, where punctuation may join its neighbor.
        """
        check_subject_name(name)
        phrase = text_prompt(name, "").rstrip()
        ids = self._encode(phrase).ids
        if len(ids) > self.length:
            raise InputError(
                f"subject name is too long: {_quoted(phrase)} is {len(ids)} CLIP tokens, {self.length} fit"
            )
        if not {self._begin, self._end, self._pad}.isdisjoint(ids[1:-1]):
            raise InputError(f"subject name must not contain a control token: {_quoted(name)}")
        if not set(self._first_tokens(name)) & set(ids):
            raise InputError(f"subject name has no word that CLIP finds in {phrase!r}; name it in words")

    def subject_weights(self, subject: str, ids: Ids) -> npt.NDArray[np.float32]:
        """Mark the prompt's tokens that make the foreground mask: the first of each subject word, at every occurrence.

        Args:
            subject: its name, as `check_subject` accepts it.
            ids: int32 [length], the encoded `text_prompt`.

        Returns:
            float32 [length], 1 at those tokens and 0 elsewhere; at least one is 1.

        Raises:
            InputError: the name is refused by `check_subject_name`, or none of its tokens occurs.
        """
        check_subject_name(subject)
        weights = np.isin(ids, self._first_tokens(subject)).astype(np.float32)
        if not weights.any():
            raise InputError(f"no token of the subject name {_quoted(subject)} occurs in the prompt")
        return weights

    def _first_tokens(self, subject: str) -> list[int]:
        # A word without tokens is encoded as begin and end only, so its second id is not a token of the word.
        encodings = [self._encode(word).ids for word in subject.split(" ")]
        return [ids[1] for ids in encodings if len(ids) > 2]

    def _encode(self, text: str) -> Encoding:
        _check_unicode(text)
        return self._tokenizer.encode(text)


class LanguageTokenizer:
    """The language model's tokenizer, from a `tokenizer.json`.

    Args:
        path: the file. Its post-processor adds the begin token.

    Raises:
        BundleError: the file is missing or is not such a tokenizer.
    """

    def __init__(self, path: Path) -> None:
        self._tokenizer = _load(path)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if len(self._tokenizer.encode("").ids) != 1:
            raise BundleError(
                f"{path} is not a Llama tokenizer: it must add one begin token to a text, and no end token"
            )

    def encode(self, subject: str, prompt: str, vocabulary: int, image_tokens: int) -> Ids:
        """Encode the whole sequence.

        Args:
            subject: its name, as `check_subject_name` accepts it.
            prompt: any text, may be empty.
            vocabulary: number of text ids; image token i has the id vocabulary + i.
            image_tokens: how many there are.

        Returns:
            int32 [S], in 0..vocabulary + image_tokens - 1.

        Raises:
            InputError: the name or prompt is refused, or the sequence is longer than `MAX_SEQUENCE`.
        """
        check_prompt(prompt)
        ids = self._sequence(subject, f" {prompt}. ASSISTANT: *", vocabulary, image_tokens)
        if len(ids) > MAX_SEQUENCE:
            raise InputError(f"prompt is too long: {len(ids)} tokens with the photo, {MAX_SEQUENCE} fit")
        return ids

    def prefix(self, subject: str, vocabulary: int, image_tokens: int) -> Ids:
        """Encode everything before the prompt: int32 [P]. Arguments and errors as for `encode`.

        A prompt may change the last of these tokens: reuse as many as `common_prefix_length` says, not P.
        """
        return self._sequence(subject, "", vocabulary, image_tokens)

    def _sequence(self, subject: str, rest: str, vocabulary: int, image_tokens: int) -> Ids:
        check_subject_name(subject)
        request = f"\n A photo of a {subject}. Describe a new image of the same {subject} in:{rest}"
        before = self._tokenizer.encode("USER: ").ids
        # Tokenized alone, this part starts with a begin token of its own, which the sequence must not have.
        after = self._tokenizer.encode(request).ids[1:]
        image = np.arange(vocabulary, vocabulary + image_tokens)
        return np.concatenate([before, image, after]).astype(np.int32)


def _load(path: Path) -> Tokenizer:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"cannot read the tokenizer {path}: {first_line(error)}") from None
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise BundleError(f"{path} is not a tokenizer: {first_line(error)}") from None


def _check_unicode(text: str, what: str = "text") -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not valid Unicode at character {error.start}: {_quoted(text)}") from None


def _quoted(text: str) -> str:
    """The text in quotes on one line, its middle left out when it is long."""
    if len(text) > _QUOTED_CHARACTERS:
        text = f"{text[: _QUOTED_CHARACTERS // 2]} ... {text[-_QUOTED_CHARACTERS // 2 :]}"
    return repr(text)
