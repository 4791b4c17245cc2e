"""README and docs: links resolve, commands and options exist, Python examples compile, and Sphinx does not warn."""

import ast
import functools
import importlib
import io
import posixpath
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

from moma_rt.backends import AUTO, NAMES
from moma_rt.schedulers.tables import SCHEDULERS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
PAGES = [*DOCS, "CONTRIBUTING.md", "CHANGELOG.md", "assets/README.md"]
PACKAGES = ("moma_rt", "export", "engines", "kernels", "benchmarks")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@functools.cache
def tracked() -> frozenset[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return frozenset(listed.stdout.splitlines())


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    for title in re.findall(r"^#{1,6} +(.+)$", FENCE.sub("", text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "", title).lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if i == 0 else f"{slug}-{i}" for slug, count in found.items() for i in range(count + 1)}


def broken_links(page: str, text: str) -> Iterator[str]:
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        file = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
        if file not in tracked():
            yield target
        elif anchor and anchor not in anchors(text if file == page else read(file)):
            yield target


@functools.cache
def options_of(module: str, *subcommand: str) -> frozenset[str] | None:
    """The options that a command's --help describes; None if there is no such command."""
    said = io.StringIO()
    argv = patch.object(sys, "argv", [module, *subcommand, "--help"])
    try:
        with argv, redirect_stdout(said), redirect_stderr(io.StringIO()):
            runpy.run_module(module, run_name="__main__")
    except ImportError:
        return None
    except SystemExit as end:
        if end.code:
            return None
    return frozenset(re.findall(r"^ +(?:-\w, )?(--[a-z][a-z-]*)", said.getvalue(), re.MULTILINE))


def command_of(words: list[str]) -> tuple[str, ...] | None:
    """`moma_rt SUBCOMMAND` or the module that a command line of this project runs; None if it is another's."""
    if words[:1] == ["moma-rt"]:
        return ("moma_rt", *words[1:2])
    if words[:3] == ["python", "-m", "examples.mini_moma"]:
        return tuple(words[2:4])
    if words[:2] == ["python", "-m"] and words[2].split(".")[0] in PACKAGES:
        return (words[2],)
    return None


def wrong_commands(shell: str) -> Iterator[str]:
    """What a shell block names and does not exist: commands, options, make targets, extras, scripts."""
    makefile, extras = read("Makefile"), read("pyproject.toml").split("[project.optional-dependencies]")[1]
    for line in re.split(r"\n|&&", shell.replace("\\\n", " ")):
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):
            words.pop(0)
        if command := command_of(words):
            known = options_of(*command)
            given = {word.partition("=")[0] for word in words if word.startswith("--")}
            yield from sorted(given - known) if known is not None else [" ".join(command)]
        elif words[:1] == ["make"]:
            yield from (t for t in words[1:] if "=" not in t and not re.search(rf"^{t}:", makefile, re.MULTILINE))
        elif words[:1] == ["bash"] and words[1] not in tracked():
            yield words[1]
        for extra in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
            yield from (name for name in extra.split(",") if not re.search(rf"^{name} = ", extras, re.MULTILINE))


def wrong_names(source: str) -> Iterator[str]:
    """What a Python example imports, or reads from a package that it imports, and does not exist."""
    modules = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name: importlib.import_module(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            yield from (alias.name for alias in node.names if not hasattr(module, alias.name))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            if not hasattr(modules[node.value.id], node.attr):
                yield f"{node.value.id}.{node.attr}"


def blocks(text: str, *languages: str) -> list[str]:
    return [code for language, code in FENCE.findall(text) if language in languages]


def section(page: str, title: str) -> str:
    return read(page).split(f"## {title}\n")[1].split("\n## ")[0]


def first_column(text: str) -> set[str]:
    return {name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`(.+?)`", row)}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str):
    assert list(broken_links(page, read(page))) == []


@pytest.mark.parametrize("page", DOCS)
def test_commands_and_their_options_exist(page: str):
    assert [wrong for shell in blocks(read(page), "sh", "bash") for wrong in wrong_commands(shell)] == []


@pytest.mark.parametrize("page", DOCS)
def test_python_examples_compile_and_their_names_exist(page: str):
    assert [name for source in blocks(read(page), "python") for name in wrong_names(source)] == []


def test_code_blocks_say_their_language():
    languages = {language for page in DOCS for language, _ in FENCE.findall(read(page)) if language}
    assert languages <= {"sh", "python"}, "others are not checked"


@pytest.mark.parametrize("title", re.findall(r"^## (.+)$", read("docs/command-line.md"), re.MULTILINE))
def test_the_command_line_page_has_every_option(title: str):
    command = command_of(title.split())
    known = options_of(*command) if command else None
    assert known is not None
    assert first_column(section("docs/command-line.md", title)) == known - {"--help"}


def test_tables_have_every_name():
    assert first_column(section("docs/deployment.md", "Backends")) == set(NAMES) - {AUTO}
    assert first_column(section("docs/few-steps.md", "Schedulers")) == set(SCHEDULERS)


def test_the_readmes_numbers_are_those_of_the_benchmarks():
    numbers = re.findall(r"[\d.]+ (?:m?s\b)|[\d.]+x", section("README.md", "Measured"))
    assert len(numbers) >= 6
    assert [number for number in numbers if number not in read("docs/benchmarks.md")] == []


def test_sphinx_builds_without_a_warning(tmp_path: Path):
    for module in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html", "docs", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr


def test_the_checks_can_fail():
    links = "# A title, `x`\n[a](docs/no.md) [b](README.md#nowhere) [c](#a-title-x) [d](#b) `[e](f)` [g](http://h)"
    assert list(broken_links("README.md", links)) == ["docs/no.md", "README.md#nowhere", "#b"]
    shell = "X=1 make demo nothing  # --comment\npython -m export.build --base tiny --fast && moma-rt enrol\nls --all\n"
    assert list(wrong_commands(shell)) == ["nothing", "--fast", "moma_rt enrol"]
    assert list(wrong_commands("python -m export.\\\nno\nbash no.sh\npip install '.[rtx,no]'")) == [
        "export.",
        "no.sh",
        "no",
    ]
    assert list(wrong_names("import moma_rt\nfrom moma_rt import Runtime, Engine\nmoma_rt.load")) == [
        "Engine",
        "moma_rt.load",
    ]
    with pytest.raises(SyntaxError):
        list(wrong_names("result ="))
