"""What the evaluation asks for: prompts, seeds and settings, and the ablations that each take one thing away."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from examples.mini_moma.scenes import (
    CONTEXT_STRENGTH,
    CONTEXTS,
    TEXTURE_STRENGTH,
    TEXTURES,
    context_prompt,
    texture_prompt,
)

# What is asked for, by the kind of prompt.
CONTEXT, TEXTURE = "context", "texture"
KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType({CONTEXT: tuple(CONTEXTS), TEXTURE: tuple(TEXTURES)})
_SEEDS_A_SUBJECT = 100


@dataclass(frozen=True)
class Case:
    """A picture to make: of subject number `subject`, in context or of material `key`.

    The phrase changes with the subject, so that all phrases of a key occur; the seed is of this case alone.
    """

    subject: int
    name: str
    kind: str
    key: str

    @property
    def prompt(self) -> str:
        return self.prompt_for(self.name)

    @property
    def seed(self) -> int:
        return _SEEDS_A_SUBJECT * self.subject + (*CONTEXTS, *TEXTURES).index(self.key)

    def prompt_for(self, name: str) -> str:
        """Ask for the same of another subject."""
        phrases = CONTEXTS[self.key] if self.kind == CONTEXT else TEXTURES[self.key]
        phrase = phrases[self.subject % len(phrases)]
        return context_prompt(name, phrase) if self.kind == CONTEXT else texture_prompt(name, phrase)


def cases(subject: int, name: str, contexts: Sequence[str], textures: Sequence[str]) -> tuple[Case, ...]:
    """Return the cases of a subject."""
    asked = [(CONTEXT, key) for key in contexts] + [(TEXTURE, key) for key in textures]
    return tuple(Case(subject, name, kind, key) for kind, key in asked)


@dataclass(frozen=True)
class Setup:
    """How pictures are made; as in `Runtime.generate`."""

    steps: int = 20
    guidance_scale: float = 7.5
    scheduler: str = "ddim"
    strength: float = CONTEXT_STRENGTH
    texture_strength: float = TEXTURE_STRENGTH

    def strength_of(self, case: Case) -> float:
        """Return the strength for a context or for a texture."""
        return self.strength if case.kind == CONTEXT else self.texture_strength


@dataclass(frozen=True)
class Ablation:
    """What differs from the full model, and the score that this should hurt.

    Attributes:
        about: one line for tables.
        hurts: a name of `benchmarks.quality.scores.SCORES`.
        no_reference: strength 0.
        other_reference: the next subject's photo is enrolled under this one's name; the context embedding stays.
        other_embedding: the context embedding is that of the next subject, its photo and name, in the same context.
        empty_prompt: the prompt is empty.
    """

    about: str
    hurts: str
    no_reference: bool = False
    other_reference: bool = False
    other_embedding: bool = False
    empty_prompt: bool = False


FULL = Ablation("the full model", "subject")
ABLATIONS: Mapping[str, Ablation] = MappingProxyType(
    {
        "no_reference": Ablation("strength 0: no reference", "subject", no_reference=True),
        "other_reference": Ablation(
            "another subject's reference, the own context embedding", "subject", other_reference=True
        ),
        "other_photo": Ablation(
            "another subject's photo under this name", "subject", other_reference=True, other_embedding=True
        ),
        "other_embedding": Ablation("another subject's context embedding", "similarity", other_embedding=True),
        "only_other_embedding": Ablation(
            "strength 0 and another subject's context embedding", "similarity", no_reference=True, other_embedding=True
        ),
        "empty_prompt": Ablation("an empty prompt", "prompt", empty_prompt=True),
    }
)
