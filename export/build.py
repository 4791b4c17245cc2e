"""`python -m export.build`: convert checkpoints in their original formats to a bundle that `moma_rt` runs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engines.build import add_engine_options, engine_plan, shared_store
from engines.builder import EnginePlan, build_engines
from engines.plugins import NETWORK as WITH_KERNELS
from engines.store import Store
from engines.targets import CPU, EngineTarget, Machine, parse_list, parse_targets, resolve, targets_for_other_devices
from moma_rt.bundle.engines import CPU_CAPABILITY, Flavour
from moma_rt.bundle.specs import Precision
from moma_rt.errors import InputError, run_command

if TYPE_CHECKING:
    from export.checkpoints.model import Checkpoint
    from export.networks import Precisions

PROGRAM = "export.build"
_FINISH = "python -m engines.build BUNDLE --target local"
_EPILOG = """\
examples:
  python -m export.build --base tiny
      a tiny model with random weights, to try the runtime without a download
  python -m export.build --base ./Realistic_Vision_V4.0_noVAE --vae ./sd-vae-ft-mse \\
      --adapters ./attn_adapters_projectors.th --mllm ./MoMA_llava_7b --vision ./clip-vit-large-patch14-336
      the original checkpoints, ONNX graphs only
  python -m export.build --base rev_animated --weights ./revAnimated_v122.safetensors --lora ./style.safetensors:0.8 \\
      --adapters ... --mllm ... --vision ...
      a named base from a single file, with a LoRA at strength 0.8
  python -m export.build --base rev_animated --weights ./revAnimated_v122.safetensors --target rtx --mllm-precision int4
      with TensorRT-RTX engines for every RTX card and a language model in int4, built on any machine
  python -m export.build --base rev_animated --weights ./revAnimated_v122.safetensors --target sm80
      for an A100: export on any machine, then run python -m engines.build BUNDLE on the A100
  python -m export.build --base rev_animated --weights ./revAnimated_v122.safetensors --target inductor
      AOTInductor packages for this machine's GPU: PyTorch instead of TensorRT
  python -m export.build --base rev_animated --weights ./revAnimated_v122.safetensors --target inductor:sm90
      the same for an H100, on a machine without a GPU (needs PyTorch's CUDA build)
  python -m export.build --base sd15 --weights random --only denoiser,vae_decoder
      the real network sizes with random weights: to measure latency without a download
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}",
        description="Convert checkpoints to a bundle for moma_rt: weights, ONNX graphs, and engines for --target.\n"
        "Finished steps are cached, so an interrupted build resumes where it stopped.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint_options(p)
    p.add_argument(
        "--only",
        metavar="NETWORKS",
        help="export only these networks, separated by commas (such as denoiser,vae_decoder); other networks already "
        "in the bundle stay unless their checkpoints have changed",
    )
    p.add_argument("--skip", metavar="NETWORKS", help="export all networks but these, separated by commas")
    p.add_argument(
        "--precision",
        choices=[p.value for p in Precision if not p.is_weight_only],
        help="precision of all networks but the language model (default: fp16 if a target is a GPU, else fp32)",
    )
    p.add_argument(
        "--mllm-precision",
        choices=[p.value for p in Precision],
        help="precision of the language model; int8 and int4 quantize its weights and compute in fp16 "
        "(default: that of the other networks)",
    )
    add_engine_options(p, default="cpu")
    p.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to write the bundle to (default: bundles/ and the names of base and LoRAs, joined by +)",
    )
    return p


