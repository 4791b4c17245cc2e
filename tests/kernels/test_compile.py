"""The command line of the kernels' compiler."""

import pytest

from kernels.compile import main
from kernels.ptx import SELF, AttentionLayer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--capabilities", "90,91", "--out", "x"], "no '91'; there are: 80, 86"),
        (["--capabilities", "", "--out", "x"], "no ''; there are: 80, 86"),
        (["--capabilities", "sm90", "--out", "x"], "no 'sm90'; there are: 80, 86"),
        (["--capabilities", "90", "--out", "/proc"], "--out /proc: is not an empty folder"),
        (["--capabilities", "90", "--out", "/proc/version"], "--out /proc/version: is not an empty folder"),
        (["--capabilities", "90", "--out", "/proc/x/y"], "cannot be written"),
        ([], "--out"),
    ],
)
def test_wrong_options(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kernels.ptx.SD15_LAYERS", (AttentionLayer(SELF, 8, 16, 64),))
    assert main(["--capabilities", "89, 89", "--out", str(tmp_path / "made")]) == 0
    assert len(list((tmp_path / "made").glob("*.ptx"))) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["kernel", "threads", "shared", "registers", "spilled"]
    assert all(line.endswith("0") for line in lines)
    assert len(lines) == 2


def test_an_empty_folder_is_filled(tmp_path, monkeypatch):
    monkeypatch.setattr("kernels.ptx.SD15_LAYERS", (AttentionLayer(SELF, 8, 16, 64),))
    (tmp_path / "made").mkdir()
    (tmp_path / "link").symlink_to("made")
    assert main(["--capabilities", "89", "--out", str(tmp_path / "link")]) == 0
    assert (tmp_path / "made" / "kernels.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "made"]


def test_files_that_systems_leave_do_not_fill_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("kernels.ptx.SD15_LAYERS", (AttentionLayer(SELF, 8, 16, 64),))
    for stray in (".DS_Store", "Thumbs.db"):
        (tmp_path / stray).touch()
    for folder in ("lost+found", ".partial-killed"):
        (tmp_path / folder).mkdir()
    assert main(["--capabilities", "89", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "kernels.json").is_file()
    assert not list(tmp_path.glob(".partial-*"))


@pytest.mark.parametrize("exists", [True, False])
def test_a_disk_that_is_full(tmp_path, monkeypatch, capsys, exists):
    def fail(folder, *_):
        (folder / "half.ptx").touch()
        raise OSError(28, "No space left on device")

    out = tmp_path / "made"
    if exists:
        out.mkdir()
    monkeypatch.setattr("kernels.ptx.write_kernels", fail)
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(out)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"--out {out}: cannot be written: No space left on device")
    assert out.exists() == exists
    assert not exists or list(out.iterdir()) == []


def test_a_file_system_without_renaming(tmp_path, monkeypatch):
    monkeypatch.setattr("kernels.ptx.SD15_LAYERS", (AttentionLayer(SELF, 8, 16, 64),))

    def refuse(*_, **__):
        raise OSError(38, "Function not implemented")

    for call in ("os.rename", "os.chmod"):
        monkeypatch.setattr(call, refuse)
    assert main(["--capabilities", "89", "--out", str(tmp_path / "made")]) == 0
    assert (tmp_path / "made" / "kernels.json").stat().st_size > 0


def test_a_full_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path)])
    assert capsys.readouterr().err.splitlines()[-1].endswith("is not an empty folder; give a new or an empty one")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_without_triton(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kernels.compile.HAS_TRITON", False)
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path / "made")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("Triton is not installed: pip install triton")
