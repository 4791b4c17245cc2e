"""The command line, from arguments to files and exit codes, with fake networks."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moma_rt import backends
from moma_rt.cli import entry
from moma_rt.outputs import numbered

LONG = "x" * 300


@pytest.fixture(autouse=True)
def _fake_backend(monkeypatch, backend):
    create = backends.create

    def fake(name, threads=None):
        create(name, threads)
        return backend

    monkeypatch.setattr(backends, "create", fake)


@pytest.fixture
def files(tmp_path, photo, mask):
    """A folder with photo.png and mask.png."""
    photo.save(tmp_path / "photo.png")
    mask.save(tmp_path / "mask.png")
    return tmp_path


@pytest.fixture
def enrolled(files, fake_bundle, capsys):
    """The same folder with car.subject."""
    arguments = [fake_bundle, files / "photo.png", files / "mask.png", "--name", "car", "--out", files / "car.subject"]
    assert run("enroll", *arguments, "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    return files


def run(*arguments):
    return entry([str(a) for a in arguments])


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def one_line(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("moma-rt: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_a_photo_becomes_a_picture(files, fake_bundle, capsys):
    subject, out = files / "car.subject", files / "new" / "beach.png"
    arguments = [fake_bundle, files / "photo.png", files / "mask.png", "--name", "car", "--out", subject]
    assert run("enroll", *arguments) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{subject}\n"
    assert "subject_encoder" in printed.err
    assert run("generate", fake_bundle, subject, "A car on a beach.", "--steps", 20, "--out", out) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    lines = printed.err.splitlines()
    assert lines[:2] == ["step 10/20 (t = 501)", "step 20/20 (t = 1)"]
    assert lines[-1].startswith("total")
    assert {line.split()[0] for line in lines[2:]} >= {"loading", "language_model", "denoiser", "vae_decoder"}
    with Image.open(out) as image:
        assert (image.size, image.mode, image.format) == ((64, 64), "RGB", "PNG")


def test_the_options_reach_the_runtime(enrolled, fake_bundle, backend, runtime, monkeypatch):
    from moma_rt.subject import Subject

    out = enrolled / "a.png"
    options = "--steps 3 --strength 0.4 --guidance-scale 2 --seed 9 --threads 1 --quiet".split()
    options += "--scheduler dpmpp_2m --guidance-interval 300,600.5".split()
    assert run("generate", fake_bundle, enrolled / "car.subject", "A car.", "--out", out, *options) == 0
    options = {"steps": 3, "strength": 0.4, "guidance_scale": 2.0, "seed": 9}
    options |= {"scheduler": "dpmpp_2m", "guidance_interval": (300, 600.5)}
    expected = runtime.generate(Subject.load(enrolled / "car.subject"), "A car.", **options)
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(expected.images[0]))
    runs = len(backend.inputs_of("text_encoder"))
    command = ["generate", fake_bundle, enrolled / "car.subject", "A car.", "--out", out, "--steps", 1, "--quiet"]
    assert run(*command, "--negative-prompt", "blurry") == 0
    assert len(backend.inputs_of("text_encoder")) == runs + 2
    assert (backend.inputs_of("text_encoder")[-1]["token_ids"] != 1).sum() == len("blurry") + 1


def test_several_pictures_are_numbered(enrolled, fake_bundle, capsys):
    command = ["generate", fake_bundle, enrolled / "car.subject", "A car.", "--steps", 1, "--num-images", 2]
    assert run(*command, "--out", enrolled / "a.jpg", "--save-mask", enrolled / "m.webp") == 0
    written = [enrolled / name for name in ("a-0.jpg", "a-1.jpg", "m-0.webp", "m-1.webp")]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in written]
    assert {Image.open(path).format for path in written} == {"JPEG", "WEBP"}
    assert numbered(enrolled / "a.png", 1) == [enrolled / "a.png"]


def test_contact_sheet_and_mask(enrolled, fake_bundle):
    command = ["generate", fake_bundle, enrolled / "car.subject", "A car.", "--steps", 1, "--out", enrolled / "a.png"]
    assert run(*command, "--contact-sheet", enrolled / "sheet.png", "--save-mask", enrolled / "m.png") == 0
    sheet, mask = Image.open(enrolled / "sheet.png"), Image.open(enrolled / "m.png")
    assert sheet.width > 4 * 256
    assert (mask.mode, mask.size) == ("L", (64, 64))
    assert np.asarray(mask).max() > 0


def test_the_same_files_may_be_written_again(enrolled, fake_bundle):
    command = ["generate", fake_bundle, enrolled / "car.subject", "A car.", "--steps", 1, "--out", enrolled / "a.png"]
    assert run(*command) == 0
    first = (enrolled / "a.png").read_bytes()
    assert run(*command) == 0
    assert (enrolled / "a.png").read_bytes() == first
    assert names(enrolled) == ["a.png", "car.subject", "mask.png", "photo.png"]


def test_inspect_shows_a_bundle(fake_bundle, capsys, backend):
    assert run("inspect", fake_bundle) == 0
    out = capsys.readouterr().out
    for part in (
        "base        fake",
        "pictures    64 x 64",
        "3 self-attention layers on 8x8, 4x4",
        "\ndenoiser             fp32 ",
        "\nONNX Runtime, on a CPU or a GPU ",
        "hand-made",
    ):
        assert part in out
    assert len(out.splitlines()) <= 30, "one screen"
    assert "object_mask" not in out
    assert run("inspect", fake_bundle, "--tensors") == 0
    out = capsys.readouterr().out
    assert "in   object_mask.8 float32 [batch 1..4, reference_tokens_8 1..64]" in out
    assert "out  image uint8 [batch 1..4, 64, 64, 3]" in out
    assert backend.loads == []


def test_inspect_shows_a_subject(enrolled, capsys):
    assert run("inspect", enrolled / "car.subject") == 0
    out = capsys.readouterr().out
    assert "subject     car" in out
    assert "base        fake" in out
    assert "of 64 on 8x8" in out
    assert "prefix      " in out
    assert run("inspect", enrolled / "car.subject", "--tensors") == 2
    assert "car.subject is a subject file: --budget and --tensors are for bundles" in one_line(capsys)


def test_inspect_of_something_else(tmp_path, capsys):
    assert run("inspect", tmp_path / "none") == 2
    assert "none does not exist: give a bundle's folder" in one_line(capsys)
    assert run("inspect", LONG) == 2
    assert f"{LONG} cannot be read: File name too long" in one_line(capsys)
    os.mkfifo(tmp_path / "pipe")
    assert run("inspect", tmp_path / "pipe") == 2
    assert "is neither a bundle's folder nor a subject file" in one_line(capsys)


def test_a_path_that_is_too_long_is_one_line(enrolled, fake_bundle, capsys):
    for bundle, subject in ((LONG, enrolled / "car.subject"), (fake_bundle, LONG)):
        assert run("generate", bundle, subject, "A car.", "--out", enrolled / "a.png") == 2
        assert f"{LONG}" in one_line(capsys)


def test_a_folder_without_permission(enrolled, fake_bundle, capsys, monkeypatch):
    def refuse(self, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", refuse)
    assert run("inspect", enrolled) == 2
    assert f"{enrolled} cannot be read: Permission denied" in one_line(capsys)
    assert run("generate", fake_bundle, enrolled / "car.subject", "A car.", "--out", enrolled / "a.png") == 2
    assert "a.png: Permission denied" in one_line(capsys)


def test_a_link_as_output_stays_one(enrolled, fake_bundle):
    (enrolled / "new").mkdir()
    (enrolled / "new" / "real.png").touch(0o600)
    os.symlink("new/real.png", enrolled / "a.png")
    assert (
        run("generate", fake_bundle, enrolled / "car.subject", "A car.", "--steps", 1, "--out", enrolled / "a.png") == 0
    )
    assert (enrolled / "a.png").is_symlink()
    assert (enrolled / "new" / "real.png").read_bytes().startswith(b"\x89PNG")
    assert (enrolled / "new" / "real.png").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("command", ["enroll", "generate"])
def test_a_full_disk_is_one_line(enrolled, fake_bundle, capsys, command):
    """A limit on the size of files stands for it."""
    resource = pytest.importorskip("resource")
    arguments = {
        "enroll": [enrolled / "photo.png", enrolled / "mask.png", "--name", "car"],
        "generate": [enrolled / "car.subject", "A car.", "--steps", 1],
    }[command]
    out, before = enrolled / "out.png", names(enrolled)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        assert run(command, fake_bundle, *arguments, "--quiet", "--out", out) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert one_line(capsys) == f"moma-rt: error: cannot write {out}: File too large\n"
    assert names(enrolled) == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--strength", "2.5"], "strength is 2.5: it must be between 0 and 2"),
        (["--strength", "nan"], "strength is nan"),
        (["--steps", "0"], "steps must be 1 to 999, not 0"),
        (["--guidance-scale", "-2"], "guidance_scale is -2.0"),
        (["--guidance-interval", "9,3"], "guidance_interval is (9.0, 3.0): its first number must not be above"),
        (["--guidance-interval", "9"], "guidance_interval is (9.0,): it must be two numbers"),
        (["--guidance-interval", "a,b"], "--guidance-interval a,b: it must be two timesteps, LOW,HIGH"),
        (["--num-images", "0"], "num_images is 0"),
        (["--num-images", "65"], "num_images is 65"),
        (["--seed", "-1"], "seed must be 0 to"),
        (["--scheduler", "magic"], "unknown scheduler 'magic'; available: ddim"),
        (["--threads", "0"], "threads is 0: it must be an integer from 1 to 1024"),
        (["--contact-sheet", "sheet.pdf"], "sheet.pdf: cannot write .pdf; use .png"),
        (["--save-mask", "a.png"], "a.png is given twice: each file must have its own name"),
        (["--save-mask", "mask"], "mask: cannot write a file without suffix; use .png"),
        (["--num-images", "2", "--contact-sheet", "a-0.png"], "a-0.png is given twice"),
        (["--num-images", "2", "--out", "d.png"], "d-1.png is a folder: give a file to write"),
        (["--num-images", "2", "--out", LONG[:250] + ".png"], "-0.png: File name too long"),
        (["--num-images", "1000000000000"], "num_images is 1000000000000"),
        (["--save-mask", "d-1.png/../a.png"], "d-1.png/../a.png is given twice"),
        (["--save-mask", "link.png", "--out", "photo.png"], "link.png is given twice"),
        (["--save-mask", "circle.png/m.png"], "circle.png/m.png: Too many levels of symbolic links"),
        (["--save-mask", "a.png/m.png"], "a.png is given as a file and as the folder of another"),
        (["--save-mask", "pipe.png"], "pipe.png is a device or pipe: give a file to write"),
        (["--save-mask", "null.png"], "null.png is a device or pipe: give a file to write"),
        (["--out", "bundle/new/a.png"], "bundle/new/a.png is inside the bundle"),
    ],
)
def test_a_wrong_option_of_generate(enrolled, fake_bundle, backend, capsys, monkeypatch, option, message):
    monkeypatch.chdir(enrolled)
    os.mkdir("d-1.png")
    os.mkfifo("pipe.png")
    for link, target in (("link", "photo.png"), ("circle", "circle.png"), ("null", "/dev/null")):
        os.symlink(target, f"{link}.png")
    os.symlink(fake_bundle, "bundle")
    before, loads = names(enrolled), list(backend.loads)
    backend.runs.clear()
    assert run("generate", fake_bundle, "car.subject", "A car.", "--out", "a.png", *option) == 2
    assert message in one_line(capsys)
    assert names(enrolled) == before
    assert backend.runs == []
    assert backend.loads == loads


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "subject name is empty"),
        ({"name": " ".join(["word"] * 80)}, "subject name has 80 words, at most"),
        ({"photo": "none.png"}, "photo none.png does not exist"),
        ({"photo": "text.png"}, "photo text.png is not an image"),
        ({"mask": "empty.png"}, "the mask has no foreground"),
        ({"mask": "wide.png"}, "aspect ratio"),
        ({"photo": "bomb.png"}, "too large"),
        ({"out": "photo.png/car.subject"}, "photo.png is not a folder"),
        ({"out": "mask.png"}, "mask.png is given twice"),
        ({"out": "."}, "is a folder: give a file to write"),
        ({"out": LONG}, f"cannot write {LONG}: File name too long"),
        ({"out": f"{LONG}/car.subject"}, f"cannot write {LONG}/car.subject: File name too long"),
        ({"photo": LONG}, f"photo {LONG} cannot be read: File name too long"),
    ],
)
def test_wrong_input_of_enroll(files, fake_bundle, backend, capsys, monkeypatch, changes, message):
    monkeypatch.chdir(files)
    (files / "text.png").write_text("no picture")
    Image.new("L", (96, 96)).save("empty.png")
    Image.new("L", (96, 48), 255).save("wide.png")
    Image.new("1", (9000, 9000)).save("bomb.png")
    before = names(files)
    values = {"photo": "photo.png", "mask": "mask.png", "name": "car", "out": "car.subject", **changes}
    command = ["enroll", fake_bundle, values["photo"], values["mask"], "--name", values["name"], "--out", values["out"]]
    assert run(*command) == 2
    assert message in one_line(capsys)
    assert names(files) == before
    assert backend.runs == []


def change_format(path):
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format_version": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "manifest.json").unlink(), "is not a bundle: it has no manifest.json"),
        (
            lambda root: change_format(root / "manifest.json"),
            "has bundle format 99; this moma-rt reads format 5: upgrade it",
        ),
        (lambda root: (root / "networks/text_encoder/model.onnx").unlink(), "text_encoder/model.onnx is missing"),
        (lambda root: (root / "networks/denoiser/model.onnx").write_text("fake Denoiser"), "model.onnx was altered"),
        (lambda root: (root / "tokenizers/text.json").write_text("{}"), "tokenizers/text.json has 2 bytes"),
    ],
)
def test_a_damaged_bundle(enrolled, tmp_path_factory, fakes, capsys, damage, message):
    root = fakes.make_bundle(tmp_path_factory.mktemp("damaged"))
    damage(root)
    before = names(enrolled)
    assert run("generate", root, enrolled / "car.subject", "A car.", "--out", enrolled / "a.png") == 2
    assert message in one_line(capsys)
    assert names(enrolled) == before


def test_a_subject_of_another_base(enrolled, tmp_path_factory, fakes, capsys, backend):
    root = fakes.make_bundle(tmp_path_factory.mktemp("other"), base="other")
    backend.runs.clear()
    assert run("generate", root, enrolled / "car.subject", "A car.", "--out", enrolled / "a.png") == 2
    message = one_line(capsys)
    assert "base 'fake'" in message
    assert "base 'other'" in message
    assert not (enrolled / "a.png").exists()
    assert backend.runs == []


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, None])
def test_an_invalid_subject_file(files, fake_bundle, capsys, content):
    path = files / "car.subject"
    if content is not None:
        path.write_bytes(content)
    assert run("generate", fake_bundle, path, "A car.", "--out", files / "a.png") == 2
    assert "subject file" in one_line(capsys)
    assert not (files / "a.png").exists()


def test_a_prompt_that_is_cut_is_a_warning(enrolled, fake_bundle, capsys):
    prompt = "A car." + " " * 60 + "z" * 40
    command = ["generate", fake_bundle, enrolled / "car.subject", prompt, "--steps", 1, "--out", enrolled / "a.png"]
    assert run(*command, "--quiet") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("moma-rt: warning: the text is ")
    assert "cut: 'zz" in err
    assert err.count("\n") == 1


def test_a_full_disk_is_one_line_and_leaves_nothing(enrolled, fake_bundle, capsys, monkeypatch):
    written = []

    def fail_at_the_second(self, path, format):
        path.write_bytes(b"half")
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail_at_the_second)
    command = ["generate", fake_bundle, enrolled / "car.subject", "A car.", "--steps", 1, "--out", enrolled / "a.png"]
    assert run(*command, "--quiet", "--num-images", 3) == 2
    assert "a-1.png: No space left on device" in one_line(capsys)
    assert names(enrolled) == ["car.subject", "mask.png", "photo.png"]


def test_a_character_that_stdout_cannot_show_is_escaped(enrolled, fake_bundle, monkeypatch):
    out, stdout = enrolled / "a\udcff名.png", io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run("generate", fake_bundle, enrolled / "car.subject", "A car.", "--steps", 1, "--out", out) == 0
    assert stdout.buffer.getvalue().endswith(b"a\\udcff\\u540d.png\n")
    assert out.is_file()


def test_progress_that_cannot_be_printed_does_not_stop_the_work(enrolled, fake_bundle, monkeypatch):
    out = enrolled / "a.png"
    for stderr in (open("/dev/full", "w", buffering=1), None):  # noqa: SIM115
        monkeypatch.setattr(sys, "stderr", stderr)
        assert run("generate", fake_bundle, enrolled / "car.subject", "A car.", "--steps", 10, "--out", out) == 0
        out.unlink()


def test_ctrl_c_ends_with_130_and_leaves_nothing(enrolled, fake_bundle, capsys, monkeypatch):
    def interrupt(info):
        raise KeyboardInterrupt

    monkeypatch.setattr("moma_rt.cli._progress", interrupt)
    assert run("generate", fake_bundle, enrolled / "car.subject", "A car.", "--out", enrolled / "a.png") == 130
    assert capsys.readouterr().err == "moma-rt: interrupted\n"
    assert not (enrolled / "a.png").exists()


def test_a_terminal_sees_one_line_rewritten(enrolled, fake_bundle, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    command = ["generate", fake_bundle, enrolled / "car.subject", "A car.", "--steps", 3, "--out", enrolled / "a.png"]
    assert run(*command) == 0
    progress = capsys.readouterr().err.splitlines(keepends=False)
    assert [line.strip() for line in progress if line.startswith("step")] == [
        "step 1/3 (t = 667)",
        "step 2/3 (t = 334)",
        "step 3/3 (t = 1)",
    ]


@pytest.mark.parametrize("arguments", [[], ["paint"], ["generate", "b"], ["enroll", "a", "b", "c", "--out", "d"]])
def test_argument_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert "usage: moma-rt" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["enroll"], ["generate"], ["inspect"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*command, "--help")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "moma-rt" in out
    if command != ["inspect"]:
        assert "example" in out


def test_python_dash_m_is_the_command_and_starts_without_the_heavy_imports(repository):
    code = "import sys, moma_rt.cli; print(sorted({'numpy', 'PIL', 'onnxruntime', 'torch'} & sys.modules.keys()))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=repository) == "[]\n"
    command = [sys.executable, "-m", "moma_rt", "inspect", "none"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=repository)
    assert ran.returncode == 2
    assert ran.stderr == "moma-rt: error: none does not exist: give a bundle's folder or a subject file\n"
