import re
from pathlib import Path

import pytest

from engines.targets import INDUCTOR_CAPABILITIES
from export.cross import devices
from export.cross.devices import DEVICES
from kernels.launch import CAPABILITIES


def test_a_device_for_every_capability_that_our_kernels_have():
    assert tuple(DEVICES) == INDUCTOR_CAPABILITIES == CAPABILITIES


@pytest.mark.parametrize("facts", DEVICES.values(), ids=lambda facts: facts.name)
def test_every_macro_of_the_stubs_is_defined(facts):
    folder = Path(devices.__file__).parent
    sources = {path.name: path.read_text() for path in folder.glob("*.[ch]")}
    used = {name for text in sources.values() for name in re.findall(r"\bDEVICE_[A-Z0-9_]+\b", text)}
    constant = set(re.findall(r"#define (DEVICE_[A-Z0-9_]+) \d+", sources["device.h"]))
    assert constant.isdisjoint(facts.macros)
    assert used - {"DEVICE_"} == constant | set(facts.macros)
    assert all(re.fullmatch(r"[1-9]\d*", value) for name, value in facts.macros.items() if name != "DEVICE_NAME")


def test_jetson_and_spark_have_arm_hosts():
    assert {c for c, facts in DEVICES.items() if facts.machines == ("aarch64",)} == {87, 121}
