"""The second stage: train the VAE, scale its latents to Stable Diffusion's, and encode all training pictures."""

import argparse
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from examples.mini_moma import muon
from examples.mini_moma.groups import Chunk, chunk_folders, read_chunk
from examples.mini_moma.loop import Plan, train
from examples.mini_moma.scenes import Picture
from export.checkpoints.architectures import SCALING_FACTOR
from export.checkpoints.presets import MINI
from moma_rt.errors import InputError
from moma_rt.files import atomic_write

_BATCH = 4
_CROP = 64
# The last part of training sees whole pictures.
_WHOLE_FROM = 0.8
_PHOTO_SHARE = 0.3
_NOISE = 0.06
_KL = 2e-4
# Brightness and two color differences: without a loss of their own, colors stay gray for long.
_OPPONENT = torch.tensor([[0.3, 0.6, 0.1], [0.5, -0.5, 0.0], [0.25, 0.25, -0.5]])


def add_options(p: argparse.ArgumentParser) -> None:
    """Add the options of this stage."""
    p.add_argument("--steps", type=int, default=9000, help="optimizer steps of 4 crops a process (default: 9000)")
    p.add_argument("--minutes", type=float, help="stop after so many minutes; run it again to go on")


def run(options: argparse.Namespace) -> None:
    """Write `options.data`/vae.safetensors, unless it exists, and the latents of all pictures that lack them.

    Raises:
        InputError: the data stage has not been run, or training was stopped.
    """
    data: Path = options.data
    training, heldout = (chunk_folders(data, split) for split in ("train", "heldout"))
    if not training or not heldout:
        raise InputError(f"{data} has no training samples; first run: python -m examples.mini_moma data")
    folders = training + heldout
    if not _weights_file(data).exists():
        plan = Plan("vae", data, options.steps, 3e-3, decay=0.5, processes=options.processes, minutes=options.minutes)
        vae = make_vae()
        vae.load_state_dict(train(partial(VaeTask, data), plan))
        fold_statistics(vae, _pictures(read_chunk(training[0]))[:512])
        for folder in folders:
            # Of an earlier VAE.
            latents_file(folder).unlink(missing_ok=True)
        with atomic_write(_weights_file(data)) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in vae.state_dict().items()}, temporary)
    missing = [folder for folder in folders if not latents_file(folder).exists()]
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        for _ in tqdm(pool.map(partial(_encode_chunk, data), missing), "encode", len(missing)):
            pass
    print(f"reconstructs held-out pictures at {reconstruction_db(load_vae(data), data):.2f} dB")


def make_vae() -> AutoencoderKL:
    """Make the VAE with the first weights of training."""
    vae = AutoencoderKL.from_config(dict(MINI.vae))
    for name, parameter in vae.named_parameters():
        # Blocks start as the identity.
        if name.endswith(("conv2.weight", "conv2.bias", "to_out.0.weight")):
            nn.init.zeros_(parameter)
    return vae.to(memory_format=torch.channels_last)


def load_vae(data: Path) -> AutoencoderKL:
    """Read the trained VAE, frozen.

    Raises:
        InputError: it does not exist.
    """
    path = _weights_file(data)
    if not path.exists():
        raise InputError(f"{path} does not exist; first run: python -m examples.mini_moma vae")
    vae = make_vae()
    vae.load_state_dict(load_file(path))
    return vae.eval().requires_grad_(False)


def latents_file(chunk_folder: Path) -> Path:
    """Return the file with a chunk's latents.

    It holds means and standard deviations, scaled, float16: `photos_nschw` [N, 2, 4, 16, 16] and `targets_nkschw`
    [N, K, 2, 4, 16, 16].
    """
    return chunk_folder / "latents.safetensors"


def to_network(pictures_nhwc: Picture) -> Tensor:
    """Convert uint8 pictures to what the VAE takes: float32 [N, 3, H, W] in [-1, 1]."""
    pictures = torch.from_numpy(np.array(pictures_nhwc)).permute(0, 3, 1, 2).float()
    return (pictures / 127.5 - 1).contiguous(memory_format=torch.channels_last)


