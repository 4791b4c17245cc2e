"""What a bundle or a subject file holds, as text."""

import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from moma_rt.bundle.engines import EngineEntry, Flavour, format_capabilities
from moma_rt.bundle.footprint import describe_budget, format_bytes
from moma_rt.bundle.manifest import Bundle, Manifest, NetworkEntry
from moma_rt.bundle.specs import TensorSpec
from moma_rt.errors import InputError
from moma_rt.subject import Subject


def describe(path: Path, budget: int | None = None) -> str:
    """Describe a bundle's folder or a subject file.

    Args:
        budget: bytes of memory; also tell which of the bundle's networks fit it.

    Raises:
        InputError: nothing that can be read at `path`, neither a folder nor a regular file, or a budget for a subject.
        BundleError: a folder that is not a bundle.
        SubjectError: a file that is not a subject.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: nothing there; give a bundle's folder or a subject file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    if stat.S_ISDIR(mode):
        return describe_bundle(Bundle.open(path), budget)
    if stat.S_ISREG(mode):
        if budget is not None:
            raise InputError(f"{path} is no bundle's folder, and only a bundle has networks that fit a budget or not")
        return describe_subject(Subject.load(path))
    raise InputError(f"{path} is neither a bundle's folder nor a subject file")


def describe_bundle(bundle: Bundle, budget: int | None = None) -> str:
    """Base, geometry, networks with their tensors, kernels, engines with the memory they need, and sources."""
    manifest = bundle.manifest
    geometry = manifest.geometry
    grids = ", ".join(f"{grid}x{grid}" for grid in geometry.grids)
    lines = [
        f"bundle      {bundle.root}",
        f"base        {manifest.base}",
        f"made by     {manifest.created_by}",
        f"size        {format_bytes(sum(f.size for f in manifest.files.values()))} in {len(manifest.files)} files",
        *_packed(manifest),
        f"pictures    {geometry.image_size} x {geometry.image_size}",
        f"injection   {len(geometry.self_attention)} self-attention layers on {grids}",
    ]
    if geometry.language is not None:
        language = geometry.language
        lines.append(f"language    {language.layers} layers of width {language.width}, {language.vocabulary} tokens")
    for entry in manifest.networks.values():
        lines += ["", *_network(entry, manifest)]
    lines += _weights(manifest)
    lines += _kernels(manifest)
    lines += _engines(manifest)
    if budget is not None:
        lines += _budgets(manifest, budget)
    lines += ["", "sources", *(f"  {s.role:<20} {s.name}  {s.sha256[:12]}" for s in manifest.sources)]
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


def _network(entry: NetworkEntry, manifest: Manifest) -> list[str]:
    size = sum(manifest.files[name].size for name in entry.all_files)
    graphs = "" if entry.graphs else ", no ONNX graph"
    lines = [f"{entry.spec.name}  {entry.precision.value}, {format_bytes(size)}{graphs}, key {entry.key[:12]}"]
    lines += [f"  in   {_tensor(t)}" for t in entry.spec.inputs]
    lines += [f"  out  {_tensor(t)}" for t in entry.spec.outputs]
    return lines


def _packed(manifest: Manifest) -> list[str]:
    """What a packed bundle lacks."""
    left_out = "; ".join(manifest.left_out) or "nothing"
    return [f"packed for  {manifest.packed_for}; left out: {left_out}"] if manifest.packed_for else []


def _weights(manifest: Manifest) -> list[str]:
    """A line for each weights file that several networks read."""
    readers: dict[str, list[str]] = {}
    for name, network in manifest.networks.items():
        for file in network.weights:
            readers.setdefault(file, []).append(name)
    return [
        f"shared      {PurePosixPath(file).parent.name}, {format_bytes(manifest.files[file].size)}: {', '.join(names)}"
        for file, names in readers.items()
        if len(names) > 1
    ]


def _kernels(manifest: Manifest) -> list[str]:
    """A line for each network that has kernels of its own."""
    lines = []
    for name in manifest.networks:
        kernels = [k for k in manifest.kernels if k.network == name]
        folders = {k.folder for k in kernels}
        size = sum(file.size for path, file in manifest.files.items() if str(PurePosixPath(path).parent) in folders)
        if kernels:
            devices = format_capabilities(sorted(k.capability for k in kernels))
            lines += ["", f"kernels     of the {name} for TensorRT's plugins on {devices}, {format_bytes(size)}"]
    return lines


def _engines(manifest: Manifest) -> list[str]:
    """A table for each set of devices: file sizes, and device memory at the largest shapes."""
    groups: dict[tuple[Flavour, str, tuple[int, ...]], list[EngineEntry]] = {}
    for engine in manifest.engines:
        groups.setdefault((engine.flavour, engine.version, engine.capabilities), []).append(engine)
    lines = []
    for (flavour, version, capabilities), engines in groups.items():
        missing = [name for name in manifest.networks if name not in {engine.network for engine in engines}]
        lines += ["", f"engines     {flavour.value} {version} for {format_capabilities(capabilities)}"]
        lines.append(f"  {'':<20} {'file':>10} {'weights':>10} {'activations':>12}")
        lines += [
            f"  {e.network:<20} {format_bytes(manifest.files[e.file].size):>10} {format_bytes(e.weight_bytes):>10} "
            f"{format_bytes(e.activation_bytes):>12}{_remarks(e)}"
            for e in engines
        ]
        size = format_bytes(sum(manifest.files[e.file].size for e in engines))
        weights, activations = _total(e.weight_bytes for e in engines), [e.activation_bytes for e in engines]
        largest = None if None in activations else max(a for a in activations if a is not None)
        lines.append(f"  {'all':<20} {size:>10} {format_bytes(weights):>10} {format_bytes(_total(activations)):>12}")
        if weights is not None and largest is not None:
            lines.append(
                f"  device memory: {format_bytes(weights + largest)} where engines share their activations' memory"
            )
        if missing:
            lines.append(f"  none of {', '.join(missing)}")
    return lines


def _remarks(engine: EngineEntry) -> str:
    plugins = "  with plugins" if engine.kernels is not None else ""
    return plugins + ("" if engine.measured else "  compiled without such a device, nothing was measured")


def _budgets(manifest: Manifest, budget: int) -> list[str]:
    """What fits, of the engines for each set of devices and of the ONNX files."""
    kinds: dict[str, dict[str, EngineEntry] | None] = {}
    for engine in manifest.engines:
        kind = f"engines of {engine.flavour.value} {engine.version} for {format_capabilities(engine.capabilities)}"
        of_kind = kinds.setdefault(kind, {})
        assert of_kind is not None
        of_kind[engine.network] = engine
    if manifest.has_graphs:
        kinds["ONNX files, by their size"] = None
    lines = []
    for kind, engines in kinds.items():
        lines += ["", f"in {format_bytes(budget)}: {kind}", *describe_budget(manifest, engines, budget)]
    return lines


def _total(sizes: Iterable[int | None]) -> int | None:
    """The sum; None where one of them is not known."""
    known = list(sizes)
    return None if None in known else sum(size for size in known if size is not None)


def _tensor(tensor: TensorSpec) -> str:
    dims = [str(d) if isinstance(d, int) else f"{d.name} {d.min}..{d.max}" for d in tensor.shape]
    return f"{tensor.name} {tensor.dtype} [{', '.join(dims)}]"
