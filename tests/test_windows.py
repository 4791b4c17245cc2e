"""What Windows lacks is not needed: a build, an enrollment and a generation run without. Nothing here was run there.

`tests/as_on_windows.py` says what is imitated. mypy checks the same sources for Windows (`make lint`).
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moma_rt.subject import Subject
from tests.as_on_windows import POSIX_MODULES

PACKAGES = ("moma_rt", "engines", "kernels", "export")


@pytest.fixture
def on_windows(repository: Path, tmp_path: Path):
    """Run Python as on Windows, for files below a folder; returns the output, or fails with the error."""
    (tmp_path / "python").mkdir()
    text = f"from tests.as_on_windows import install\ninstall({str(tmp_path / 'files')!r})\n"
    (tmp_path / "python" / "sitecustomize.py").write_text(text, encoding="utf-8")
    (tmp_path / "files").mkdir()

    def run(*arguments: object) -> str:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tmp_path / "python"), str(repository)]),
            # A console of Western Europe.
            "PYTHONIOENCODING": "cp1252",
        }
        command = [sys.executable, "-X", "warn_default_encoding", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=tmp_path / "files", env=environment, capture_output=True, check=False, encoding="cp1252"
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_a_build(on_windows, tmp_path: Path):
    """Twice, with other weights: the folders that the second one replaces hold read-only files."""
    pytest.importorskip("diffusers")
    build = """if True:
        from export.build import main as build
        from engines.pack import main as pack
        from engines.prune import main as prune
        for seed in "01":
            assert build(["--base", "tiny", "--only", "context_projector", "--out", "tiny", "--seed", seed]) == 0
        assert pack(["tiny", "--target", "cpu", "--out", "包"]) == 0  # not in the console's encoding
        assert prune([".store"]) == 0
    """
    assert "\\u5305: 1 MiB of 1 MiB" in on_windows("-c", build)
    found = sorted(path.name.rsplit("-", 1)[0] for path in (tmp_path / "files").glob("tiny/*/*"))
    assert found == ["context_projector", "context_projector"]


def test_an_enrollment_and_a_generation(on_windows, tiny_bundle: Path, goldens: Path, tmp_path: Path):
    photo, mask = goldens / "context" / "image.png", goldens / "context" / "mask.png"
    (tmp_path / "files" / "cup.png").write_bytes(b"of an earlier run")
    on_windows("-m", "moma_rt", "enroll", tiny_bundle, photo, mask, "--name", "cup", "--out", "cup.subject")
    arguments = ("cup.subject", "A cup.", "--steps", 1, "--out", "cup.png", "--save-mask", "new/mask.png")
    on_windows("-m", "moma_rt", "generate", tiny_bundle, *arguments)
    assert sorted(os.listdir(tmp_path / "files")) == ["cup.png", "cup.subject", "new"]
    assert (tmp_path / "files" / "cup.png").read_bytes().startswith(b"\x89PNG")
    assert Subject.load(tmp_path / "files" / "cup.subject").name == "cup"


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("__name__ = 'engines.lock'; import fcntl", "No module named 'fcntl'"),
        ("__name__ = 'engines.lock'; import os; os.fork", "no attribute 'fork'"),
        ("__name__ = 'export.cross'; import signal; signal.SIGKILL", "no attribute 'SIGKILL'"),
        ("__name__ = 'moma_rt.files'; open('a', 'w')", "'encoding' argument not specified"),
        ("__name__ = 'moma_rt.files'; from pathlib import Path; Path('a').write_text('')", "EncodingWarning"),
        ("import os; os.open('..' + '/files/', os.O_RDONLY); os.mkdir('a'); os.open('a', os.O_RDONLY)", "PermissionEr"),
        ("open('a', 'w'); import os; os.chmod('a', 0o444); os.unlink('a')", "Access is denied"),
        ("f = open('a', 'w'); import os; os.replace('a', 'b')", "Access is denied"),
        ("import os; os.mkdir('d'); f = open('d/a', 'w'); os.rename('d', 'e')", "used by another process"),
        ("import os; os.mkdir('d'); os.mkdir('e'); os.rename('d', 'e')", "already exists"),
        ("open('a:b', 'w')", "syntax is incorrect"),
        ("open('nul.txt', 'w')", "syntax is incorrect"),
        ("import os; os.mkdir('d'); os.symlink('d', 'l')", "privilege"),
        ("import os; open('a', 'w').close(); os.fsync(os.open('a', os.O_RDONLY))", "Bad file descriptor"),
    ],
)
def test_the_imitation_refuses(on_windows, code: str, error: str):
    with pytest.raises(AssertionError, match=error):
        on_windows("-c", code)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_of_unix_is_imported(repository: Path, package: str):
    """Neither at import nor later, except behind a check of the platform that mypy understands."""
    wrong = []
    for path in sorted((repository / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            wrong += [f"{path.relative_to(repository)}:{node.lineno}: {n}" for n in names if n in POSIX_MODULES]
    assert wrong == []