class VaeTask:
    """Reconstruction of crops, later of whole pictures."""

    def __init__(self, data: Path) -> None:
        self.module: nn.Module = make_vae()
        self.chunks = [read_chunk(folder) for folder in chunk_folders(data, "train")]

    def uses_muon(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether Muon trains a parameter."""
        return muon.suits(parameter)

    def loss(self, rng: np.random.Generator, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of a batch, with its L1 error and its mean squared error."""
        is_whole = progress > _WHOLE_FROM
        pictures = self._batch(rng, 1 if is_whole else _BATCH, None if is_whole else _CROP)
        assert isinstance(self.module, AutoencoderKL)
        posterior = self.module.encode(pictures).latent_dist
        noise = _NOISE * posterior.mean.detach().std() * torch.randn_like(posterior.mean)
        error = self.module.decode(posterior.sample() + noise).sample - pictures
        l1, l2 = error.abs().mean(), error.square().mean()
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        color = torch.einsum("oc,nchw->onhw", _OPPONENT, error)[1:].abs().mean((1, 2, 3)).sum()
        areas = functional.avg_pool2d(error, 8).abs().mean() + 0.5 * functional.avg_pool2d(error, 4).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = l1 + 0.5 * edges + 0.5 * l2 + 1.5 * color + 2 * areas + _KL * kl
        return loss, {"l1": l1.item(), "mse": l2.item(), "kl": kl.item()}

    def _batch(self, rng: np.random.Generator, size: int, crop: int | None) -> Tensor:
        chunk = self.chunks[rng.integers(len(self.chunks))]
        pictures = []
        for _ in range(size):
            group, which = rng.integers(len(chunk.names)), rng.integers(chunk.targets_nkhwc.shape[1])
            is_photo = rng.random() < _PHOTO_SHARE
            picture = chunk.photos_nhwc[group] if is_photo else chunk.targets_nkhwc[group, which]
            if crop is not None:
                # Towards the middle, where the subject is.
                top, left = rng.integers(picture.shape[0] - crop + 1, size=(2, 2)).mean(0, dtype=int)
                picture = picture[top : top + crop, left : left + crop]
            pictures.append(picture)
        return to_network(np.stack(pictures))


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, pictures_nhwc: Picture) -> None:
    """Scale every latent channel to mean 0 and variance 1 after the scaling factor; pictures stay the same.

    The scale goes into the 1x1 convolutions behind the encoder and before the decoder.
    """
    latents = torch.cat([posterior.mean for posterior in _encoded(vae, pictures_nhwc)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    scale = 1 / (std * SCALING_FACTOR)
    after, before = vae.quant_conv, vae.post_quant_conv
    channels = len(scale)
    after.weight[:channels] *= scale.view(-1, 1, 1, 1)
    after.bias[:channels] = (after.bias[:channels] - mean) * scale
    # The other half are logarithms of variances.
    after.bias[channels:] += 2 * scale.log()
    before.bias += before.weight[:, :, 0, 0] @ mean
    before.weight /= scale.view(1, -1, 1, 1)


@torch.no_grad()
def reconstruction_db(vae: AutoencoderKL, data: Path) -> float:
    """Return the PSNR over held-out pictures, in dB."""
    pictures = _pictures(read_chunk(chunk_folders(data, "heldout")[0]))[:256]
    errors = []
    for batch, posterior in enumerate(_encoded(vae, pictures)):
        original = to_network(pictures[batch * 16 : (batch + 1) * 16])
        errors.append((vae.decode(posterior.mean).sample.clamp(-1, 1) - original).square().mean().item())
    return float(10 * np.log10(4 / np.mean(errors)))


def _weights_file(data: Path) -> Path:
    return data / "vae.safetensors"


def _pictures(chunk: Chunk) -> Picture:
    targets = chunk.targets_nkhwc
    return targets.reshape(-1, *targets.shape[2:])


def _encoded(vae: AutoencoderKL, pictures_nhwc: Picture) -> Iterator[Any]:
    for start in range(0, len(pictures_nhwc), 16):
        yield vae.encode(to_network(pictures_nhwc[start : start + 16])).latent_dist


@torch.no_grad()
def _encode_chunk(data: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    vae, chunk = load_vae(data), read_chunk(folder)
    encoded = []
    for pictures in (chunk.photos_nhwc, _pictures(chunk)):
        statistics = [torch.stack([p.mean, p.std], 1) for p in _encoded(vae, pictures)]
        encoded.append((torch.cat(statistics) * SCALING_FACTOR).half())
    photos, targets = encoded
    with atomic_write(latents_file(folder)) as temporary:
        tensors = {"photos_nschw": photos, "targets_nkschw": targets.unflatten(0, (len(photos), -1)).contiguous()}
        save_file(tensors, temporary)
