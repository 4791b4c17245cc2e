"""Every TensorRT attribute that the code uses exists in each release and in TensorRT-RTX, unless it is guarded.

Guarded code is checked against the releases in which the guard is true: code behind `hasattr(trt, "IStreamWriter")`
against those that have it, code behind `flavour is Flavour.TENSORRT_RTX` against TensorRT-RTX.
"""

import json
from pathlib import Path

import pytest
from packaging.version import Version

from tests.engines.attribute_scan import ROOTS, Assignment, Guard, Scan, Use
from tests.engines.conftest import PINNED

LOOKUP = Path(__file__).parent / "attribute_lookup.py"
PACKAGES = ("engines", "kernels", "moma_rt")


class Release:
    """The paths of a scan, looked up in one release."""

    def __init__(self, scan: Scan, bindings) -> None:
        self._module = bindings.module
        guards = {guard.path for use in scan.uses for guard in use.guards if not guard.is_flavour}
        paths = {"trtp"} | guards | {use.path for use in scan.uses} | {assigned.path for assigned in scan.assignments}
        done = bindings.run(LOOKUP, bindings.module, stdin=json.dumps({"roots": ROOTS, "paths": sorted(paths)}))
        assert done.returncode == 0, done.stderr
        self._found = json.loads(done.stdout.splitlines()[-1])

    def reaches(self, use: Use) -> bool:
        if use.path.startswith("trtp") and self._found["trtp"]["missing"] is not None:
            return False
        return all(self._holds(guard) == guard.holds for guard in use.guards)

    def missing(self, use: Use) -> str | None:
        """Return the attribute or keyword of a use that this release lacks, or None."""
        found = self._found[use.path]
        unknown = [word for word in use.keywords if word not in (found["keywords"] or use.keywords)]
        return found["missing"] or (f"keyword {unknown[0]}" if unknown else None)

    def misnamed(self, assignment: Assignment) -> str | None:
        """Return the class of an assigned value if the variable's name does not stand for it; otherwise None."""
        types = [name for name in self._found[assignment.path]["types"] if name in ROOTS.values()]
        return types[0] if types and ROOTS.get(assignment.variable) not in types else None

    def _holds(self, guard: Guard) -> bool:
        return guard.path.lower() == self._module if guard.is_flavour else self._found[guard.path]["missing"] is None


def problems(scan: Scan, bindings) -> list[str]:
    release = Release(scan, bindings)
    reached = [use for use in scan.uses if release.reaches(use)]
    missing = [f"{use.line}: {use.path}: no {release.missing(use)}" for use in reached if release.missing(use)]
    named = [(assigned, release.misnamed(assigned)) for assigned in scan.assignments]
    return missing + [f"{assigned.line}: {assigned.variable} is a {cls}" for assigned, cls in named if cls is not None]


def unreachable(scan: Scan, every_bindings) -> list[str]:
    """Return the uses whose guards are true in no release, such as a `hasattr` of a misspelt name."""
    releases = [Release(scan, bindings) for bindings in every_bindings]
    dead = [use for use in scan.uses if not any(release.reaches(use) for release in releases)]
    return [f"{use.line}: {use.path}" for use in dead]


@pytest.fixture
def scans(repository: Path) -> dict[str, Scan]:
    sources = sorted(path for package in PACKAGES for path in (repository / package).rglob("*.py"))
    scanned = {path.relative_to(repository).as_posix(): Scan(path.read_text()) for path in sources}
    return {name: scan for name, scan in scanned.items() if scan.uses}


def test_the_builder_is_scanned(scans):
    paths = {use.path for use in scans["engines/tensorrt.py"].uses}
    assert paths >= {
        "trt.Builder()",
        "builder.build_serialized_network()",
        "parser.parse()",
        "parser_refitter.refit_from_bytes()",
    }


def test_the_backend_is_scanned(scans):
    paths = {use.path for use in scans["moma_rt/backends/tensorrt.py"].uses}
    assert paths >= {
        "trt.Runtime()",
        "runtime.deserialize_cuda_engine()",
        "engine.create_execution_context()",
        "trt.ExecutionContextAllocationStrategy.USER_MANAGED",
        "context.update_device_memory_size_for_shapes()",
        "context.execute_async_v3()",
    }


@pytest.mark.parametrize("operator", ["injected_self_attention", "context_cross_attention"])
def test_the_plugins_are_scanned(scans, operator):
    paths = {use.path for use in scans[f"kernels/{operator}/tensorrt_plugin.py"].uses}
    assert paths >= {"trtp.register()", "trtp.aot_impl()", "trtp.KernelLaunchParams()", "trtp.AutoTuneCombination()"}


def test_every_attribute_exists(scans, bindings):
    found = {name: problems(scan, bindings) for name, scan in scans.items()}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_every_guard_is_true_in_some_release(scans, every_bindings):
    found = {name: unreachable(scan, every_bindings) for name, scan in scans.items()}
    assert {name: dead for name, dead in found.items() if dead} == {}