def add_checkpoint_options(p: argparse.ArgumentParser, *, base_required: bool = True) -> None:
    """Add the options that name checkpoints and the source of their weights."""
    p.add_argument(
        "--base",
        required=base_required,
        metavar="NAME|DIR|FILE",
        help="the Stable Diffusion 1.5 model to export: tiny (synthetic), a name in export/bases.toml "
        "(realistic_vision_v4, rev_animated, sd15, ...; downloaded unless --weights is given), a diffusers folder, or "
        "a .safetensors or .ckpt file in the CompVis layout",
    )
    p.add_argument(
        "--weights",
        metavar="random|DIR|FILE",
        help="where a named base's weights are: a diffusers folder or a single file; random: generate from --seed "
        "all weights that are not given as files",
    )
    p.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="a LoRA to fuse into the base's weights, a file in kohya's, diffusers' or PEFT's layout or PEFT's folder; "
        "may be repeated (default scale: 1)",
    )
    p.add_argument(
        "--adapters", type=Path, metavar="FILE", help="MoMA's own trained weights, attn_adapters_projectors.th"
    )
    p.add_argument("--mllm", type=Path, metavar="DIR", help="MoMA's language model: a folder in LLaVA's format")
    p.add_argument(
        "--vision",
        type=Path,
        metavar="DIR",
        help="the vision encoder: a CLIP ViT-L/14-336 folder (default: the copy in --mllm)",
    )
    p.add_argument("--vae", type=Path, metavar="DIR|FILE", help="a VAE to use instead of the base's own")
    p.add_argument("--seed", type=int, default=0, help="seed of random weights (default: 0)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    return run_command(PROGRAM, lambda: _build(options))


def _build(options: argparse.Namespace) -> int:
    # PyTorch takes seconds to import; --help should not.
    from export.bundling import ExportPlan, build_bundle
    from export.progress import Progress

    names = _network_names(options.only, options.skip)
    # Exporting takes minutes, so first refuse targets that this machine cannot build for.
    machine, asked = Machine.here(), parse_targets(options.target)
    later = targets_for_other_devices(asked, machine)
    targets = resolve(tuple(name for name in asked if name not in later), machine)
    packages = [target for target in targets if target.flavour is Flavour.INDUCTOR]
    engines = engine_plan(options, names, tuple(target for target in targets if target not in packages))
    precisions = _precisions(options, _usual_precision(targets, later))
    if packages:
        # Imported here because PyTorch's compiler takes seconds to import; checked before a checkpoint is read.
        from export.inductor_export import build_packages, check_precisions, check_target

        check_precisions(names, precisions)
        for target in packages:
            check_target(target)
    checkpoint = checkpoint_of(options, names)
    out = options.out if options.out is not None else Path("bundles") / checkpoint.base
    shared = shared_store(options, out)
    with Progress(len(names) * (1 + len(targets)), sys.stderr) as progress:
        needs_graphs = len(packages) < len(targets) or later or CPU in asked
        plan = ExportPlan(names, precisions, _kernels(engines, targets, later, precisions), bool(needs_graphs))
        bundle = build_bundle(checkpoint, plan, out, progress.report, shared)
        if engines.targets:
            bundle = build_engines(out, engines, shared, progress.report)
        for target in packages:
            bundle = build_packages(checkpoint, names, target, Store(out, shared), progress.report)
        for target in later:
            progress.report(target, f"note: copy {out} to such a device and run there: {_FINISH}")
    size = sum(file.size for file in bundle.manifest.files.values())
    print(f"{out}: {', '.join(bundle.manifest.networks)}; {len(bundle.manifest.engines)} engines; {size / 1e6:,.1f} MB")
    return 0


def checkpoint_of(options: argparse.Namespace, names: tuple[str, ...]) -> "Checkpoint":
    """Load the parts that the named networks need of the checkpoint given by the options of `add_checkpoint_options`.

    Raises:
        CheckpointError: a needed part was not given, or cannot be used.
    """
    from export.checkpoints.load import CheckpointRequest, load_checkpoint
    from export.checkpoints.lora import parse_lora
    from export.checkpoints.model import LANGUAGE, VISION, roles_for

    roles = roles_for(names)
    if LANGUAGE in roles:
        # Only the vision encoder's config gives the number of image tokens that the language model reads.
        roles |= {VISION}
    request = CheckpointRequest(
        base=options.base,
        weights=options.weights,
        adapters=options.adapters,
        mllm=options.mllm,
        vision=options.vision,
        vae=options.vae,
        roles=roles,
        seed=options.seed,
        loras=tuple(parse_lora(text) for text in options.lora),
    )
    return load_checkpoint(request)


def _precisions(options: argparse.Namespace, default: Precision) -> "Precisions":
    from export.networks import Precisions

    networks = Precision(options.precision or default.value)
    return Precisions(networks, Precision(options.mllm_precision or networks.value))


def _usual_precision(targets: tuple[EngineTarget, ...], later: tuple[str, ...]) -> Precision:
    """Return the default precision: fp16, or fp32 if all targets are CPUs."""
    on_gpu = later or any(target.capabilities != (CPU_CAPABILITY,) for target in targets)
    return Precision.FP16 if on_gpu else Precision.FP32


def _kernels(
    engines: EnginePlan, targets: tuple[EngineTarget, ...], later: tuple[str, ...], precisions: "Precisions"
) -> tuple[int, ...] | None:
    """Return the compute capabilities to compile kernels for, None for a bundle without kernels."""
    from export.attention_kernels import kernel_capabilities

    if not engines.plugins:
        return None
    if engines.names is not None and WITH_KERNELS not in engines.names:
        return ()
    capabilities = (int(name.removeprefix("sm")) for name in later)
    return kernel_capabilities(targets, capabilities, precisions.of(WITH_KERNELS))


def _network_names(only: str | None, skip: str | None) -> tuple[str, ...]:
    from export.networks import NETWORKS

    if only is not None and skip is not None:
        raise InputError("--only and --skip exclude each other: give one of them")
    if only is not None:
        return parse_list("--only", "network", only, tuple(NETWORKS))
    skipped = () if skip is None else parse_list("--skip", "network", skip, tuple(NETWORKS))
    names = tuple(name for name in NETWORKS if name not in skipped)
    if not names:
        raise InputError(f"--skip {skip!r} leaves no network; there are: {', '.join(NETWORKS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
