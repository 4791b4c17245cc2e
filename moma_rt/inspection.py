"""Describes a bundle or a subject file as text: what `moma-rt inspect` prints."""

import stat
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from moma_rt.bundle.engines import EngineEntry, format_capabilities
from moma_rt.bundle.footprint import combined_bytes, describe_budget, footprint, format_bytes
from moma_rt.bundle.manifest import Bundle, Manifest, NetworkEntry
from moma_rt.bundle.specs import TensorSpec
from moma_rt.errors import InputError
from moma_rt.subject import Subject


def describe(path: Path, budget: int | None = None, *, tensors: bool = False) -> str:
    """Describe a bundle's folder or a subject file.

    Args:
        budget: bytes of memory; also tell which of the bundle's networks fit into it.
        tensors: also list the bundle's tensors, engine files and kernels.

    Raises:
        InputError: `path` is neither a readable folder nor a regular file, or it is a subject and an option for bundles
            was given.
        BundleError: a folder that is not a bundle.
        SubjectError: a file that is not a subject.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} does not exist: give a bundle's folder or a subject file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    if stat.S_ISDIR(mode):
        return describe_bundle(Bundle.open(path), budget, tensors=tensors)
    if stat.S_ISREG(mode):
        if budget is not None or tensors:
            raise InputError(f"{path} is a subject file: --budget and --tensors are for bundles")
        return describe_subject(Subject.load(path))
    raise InputError(f"{path} is neither a bundle's folder nor a subject file")


def describe_bundle(bundle: Bundle, budget: int | None = None, *, tensors: bool = False) -> str:
    """One screen: base, sizes, networks with their precision, targets with the memory they need, and sources."""
    manifest = bundle.manifest
    lines = [
        f"bundle      {bundle.root}",
        f"base        {manifest.base}",
        *_geometry(manifest),
        f"size        {format_bytes(sum(f.size for f in manifest.files.values()))} in {len(manifest.files)} files",
        f"made by     {manifest.created_by}",
        *_packed(manifest),
        "",
        *_networks(manifest),
        "",
        *_targets(manifest),
    ]
    if budget is not None:
        lines += _budgets(manifest, budget)
    lines += ["", "sources", *(f"  {s.role:<18} {s.sha256[:12]}  {s.name}" for s in manifest.sources)]
    if tensors:
        lines += _kernel_folders(manifest)
        for title, engines in _engine_sets(manifest).items():
            lines += ["", *_engine_files(title, engines, manifest)]
        for entry in manifest.networks.values():
            lines += ["", *_tensors(entry)]
    return "\n".join(lines)


def describe_subject(subject: Subject) -> str:
    """Name, base, and what is kept of the photo."""
    counts = sorted(subject.token_counts().items(), reverse=True)
    kept = ", ".join(f"{count} of {grid * grid} on {grid}x{grid}" for grid, count in counts)
    size = sum(t.nbytes for group in (subject.reference_k, subject.reference_v) for t in group.values())
    lines = [
        f"subject     {subject.name}",
        f"base        {subject.origin.base} ({subject.origin.fingerprint[:12]})",
        f"photo       {subject.photo.shape[1]} x {subject.photo.shape[0]}, {subject.mask.mean():.1%} subject",
        f"reference   {format_bytes(size)}, tokens: {kept}",
    ]
    if subject.prefix is None:
        lines.append("prefix      none: generating needs a context embedding")
    else:
        lines.append(f"prefix      {len(subject.prefix.ids)} tokens, {format_bytes(subject.prefix.kv.nbytes)}")
    return "\n".join(lines)


def _geometry(manifest: Manifest) -> list[str]:
    geometry, language = manifest.geometry, manifest.geometry.language
    grids = ", ".join(f"{grid}x{grid}" for grid in geometry.grids)
    lines = [
        f"pictures    {geometry.image_size} x {geometry.image_size}",
        f"injection   {len(geometry.self_attention)} self-attention layers on {grids} tokens",
    ]
    if language is not None:
        lines.append(f"language    {language.layers} layers of width {language.width}, {language.vocabulary} tokens")
    return lines


def _networks(manifest: Manifest) -> list[str]:
    """A table of the networks, and a line for each weights file that several of them read."""
    lines = [f"{'network':<20} {'precision':<9} {'weights':>10} {'graph':>10}  key"]
    for entry in manifest.networks.values():
        weights = format_bytes(sum(manifest.files[name].size for name in entry.weights))
        graph = format_bytes(sum(manifest.files[name].size for name in entry.graphs)) if entry.graphs else "none"
        name, precision = entry.spec.name, entry.precision.value
        lines.append(f"{name:<20} {precision:<9} {weights:>10} {graph:>10}  {entry.key[:12]}")
    return lines + _shared_weights(manifest)


def _packed(manifest: Manifest) -> list[str]:
    left_out = "; ".join(manifest.left_out) or "nothing"
    return [f"packed for  {manifest.packed_for}; left out: {left_out}"] if manifest.packed_for else []


def _shared_weights(manifest: Manifest) -> list[str]:
    readers: dict[str, list[str]] = {}
    for name, network in manifest.networks.items():
        for file in network.weights:
            readers.setdefault(file, []).append(name)
    return [
        f"{' and '.join(names)} share {PurePosixPath(file).parent.name}, {format_bytes(manifest.files[file].size)}"
        for file, names in readers.items()
        if len(names) > 1
    ]


def _targets(manifest: Manifest) -> list[str]:
    """A line for each way to run the bundle: who runs it, for which devices, and how much memory all networks need."""
    lines = [f"{'target':<42} {'networks':>8} {'memory':>10}"]
    if manifest.has_graphs:
        lines.append(_target("ONNX Runtime, on a CPU or a GPU", manifest, None))
    for title, engines in _engine_sets(manifest).items():
        lines.append(_target(title, manifest, {e.network: e for e in engines}) + _remarks(engines))
    for network in manifest.networks:
        capabilities = sorted(k.capability for k in manifest.kernels if k.network == network)
        if capabilities:
            lines.append(f"kernels of the {network} for TensorRT's plugins: {format_capabilities(capabilities)}")
    return lines


def _target(title: str, manifest: Manifest, engines: Mapping[str, EngineEntry] | None) -> str:
    names = [name for name in manifest.networks if engines is None or name in engines]
    needs = [footprint(manifest, name, None if engines is None else engines[name]) for name in names]
    count = f"{len(names)} of {len(manifest.networks)}"
    return f"{title:<42} {count:>8} {format_bytes(combined_bytes(needs)):>10}"


def _remarks(engines: Iterable[EngineEntry]) -> str:
    found = list(engines)
    plugins = "  with plugins" if any(e.kernels is not None for e in found) else ""
    return plugins + ("" if all(e.measured for e in found) else "  kernels chosen by rule, not measured")


def _engine_sets(manifest: Manifest) -> dict[str, list[EngineEntry]]:
    """Engines that one library runs on one set of devices, under their title."""
    sets: dict[str, list[EngineEntry]] = {}
    for e in manifest.engines:
        sets.setdefault(f"{e.flavour.value} {e.version} on {format_capabilities(e.capabilities)}", []).append(e)
    return sets


def _engine_files(title: str, engines: Iterable[EngineEntry], manifest: Manifest) -> list[str]:
    """Each engine's file size, and the device memory that its builder counted at the largest shapes."""
    return [
        title,
        f"  {'engine':<20} {'file':>10} {'weights':>10} {'activations':>12}",
        *(
            f"  {e.network:<20} {format_bytes(manifest.files[e.file].size):>10} {format_bytes(e.weight_bytes):>10} "
            f"{format_bytes(e.activation_bytes):>12}{_remarks([e])}"
            for e in engines
        ),
    ]


