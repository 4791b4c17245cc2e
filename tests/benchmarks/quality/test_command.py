"""The evaluation's commands: whole runs on the tiny bundle, comparisons, and what they refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.environment import RESULTS_VARIABLE
from benchmarks.quality import command, compare, parity, rows
from benchmarks.quality.cases import Setup
from benchmarks.quality.options import FEW_STEPS, shareable
from moma_rt.schedulers.tables import SCHEDULERS

ONE_STEP = ["--threads", "1", "--subjects", "1", "--contexts", "beach", "--textures", "gold", "--steps", "1"]


@pytest.fixture(autouse=True)
def results_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(RESULTS_VARIABLE, str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_a_run_writes_scores_and_pictures_and_is_compared(tiny_bundle, tmp_path, capsys):
    arguments = [str(tiny_bundle), *ONE_STEP, "--ablation", "other_photo"]
    assert command.main([*arguments, "--out", "a"]) == 0
    printed = capsys.readouterr().out
    assert "| prompt |" in printed
    assert "| another subject's photo under this name | subject |" in printed
    results = json.loads((tmp_path / "a.json").read_text())
    assert results["environment"]["command"].startswith("python -m benchmarks.quality BUNDLE --threads 1")
    assert results["bundle"]["base"] == "tiny"
    assert results["settings"]["steps"] == 1
    assert results["scorers"]["accuracy"]["renders"]["context"] > 0.9
    assert results["pictures"]["full"]["keys"] == ["beach", "gold"]
    assert results["pictures"]["other_photo"]["keys"] == ["beach"]
    assert (tmp_path / "a.html").read_text().count("<img ") == 3 + 2
    assert command.main([str(tiny_bundle), *ONE_STEP, "--strength", "0.5", "--out", "b"]) == 0
    capsys.readouterr()
    assert compare.main(["a.json", "b.json"]) == 0
    assert "| similarity |" in capsys.readouterr().out


def test_results_of_other_scorers_or_kinds_are_not_compared(tmp_path, capsys):
    scores = {"subjects": ["a"], "keys": ["beach"], "found": {"beach": "night"}, "values": {"prompt": ["0"]}}
    for name, digest, subject in (("a", "1", "a"), ("b", "2", "a"), ("c", "1", "z")):
        content = {"scorers": {"digest": digest}, "pictures": {"full": {**scores, "subjects": [subject]}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "d.json").write_text("[]")

    def refusal(one, other):
        assert compare.main([one, other]) == 2
        return capsys.readouterr().err

    assert "a.json was judged by scorers 1, b.json by 2: evaluate both with the same" in refusal("a.json", "b.json")
    assert "the two evaluations share no picture" in refusal("a.json", "c.json")
    assert "d.json is no result of python -m benchmarks.quality" in refusal("a.json", "d.json")
    assert "nothing.json: No such file" in refusal("a.json", "nothing.json")
    assert compare.main(["a.json", "a.json"]) == 0
    assert "| prompt | +0.000 | +0.000 to +0.000 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--subjects", "0"], "--subjects 0: it must be 1 to 50"),
        (["--subjects", "51"], "--subjects 51: it must be 1 to 50"),
        (["--contexts", "beach,moon"], "--contexts 'beach,moon': no context moon; there are: beach"),
        (["--textures", "glass"], "--textures 'glass': no texture glass; there are: gold"),
        (["--ablation", "everything"], "--ablation 'everything': no ablation everything; there are: no_reference"),
        (["--contexts", "none", "--textures", "none"], "neither a context nor a texture is left to evaluate"),
        (["--steps", "0"], "steps must be 1 to 999, not 0"),
        ([], "nowhere"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(arguments, message, tmp_path, capsys):
    assert command.main(["nowhere", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_row_of_strengths(tiny_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "_STRENGTHS", (0.2, 1.2))
    assert rows.main([str(tiny_bundle), *ONE_STEP, "--vary", "strength", "--out", "r"]) == 0
    results = json.loads((tmp_path / "r_strength.json").read_text())
    assert list(results["scores"]) == ["strength 0.2", "strength 1.2"]
    with Image.open(tmp_path / "r_strength.png") as image:
        assert image.size == (120 + 3 * 132, 14 + 2 * 132)
        sheet = np.asarray(image)
    assert np.abs(sheet[14:142, 252:380].astype(int) - sheet[14:142, 384:512]).mean() > 0.1, "strength matters"
    assert "| strength 1.2 |" in capsys.readouterr().out


def test_what_each_row_varies():
    usual = Setup(scheduler="euler", steps=9)
    assert {setup.strength for setup in rows.setups("strength", usual).values()} >= {0.2, 0.4, 1.2}
    assert [setup.steps for setup in rows.setups("steps", usual).values()] == [4, 6, 10, 20, 50]
    every = rows.setups("scheduler", usual)
    assert {setup.scheduler for setup in every.values()} == set(SCHEDULERS)
    assert {setup.guidance_scale for setup in every.values() if setup.scheduler in FEW_STEPS} == {1.0}
    assert {setup.guidance_scale for setup in every.values() if setup.scheduler not in FEW_STEPS} == {7.5}
    assert rows.main(["nowhere", "--vary", "none"]) == 2


def test_the_bundle_makes_the_originals_pictures(tiny_bundle, tmp_path, capsys):
    pytest.importorskip("diffusers")
    arguments = [str(tiny_bundle), "--base", "tiny", "--pictures", "1", "--steps", "2", "--threads", "1"]
    assert parity.main(arguments) == 0
    results = json.loads((tmp_path / "quality_parity.json").read_text())
    assert results["psnr_db"]["least"] >= 45
    assert results["pictures"][0]["prompt"] == "A teddy bear on a beach."
    assert parity.main([*arguments, "--least", "101"]) == 1
    assert "from the original's, 101 are needed" in capsys.readouterr().err


def test_a_recorded_command_holds_no_folder_of_this_machine():
    given = ["/home/me/bundle", "--weights", "/home/me/mini", "--out", "a"]
    assert shareable("a.b", given, Path("/home/me/bundle")) == "python -m a.b BUNDLE --weights mini --out a"


def test_parity_takes_two_pictures_of_each_subject_in_changing_contexts(tmp_path):
    made = list(parity.requests(tmp_path, 20))
    assert len({request.photo for request in made}) == 10
    assert len({request.prompt.split(" ", 3)[-1] for request in made}) >= 12
    assert len({(request.name, request.seed) for request in made}) == 20
    assert parity.main(["nowhere", "--base", "tiny", "--pictures", "0"]) == 2
