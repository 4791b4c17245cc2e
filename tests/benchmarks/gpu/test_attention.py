"""The attention step, rehearsed on the CPU: a wrong case is reported, and the others are still measured."""

import json

import pytest

from benchmarks.gpu.attention import chosen_cases, main, padded_cases
from benchmarks.kernels.attention_cases import SelfCase


@pytest.fixture
def written_here(tmp_path, monkeypatch):
    monkeypatch.setenv("MOMA_RT_RESULTS", str(tmp_path))
    return tmp_path / "attention.json"


def test_every_level_and_the_padded_width():
    cases = chosen_cases(rehearse=False)
    assert {case.level.grid for case in cases} == {64, 32, 16, 8}
    assert {case.level.channels for case in padded_cases(rehearse=False)} == {8 * 64}


def test_a_rehearsal(written_here, capsys):
    assert main(["--rehearse"]) == 0
    found = json.loads(written_here.read_text())
    assert (len(found["cases"]), len(found["padded"]), found["wrong"]) == (3, 2, [])
    assert found["complete"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("3 of 3 cases right, 0 wrong, 0 compiled; 6 layers")


def test_a_wrong_case_does_not_hide_the_others(written_here, monkeypatch, capsys):
    right = SelfCase.moma
    monkeypatch.setattr(
        SelfCase, "moma", lambda self, inputs: tuple(t + (self.form == "masked") for t in right(self, inputs))
    )
    assert main(["--rehearse"]) == 1
    found = json.loads(written_here.read_text())
    assert len(found["cases"]) == 2
    (wrong,) = found["wrong"]
    assert "'form': 'masked'" in wrong
    assert "1 wrong" in capsys.readouterr().out.splitlines()[-1]
