"""Run every stage of moma-rt on the tiny model, each as a command: build a bundle, enroll a photo, generate a picture.

The tiny model has random weights: the picture shows that the pipeline runs, not what MoMA can do.
"""

import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
OUT = Path("build/demo")
BUNDLE = OUT / "bundle"
SUBJECT = OUT / "cup.subject"
PICTURE = OUT / "picture.png"
CONTACT_SHEET = OUT / "contact_sheet.png"
PROMPT = "A coffee cup on a beach at sunset."

MOMA_RT = Path(sysconfig.get_path("scripts")) / "moma-rt"
STAGES: tuple[tuple[str, list[str | Path]], ...] = (
    ("build the tiny bundle", [sys.executable, "-m", "export.build", "--base", "tiny", "--out", BUNDLE]),
    (
        "enroll the subject",
        [MOMA_RT, "enroll", BUNDLE, "assets/coffee.jpg", "assets/coffee_mask.png"]
        + ["--name", "coffee cup", "--out", SUBJECT],
    ),
    (
        "generate a picture",
        [MOMA_RT, "generate", BUNDLE, SUBJECT, PROMPT, "--steps", "20", "--seed", "0"]
        + ["--out", PICTURE, "--contact-sheet", CONTACT_SHEET],
    ),
)


def main() -> int:
    """Run the stages in order, stop at the first that fails, and print the paths of the pictures."""
    seconds: dict[str, float] = {}
    for title, stage in STAGES:
        command = [str(part) for part in stage]
        shown = [Path(command[0]).name, *command[1:]]
        print(f"\n$ {shlex.join(shown)}", flush=True)
        start = time.perf_counter()
        code = subprocess.run(command, cwd=REPOSITORY, check=False).returncode
        if code != 0:
            print(f"The demo stopped: could not {title}.", file=sys.stderr)
            return code
        seconds[title] = time.perf_counter() - start
    print("\nSeconds per stage, including the start of each program:")
    for title, value in seconds.items():
        print(f"  {title:<22} {value:6.1f}")
    print(f"Picture:        {PICTURE}\nContact sheet:  {CONTACT_SHEET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