def _kernel_folders(manifest: Manifest) -> list[str]:
    lines = []
    for kernels in manifest.kernels:
        devices = format_capabilities([kernels.capability])
        lines.append(f"kernels of the {kernels.network} on {devices}: {kernels.folder}")
    return ["", *lines] if lines else []


def _budgets(manifest: Manifest, budget: int) -> list[str]:
    """Which networks fit the budget: for each set of engines, and for the ONNX files."""
    ways: dict[str, Mapping[str, EngineEntry] | None] = {
        f"engines of {title}": {e.network: e for e in engines} for title, engines in _engine_sets(manifest).items()
    }
    if manifest.has_graphs:
        ways["ONNX files, by their size"] = None
    lines = []
    for way, engines in ways.items():
        lines += ["", f"in {format_bytes(budget)}: {way}", *describe_budget(manifest, engines, budget)]
    return lines


def _tensors(entry: NetworkEntry) -> list[str]:
    return [
        entry.spec.name,
        *(f"  in   {_tensor(t)}" for t in entry.spec.inputs),
        *(f"  out  {_tensor(t)}" for t in entry.spec.outputs),
    ]


def _tensor(tensor: TensorSpec) -> str:
    dims = [str(d) if isinstance(d, int) else f"{d.name} {d.min}..{d.max}" for d in tensor.shape]
    return f"{tensor.name} {tensor.dtype} [{', '.join(dims)}]"
