"""`moma-rt generate --context-embedding`, with fake networks."""

import os

import numpy as np
import pytest
from PIL import Image

from moma_rt import backends
from moma_rt.cli import entry

WIDTH = 16


@pytest.fixture
def generate(tmp_path, runtime, photo, mask, backend, fake_bundle, monkeypatch):
    """Call generate in a folder that has car.subject, with the given options."""
    monkeypatch.setattr(backends, "create", lambda name, threads=None: backend)
    monkeypatch.chdir(tmp_path)
    runtime.enroll(photo, mask, "car").save("car.subject")
    backend.runs.clear()
    command = ["generate", str(fake_bundle), "car.subject", "A car.", "--steps", "1", "--out", "a.png", "--quiet"]
    return lambda *options: entry([*command, *options])


@pytest.mark.parametrize("dtype", ["float16", "<f4", ">f4", "float64"])
def test_it_replaces_the_language_model(generate, runtime, backend, dtype):
    from moma_rt.subject import Subject

    embedding = np.linspace(-1, 1, WIDTH).astype(dtype)
    np.save("e.npy", embedding)
    assert generate("--context-embedding", "e.npy") == 0
    assert backend.inputs_of("language_model") == []
    picture = np.asarray(Image.open("a.png"))
    expected = runtime.generate(Subject.load("car.subject"), "A car.", steps=1, context_embedding=embedding)
    np.testing.assert_array_equal(picture, np.asarray(expected.images[0]))


def header(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


CONTENTS = {
    "text": b"0.5 0.5",
    "empty": b"",
    "cut": header("{'descr': '<f4', 'fortran_order': False, 'shape': (16,), }\n") + b"\0" * 60,
    "huge": header("{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000,), }\n"),
    "source": header("{'descr': " + "(" * 500 + "\n"),
}
ARRAYS = {
    "int": np.zeros(WIDTH, int),
    "complex": np.zeros(WIDTH, complex),
    "objects": np.array([0.5] * WIDTH, object),
    "fields": np.zeros(WIDTH, [("a", "f4")]),
}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, f"context embedding {name} is not a .npy file of floats") for name in (*CONTENTS, *ARRAYS, "zip")),
        ("missing", "context embedding missing cannot be read: No such file or directory"),
        ("x" * 300, "cannot be read: File name too long"),
        ("pipe", "context embedding pipe is not a file"),
        (".", "context embedding . is not a file"),
        ("square", f"context embedding square has shape [{WIDTH}, {WIDTH}]: it must have one dimension"),
        ("short", f"context_embedding has shape [3]: it must be [{WIDTH}]"),
        ("nan", "context_embedding contains NaN or infinity"),
        ("a.png", "a.png is given twice"),
    ],
)
def test_an_unusable_embedding_is_one_line(generate, backend, capsys, name, message):
    for file, content in CONTENTS.items():
        with open(file, "wb") as stream:
            stream.write(content)
    arrays = {"square": np.zeros((WIDTH, WIDTH)), "short": np.zeros(3), "nan": np.full(WIDTH, np.nan)}
    for file, array in (ARRAYS | arrays).items():
        with open(file, "wb") as stream:
            np.save(stream, array)
    with open("zip", "wb") as stream:
        np.savez(stream, a=np.zeros(WIDTH))
    os.mkfifo("pipe")
    before = sorted(os.listdir())
    assert generate("--context-embedding", name) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("moma-rt: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert backend.runs == []
    assert sorted(os.listdir()) == before