# Valid Python, never run. Exactly the lines that end in `# wrong` must be reported, in every release.
EXAMPLE = """
def f(library, flavour, Flavour):
    trt = library(flavour)
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    trt.Bilder(logger)  # wrong
    getattr(trt, "Bilder")(logger)  # wrong
    getattr(trt, "IStreamWriter", None)
    trt.Builder(logger).create_netwrk(0)  # wrong
    build = trt.Builder(logger)  # wrong
    engine = builder.create_builder_config()  # wrong
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.TF32)
    config.set_flag(flag=trt.BuilderFlag.TF33)  # wrong
    config.set_flg(trt.BuilderFlag.TF32)  # wrong
    config.max_aux_streams = 0
    config.max_aux_stream = 0  # wrong
    config.set_timing_cache(timing_cache, ignore_mismatch=False)
    config.set_timing_cache(timing_cache, ignore=False)  # wrong
    config.get_timing_cache().serialise()  # wrong
    texts = [parser.get_error(i).desc() for i in range(parser.num_errors)]
    texts = [parser.get_error(i).dsc() for i in range(parser.num_errors)]  # wrong
    parser.num_errors.what_an_int_has_is_not_checked()
    self._parser.parse_fil("x")  # wrong
    if hasattr(trt, "IStreamWriter"):
        builder.build_serialized_network_to_stream(network, config, trt.IStreamWriter())
    if hasattr(trt, "Builder"):
        trt.Bilder  # wrong
    writer = trt.IStreamWriter if hasattr(trt, "IStreamWriter") else trt.Builder
    if hasattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH"):
        trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH
    if flavour is Flavour.TENSORRT_RTX:
        config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    if flavour is not Flavour.TENSORRT_RTX or config.num_compute_capabilities == 1:
        pass
    if flavour is Flavour.TENSORRT and hasattr(network, "add_plugin"):
        network.add_plugin(x, aot=True)
    class Progress(trt.IProgressMonitor):
        def step_complete(self, name, step): pass
        def phase_begin(self, name): pass  # wrong
        def _own(self): pass
    class Logger(trt.ILogger):
        def log(self, severity, message): pass
        def first_error(self): pass
    logger.first_error()
    logger.frst_error()  # wrong
    if not hasattr(trt, "IStreamWriter"):
        return
    trt.IStreamWriter
"""


def test_missing_attributes_are_found(bindings):
    wrong = [number for number, line in enumerate(EXAMPLE.splitlines(), 1) if line.endswith("# wrong")]
    assert sorted(int(problem.partition(":")[0]) for problem in problems(Scan(EXAMPLE), bindings)) == wrong


PLUGIN_EXAMPLE = """
def f():
    import tensorrt.plugin as trtp
    @trtp.register("a::b")
    def describe(x: trtp.TensorDesc) -> trtp.TensorDsc:  # wrong
        return trtp.from_shape_exprs((1,), None)  # wrong
    trtp.KernelLaunchParams(grid_x=1, shared_mem=2)
    trtp.KernelLaunchParams(cluster_x=1)  # wrong
    trtp.op
"""


def test_missing_attributes_of_plugins_are_found(plugin_bindings):
    wrong = [number for number, line in enumerate(PLUGIN_EXAMPLE.splitlines(), 1) if line.endswith("# wrong")]
    found = [int(problem.partition(":")[0]) for problem in problems(Scan(PLUGIN_EXAMPLE), plugin_bindings)]
    assert sorted(found) == wrong


def test_a_release_without_plugins_has_none_to_check(load_bindings):
    oldest = load_bindings(min(PINNED, key=lambda requirement: Version(str(requirement).partition("==")[2])))
    assert problems(Scan(PLUGIN_EXAMPLE), oldest) == []


def test_a_guard_that_never_holds_is_found(every_bindings):
    assert unreachable(Scan(EXAMPLE), every_bindings) == []
    scan = Scan("if hasattr(trt, 'IStreamWriters'):\n    trt.IStreamWriter\ngetattr(trt, 'Bilder', None)")
    expected = ["1: trt.IStreamWriters", "2: trt.IStreamWriter", "3: trt.Bilder"]
    assert unreachable(scan, every_bindings) == expected


HAS, LACKS = Guard("trt.X", True), Guard("trt.X", False)
RTX, FULL = Guard("TENSORRT_RTX", True, True), Guard("TENSORRT_RTX", False, True)


@pytest.mark.parametrize(
    ("source", "guards"),
    [
        ("trt.Y", ()),
        ("if hasattr(trt, 'X'):\n    trt.Y", (HAS,)),
        ("if hasattr(trt, 'X'):\n    pass\nelse:\n    trt.Y", (LACKS,)),
        ("if hasattr(trt, 'X'):\n    pass\ntrt.Y", ()),
        ("for a in b:\n    if hasattr(trt, 'X'):\n        continue\n    trt.Y", (LACKS,)),
        ("for a in b:\n    if hasattr(trt, 'X'):\n        continue\ntrt.Y", ()),
        ("if not hasattr(trt, 'X'):\n    raise E\ntrt.Y", (HAS,)),
        ("if a and hasattr(trt, 'X'):\n    trt.Y", (HAS,)),
        ("if a and hasattr(trt, 'X'):\n    pass\nelse:\n    trt.Y", ()),
        ("if a or hasattr(trt, 'X'):\n    trt.Y", ()),
        ("if a or hasattr(trt, 'X'):\n    pass\nelse:\n    trt.Y", (LACKS,)),
        ("hasattr(trt, 'X') and trt.Y", (HAS,)),
        ("hasattr(trt, 'X') or trt.Y", (LACKS,)),
        ("1 if hasattr(trt, 'X') else trt.Y", (LACKS,)),
        ("if flavour == Flavour.TENSORRT_RTX:\n    trt.Y", (RTX,)),
        ("if flavour is not Flavour.TENSORRT_RTX:\n    trt.Y", (FULL,)),
        (
            "if flavour is Flavour.TENSORRT_RTX:\n    def f():\n        if hasattr(trt, 'X'):\n            trt.Y",
            (RTX, HAS),
        ),
    ],
)
def test_the_guards_of_a_use(source, guards):
    assert [use.guards for use in Scan(source).uses if use.path == "trt.Y"] == [guards]


def test_a_source_without_trt_has_nothing_to_check():
    assert Scan("config.set_flag(1)\nengine.anything").uses == []
