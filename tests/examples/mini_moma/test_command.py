"""`python -m examples.mini_moma`: help, and one line for each mistake."""

import runpy
import sys

import pytest

from examples.mini_moma.__main__ import main


def said(capsys, *arguments):
    """The exit code, and the lines on stderr that are no usage."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    return code, [line for line in capsys.readouterr().err.splitlines() if "error" in line]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("data", "--processes", "0"), "--processes must be at least 1, not 0"),
        (("vae", "--processes", "-2"), "--processes must be at least 1, not -2"),
        (("vae", "--steps", "0"), "--steps must be at least 1, not 0"),
        (("train", "--steps", "-5"), "--steps must be at least 1, not -5"),
        (("train", "--context-steps", "0"), "--context-steps must be at least 1, not 0"),
        (("train", "--minutes", "-1"), "--minutes must be at least 0, not -1.0"),
        (("vae", "--minutes", "nan"), "--minutes must be at least 0, not nan"),
        (("data", "--groups", "100"), "--groups must be a positive multiple of 250, not 100"),
        (("data", "--groups", "0"), "--groups must be a positive multiple of 250, not 0"),
        (("vae",), "has no training samples; first run: python -m examples.mini_moma data"),
        (("train",), "has no tokenizers; first run: python -m examples.mini_moma data"),
        (("data", "--steps", "5"), "unrecognized arguments: --steps 5"),
        (("vae", "--steps", "many"), "argument --steps: invalid int value: 'many'"),
        (("render",), "invalid choice: 'render'"),
        ((), "required: STAGE"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    code, lines = said(capsys, *arguments)
    assert code == 2
    assert len(lines) == 1
    assert expected in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_a_file(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    code, lines = said(capsys, "data", "--data", tmp_path / "file")
    assert code == 2
    assert len(lines) == 1
    assert "file" in lines[0]


@pytest.mark.parametrize("stage", ["data", "train"])
def test_a_folder_that_is_called_like_another_stage(capsys, tmp_path, monkeypatch, stage):
    monkeypatch.chdir(tmp_path)
    code, lines = said(capsys, "vae", "--data", stage)
    assert (code, len(lines)) == (2, 1)
    assert f"{stage} has no training samples" in lines[0]


def test_help(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mini_moma", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("examples.mini_moma", run_name="__main__")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(stage in shown for stage in ("data", "vae", "train"))


@pytest.mark.parametrize(("stage", "option"), [("data", "--groups"), ("vae", "--minutes"), ("train", "--write-only")])
def test_help_of_a_stage(capsys, stage, option):
    with pytest.raises(SystemExit) as end:
        main([stage, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (option, "--data", "--processes"))
