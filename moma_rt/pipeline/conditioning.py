"""Conditions of a prompt: text tokens, context tokens, and the language model's K/V cache of a subject's prefix."""

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from moma_rt.backends.base import Array, Buffer
from moma_rt.bundle.manifest import LANGUAGE_TOKENIZER, TEXT_TOKENIZER
from moma_rt.bundle.specs import LanguageGeometry
from moma_rt.errors import BundleError, SubjectError
from moma_rt.inputs.tokenizers import LanguageTokenizer, TextTokenizer, common_prefix_length, text_prompt
from moma_rt.lazy import lazy_property
from moma_rt.memory.lru import Lru
from moma_rt.memory.networks import Networks
from moma_rt.memory.subject_cache import SubjectCache
from moma_rt.subject import Origin, Prefix, Subject
from moma_rt.timing import StageTimer

_CACHED_TEXTS = 64


@dataclass(frozen=True, eq=False)
class Conditions:
    """Conditions shared by the samples of a request: text [G,77,768], context [G,4,768], subject weights [77]."""

    text_tokens: Array
    context_tokens: Array
    subject_weights: Array


class Conditioner:
    """Computes text and context tokens, and caches those of the last 64 texts and (subject, prompt) pairs."""

    def __init__(self, networks: Networks, subjects: SubjectCache) -> None:
        self._networks = networks
        self._subjects = subjects
        self._text: Lru[str, Array] = Lru(_CACHED_TEXTS)
        self._context: Lru[tuple[str, str], Array] = Lru(_CACHED_TEXTS)
        self._unconditional: Lru[None, Array] = Lru(1)

    @lazy_property
    def text_tokenizer(self) -> TextTokenizer:
        self._networks.bundle.verify([TEXT_TOKENIZER])
        return TextTokenizer(self._networks.bundle.path(TEXT_TOKENIZER), self._networks.geometry.text_tokens)

    @lazy_property
    def language_tokenizer(self) -> LanguageTokenizer:
        self._networks.bundle.verify([LANGUAGE_TOKENIZER])
        return LanguageTokenizer(self._networks.bundle.path(LANGUAGE_TOKENIZER))

    def text_tokens(self, text: str, stages: StageTimer) -> tuple[Array, NDArray[np.int32]]:
        """Text encoder's tokens, float32 [77,768], and CLIP ids, int32 [77]. Warns if the text is truncated."""
        ids = self.text_tokenizer.encode(text)

        def encode() -> Array:
            tokens: Array = self._networks.run("text_encoder", {"token_ids": ids[None]}, stages)["text_tokens"][0]
            return tokens

        return self._text.get_or_make(text, encode), ids

    def check_prompt(self, subject: Subject, prompt: str) -> None:
        """Raise the errors of `context_tokens` without running a network.

        Raises:
            InputError: the prompt is longer than the language model's longest sequence.
            SubjectError, BundleError: as for `context_tokens`.
        """
        language = self._check_language(subject)
        self.language_tokenizer.encode(subject.name, prompt, language.vocabulary, language.image_tokens)

    def conditions(
        self, subject: Subject, prompts: tuple[str, str], embedding: Array | None, guided: bool, stages: StageTimer
    ) -> Conditions:
        """Conditions of a prompt and a negative prompt; `embedding`, [1024], replaces the language model's.

        Raises:
            InputError, SubjectError, BundleError: as for `check_prompt`.
        """
        prompt, negative = prompts
        self.text_tokenizer.check_subject(subject.name)
        if embedding is None:
            self.check_prompt(subject, prompt)
        text, ids = self.text_tokens(text_prompt(subject.name, prompt), stages)
        if embedding is not None:
            context = self.project(embedding, stages)
        else:
            context = self.context_tokens(subject, prompt, stages)
        weights = self.text_tokenizer.subject_weights(subject.name, ids)
        if not guided:
            return Conditions(text[None], context[None], weights)
        unconditional_text, _ = self.text_tokens(negative, stages)
        unconditional_context = self.unconditional_context_tokens(stages)
        return Conditions(np.stack([unconditional_text, text]), np.stack([unconditional_context, context]), weights)

    def context_tokens(self, subject: Subject, prompt: str, stages: StageTimer) -> Array:
        """Context tokens of a prompt, float32 [4,768], from the subject's prefix and the prompt's own tokens.

        Raises:
            SubjectError: the subject has no prefix, or one of another language model.
            BundleError: the bundle has no language model.
        """

        def compute() -> Array:
            return self.project(self.embedding(subject, prompt, stages), stages)

        return self._context.get_or_make((subject.identity, prompt), compute)

    def unconditional_context_tokens(self, stages: StageTimer) -> Array:
        """Context tokens of the unconditional half, float32 [4,768]: the projection of zeros, as in the original."""
        width = self._networks.geometry.embedding_width
        return self._unconditional.get_or_make(None, lambda: self.project(np.zeros(width, np.float32), stages))

    def project(self, embedding: Array, stages: StageTimer) -> Array:
        """Context tokens, float32 [4,768], of an embedding, float32 [1024]."""
        outputs = self._networks.run("context_projector", {"embedding": embedding[None]}, stages)
        tokens: Array = outputs["context_tokens"][0]
        return tokens

    def prefix(self, name: str, pixels: Array, stages: StageTimer) -> Prefix | None:
        """Run the language model over photo, float32 [1,3,336,336], and name; None without it or a vision encoder."""
        language = self._networks.geometry.language
        if language is None or not self._networks.bundle.has("vision_encoder", "language_model"):
            return None
        ids = self.language_tokenizer.prefix(name, language.vocabulary, language.image_tokens)
        image_tokens = self._networks.run("vision_encoder", {"pixels": pixels}, stages)["image_tokens"]
        past_kv = np.zeros((language.layers, 2, language.kv_heads, 0, language.head_width), np.float32)
        return Prefix(ids, self._language_model(ids, image_tokens, past_kv, "new_kv", stages))

    def embedding(self, subject: Subject, prompt: str, stages: StageTimer) -> Array:
        """The language model's output for photo and prompt, float32 [1024]; raises as `context_tokens`."""
        language = self._check_language(subject)
        assert subject.prefix is not None
        ids = self.language_tokenizer.encode(subject.name, prompt, language.vocabulary, language.image_tokens)
        # The tokenizer may merge the prefix's last token with the start of the prompt.
        reused = common_prefix_length(subject.prefix.ids, ids)
        if (ids[reused:] >= language.vocabulary).any():
            raise SubjectError(f"subject {subject.name!r}: its prefix does not cover the photo: enroll it again")
        no_image = np.zeros((1, 1, language.width), np.float32)
        # Before the prefix is taken from the subject cache: loading may evict cached subjects.
        self._networks.get("language_model", stages)
        if reused == len(subject.prefix.ids):
            past_kv = self._networks.retry_after_eviction(partial(self._subjects.prefix_kv, subject, subject.prefix))
        else:
            past_kv = subject.prefix.kv[:, :, :, :reused]
        embedding: Array = self._language_model(ids[reused:], no_image, past_kv, "embedding", stages)[0]
        return embedding

    def _language_model(
        self, ids: NDArray[np.int32], image_tokens: Array, past_kv: Array | Buffer, output: str, stages: StageTimer
    ) -> Array:
        past = past_kv.shape[3]
        inputs = {
            "token_ids": ids[None],
            "image_tokens": image_tokens,
            "positions": np.arange(past, past + len(ids), dtype=np.int32)[None],
            "past_kv": past_kv,
        }
        return self._networks.run("language_model", inputs, stages, (output,))[output]

    def _check_language(self, subject: Subject) -> LanguageGeometry:
        bundle = self._networks.bundle
        language = bundle.manifest.geometry.language
        if language is None or not bundle.has("language_model"):
            raise BundleError(f"{bundle.root} has no language_model network: give context_embedding, or build it")
        if subject.prefix is None:
            raise SubjectError(
                f"subject {subject.name!r} was enrolled with a bundle without a language model: "
                "give context_embedding, or enroll it again"
            )
        here = Origin.of(bundle)
        if subject.origin.language != here.language:
            raise SubjectError(
                f"subject {subject.name!r} was enrolled with another language model than {bundle.root} has: "
                "enroll it again"
            )
        wanted = (language.layers, 2, language.kv_heads, len(subject.prefix.ids), language.head_width)
        if subject.prefix.kv.shape != wanted:
            raise SubjectError(
                f"subject {subject.name!r}: prefix_kv has shape {subject.prefix.kv.shape}, this bundle needs {wanted}"
            )
        return language
