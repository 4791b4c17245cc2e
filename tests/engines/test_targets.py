import pytest

from engines.targets import KNOWN, EngineTarget, Machine, parse_targets, resolve, targets_for_other_devices
from moma_rt.bundle.engines import Device, Flavour
from moma_rt.errors import InputError

RTX, FULL, INDUCTOR = Flavour.TENSORRT_RTX, Flavour.TENSORRT, Flavour.INDUCTOR
BOTH = frozenset(Flavour)
H100, RTX4090, ORIN = Device("H100", 90), Device("RTX 4090", 89), Device("Orin", 87)


def targets(text, device=None, installed=BOTH):
    return resolve(parse_targets(text), Machine(device, installed))


@pytest.mark.parametrize(
    ("text", "device", "installed", "expected"),
    [
        ("cpu", None, frozenset(), ()),
        ("sm86", None, {RTX}, [(RTX, (86,))]),
        ("sm120, SM86,cpu,sm86", None, {RTX}, [(RTX, (86, 120))]),
        ("rtx", None, {RTX}, [(RTX, (86, 89, 120, 121))]),
        ("rtx,sm75", None, {RTX}, [(RTX, (75, 86, 89, 120, 121))]),
        ("sm90", H100, {FULL}, [(FULL, (90,))]),
        ("local", H100, {FULL}, [(FULL, (90,))]),
        ("local", ORIN, BOTH, [(FULL, (87,))]),
        ("local", RTX4090, BOTH, [(FULL, (89,))]),
        ("local", RTX4090, {RTX}, [(RTX, (89,))]),
        ("local,sm86", H100, BOTH, [(RTX, (86,)), (FULL, (90,))]),
        ("local,sm90", H100, BOTH, [(FULL, (90,))]),
        ("inductor", None, {INDUCTOR}, [(INDUCTOR, (0,))]),
        ("inductor", H100, {INDUCTOR}, [(INDUCTOR, (90,))]),
        ("inductor,local,sm86,cpu", H100, BOTH, [(RTX, (86,)), (FULL, (90,)), (INDUCTOR, (90,))]),
        ("inductor:sm90", None, {INDUCTOR}, [(INDUCTOR, (90,), False)]),
        ("inductor:sm90, Inductor:SM80", H100, {INDUCTOR}, [(INDUCTOR, (80,), False), (INDUCTOR, (90,), False)]),
        ("inductor:sm89,inductor", None, {INDUCTOR}, [(INDUCTOR, (0,)), (INDUCTOR, (89,), False)]),
        # A package measured here also serves where one chosen by rule was asked for.
        ("inductor,inductor:sm90,inductor:sm89", H100, BOTH, [(INDUCTOR, (90,)), (INDUCTOR, (89,), False)]),
    ],
)
def test_what_targets_stand_for(text, device, installed, expected):
    assert targets(text, device, frozenset(installed)) == tuple(EngineTarget(*e) for e in expected)


@pytest.mark.parametrize("name", KNOWN)
def test_every_known_target_is_built_or_explained(name):
    capability = int(name.rpartition("sm")[2]) if "sm" in name else 87
    assert targets(name, Device("a GPU", capability)) or name == "cpu"
    if name != "cpu":
        with pytest.raises(InputError, match=f"{name}|{name.replace(':', ' ')}|not installed"):
            targets(name, installed=frozenset())


@pytest.mark.parametrize(
    ("text", "device", "installed", "said"),
    [
        ("", None, BOTH, "no target is named"),
        ("sm86,gpu,sm61", None, BOTH, "no target gpu, sm61; there are: cpu, rtx, local, inductor, sm75"),
        ("local", None, BOTH, "this machine has no NVIDIA GPU"),
        ("local", H100, {RTX}, "tensorrt is not installed; pip install tensorrt"),
        ("local", RTX4090, (), "tensorrt_rtx is not installed; pip install tensorrt-rtx"),
        (
            "sm90",
            None,
            BOTH,
            "this machine has no GPU; export here with --precision fp16 instead, copy the bundle",
        ),
        ("sm90", RTX4090, BOTH, "this machine has sm89"),
        ("sm90", H100, {RTX}, "pip install tensorrt"),
        ("sm86", None, (), "pip install tensorrt-rtx"),
        ("inductor", None, (), "inductor cpu: the Python package torch is not installed; pip install torch"),
        ("inductor:sm90", None, (), "inductor sm90: the Python package torch is not installed; pip install torch"),
        ("inductor:sm75", None, BOTH, "no target inductor:sm75; there are: cpu, rtx,"),
        ("inductor:", None, BOTH, "no target inductor:; there are: cpu, rtx,"),
    ],
)
def test_what_cannot_be_built_here(text, device, installed, said):
    with pytest.raises(InputError) as caught:
        targets(text, device, frozenset(installed))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "device", "expected"),
    [
        ("cpu,rtx,local,sm86", None, ()),
        ("sm80", None, ("sm80",)),
        ("sm90,sm80,sm86", None, ("sm80", "sm90")),
        ("sm90,sm80,local", H100, ("sm80",)),
        ("sm87", RTX4090, ("sm87",)),
    ],
)
def test_targets_that_are_built_on_other_devices(text, device, expected):
    names = parse_targets(text)
    found = targets_for_other_devices(names, Machine(device, BOTH))
    assert found == expected
    if "local" not in names or device is not None:
        resolve(tuple(name for name in names if name not in found), Machine(device, BOTH))
