"""A recorded run of the original MoMA, and the same computations by the deployed networks."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from moma_rt.inputs.tokenizers import text_prompt
from moma_rt.memory.networks import Networks
from moma_rt.pipeline.request import Result
from moma_rt.runtime import Runtime
from moma_rt.subject import Subject
from moma_rt.timing import StageTimer


@dataclass(frozen=True)
class Case:
    """One recorded run of the original, and the bundle of its checkpoints, enrolled on the same photo."""

    folder: Path
    runtime: Runtime

    @cached_property
    def meta(self) -> dict:
        return json.loads((self.folder / "meta.json").read_text())

    @cached_property
    def trace(self) -> dict[str, np.ndarray]:
        return dict(np.load(self.folder / "trace.npz"))

    @cached_property
    def language(self) -> dict[str, np.ndarray]:
        return dict(np.load(self.folder / "mllm.npz"))

    @cached_property
    def subject(self) -> Subject:
        photo, mask = self.folder / "image.png", self.folder / "mask.png"
        noises = {"vae_noise": self.trace["vae_noise"], "reference_noise": self.trace["ref_noise"]}
        return self.runtime.enroll(photo, mask, self.meta["subject"], **noises)

    @property
    def networks(self) -> Networks:
        return self.runtime._networks

    @cached_property
    def conditions(self) -> dict[str, np.ndarray]:
        """The denoiser's inputs that stay the same over the steps, computed by the deployed networks."""
        conditioner, stages = self.runtime._conditioner, StageTimer()
        text, ids = conditioner.text_tokens(text_prompt(self.meta["subject"], self.meta["prompt"]), stages)
        unconditional, _ = conditioner.text_tokens("", stages)
        context = conditioner.context_tokens(self.subject, self.meta["prompt"], stages)
        return {
            "text_tokens": np.stack([unconditional, text]),
            "context_tokens": np.stack([conditioner.unconditional_context_tokens(stages), context]),
            "subject_weights": conditioner.text_tokenizer.subject_weights(self.meta["subject"], ids)[None],
            "strength": np.array([self.meta["strength"]], np.float32),
            **{name: array[None] for name, array in self.subject.inputs().items()},
        }

    @cached_property
    def recorded_steps(self) -> list[dict[str, np.ndarray]]:
        """Each recorded step: its number, the state it started from, and its results."""
        t = self.trace
        numbers = t["steps"] if "steps" in t else np.arange(len(t["timesteps"]))
        if "latents_before" in t:
            latents, foreground = t["latents_before"], t["foreground_before"]
        else:
            latents = np.concatenate([t["init_latents"][None], t["latents_after"][:-1]])
            conditional = t["mask_uncond_cond_64"][:, 1:2]
            foreground = np.concatenate([np.ones_like(conditional[:1]), conditional[:-1]])
        return [
            {
                "number": int(number),
                "latents": latents[i],
                "foreground_mask": foreground[i],
                "noise": t["noise_pred_uncond_cond"][i],
                "next_latents": t["latents_after"][i],
                "next_foreground_mask": t["mask_uncond_cond_64"][i, 1:2],
            }
            for i, number in enumerate(numbers)
        ]

    def generate(self) -> Result:
        """The whole generation, from the original's initial latents."""
        options = {"strength": self.meta["strength"], "steps": self.meta["steps"]}
        return self.runtime.generate(self.subject, self.meta["prompt"], latents=self.trace["init_latents"], **options)

    def decibels(self, image: Image.Image) -> float:
        """PSNR of a picture against the original's."""
        final = np.load(self.folder / "final_image.npz")["final_image_f16"][0].transpose(1, 2, 0).astype(np.float64)
        return float(-10 * np.log10(np.mean((np.asarray(image, np.float64) / 255 - final) ** 2)))

    def final_mask(self) -> np.ndarray:
        """The original's last foreground mask, at the picture's resolution."""
        return self.trace["final_mask_64"][0, 0].repeat(8, 0).repeat(8, 1)

    def denoise(self, step: dict[str, np.ndarray], row: np.ndarray) -> dict[str, np.ndarray]:
        zeros = np.zeros_like(step["latents"])
        inputs = {"latents": step["latents"], "history": zeros, "noise": zeros, "schedule_row": row}
        inputs["foreground_mask"] = step["foreground_mask"]
        return self.networks.run("denoiser", {**inputs, **self.conditions}, StageTimer())
