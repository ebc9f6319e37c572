"""Run every command and code block of the pages, and compare what they print with what the pages show.

    python docs/scripts/run_examples.py [--write] [PAGE.md ...]

Each page is run in a folder of its own that begins with the models `base` and `sft` of the tutorial. Blocks of these
kinds are run, in their order; all others (text, sh, json) are not. Several pages run at the same time:

    ```python title="NAME"   is written to a file
    ```python                is executed
    ```pycon                 is executed, and its outputs compared
    ```console               its lines `$ ...` are run by bash, and their outputs compared
    <!-- run: ... -->        is run by bash before what follows it
    <!-- file NAME of PAGE.md -->   writes the file of that title on another page

Durations, speeds, free space and memory may differ. A line of three dots stands for any number of lines. With --write
the pages take the outputs of this run.
"""

from __future__ import annotations

import argparse
import contextlib
import doctest
import io
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mergekit_imm.numerics.native import COMPILING

DOCS = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r'^```(?P<kind>python|pycon|console)(?: title="(?P<title>[^"]+)")?\n(?P<body>.*?)^```$'
    r"|^<!-- run: (?P<run>.*?) -->$"
    r"|^<!-- file (?P<file>\S+) of (?P<page>\S+) -->$",
    re.MULTILINE | re.DOTALL,
)
VARYING = re.compile(
    r"in [\d.]+ s(?: \([\d.]+ GB/s read and written\))?$|free [\d.]+ GB|at most about [\d.]+ MB, with \d+ workers"
    r'|"(?:disk_free|memory|workers|plan|total|stream)": [\d.]+',
    re.MULTILINE,
)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "LC_ALL": "C",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}


def shell(command: str) -> str:
    """Run a command; return what it printed, standard error included, but not what only a first run says."""
    ran = subprocess.run(
        ["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return ran.stdout.replace(f"{COMPILING}\n", "")


def agree(expected: str, got: str) -> bool:
    """Compare outputs, but for what differs from run to run."""
    expected, got = (VARYING.sub("*", text.rstrip()) for text in (expected, got))
    pattern = ".*".join(map(re.escape, re.split(r"(?:(?<=\n)|^)\.\.\.(?=\n|$)", expected)))
    return re.fullmatch(pattern, got, re.DOTALL) is not None


def file_of(page: Path, name: str) -> str:
    """Return the file of this title on a page."""
    blocks = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return next(block["body"] for block in blocks if block["title"] == name)


def run_console(body: str) -> list[tuple[str, str, str]]:
    """Run the commands of a block; return (command lines, output expected, output) of each."""
    steps = []
    for part in re.split(r"^(?=\$ )", body, flags=re.MULTILINE)[1:]:
        lines = part.splitlines(keepends=True)
        count = 1
        while lines[count - 1].endswith("\\\n"):
            count += 1
        steps.append(("".join(lines[:count]), "".join(lines[count:]), shell("".join(lines[:count])[2:])))
    return steps


def run_session(body: str, names: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Run the statements of an interactive session; return (statement, output expected, output) of each."""
    steps = []
    for example in doctest.DocTestParser().get_examples(body):
        first, *more = example.source.splitlines()
        shown = "".join(f"{line}\n" for line in (f">>> {first}", *(f"... {line}".rstrip() for line in more)))
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            try:
                exec(compile(example.source, "<page>", "single"), names)
            except Exception as error:
                print(f"{type(error).__name__}: {error}")
        steps.append((shown, example.want, output.getvalue()))
    return steps


def run_page(path: Path, folder: Path, write: bool) -> int:
    """Run the blocks of one page in a folder; return how many outputs differ."""
    names: dict[str, Any] = {"__name__": "__main__"}
    text = path.read_text(encoding="utf-8")
    wrong, pieces, at = 0, [], 0
    os.chdir(folder)
    for block in BLOCK.finditer(text):
        body = block["body"]
        if block["run"]:
            print(shell(block["run"]), end="")
        elif block["file"]:
            Path(block["file"]).write_text(file_of(path.with_name(block["page"]), block["file"]), encoding="utf-8")
        elif block["title"]:
            Path(block["title"]).write_text(body, encoding="utf-8")
        elif block["kind"] == "python":
            exec(compile(body, f"<{path.name}>", "exec"), names)
        else:
            steps = run_console(body) if block["kind"] == "console" else run_session(body, names)
            new = ""
            for asked, expected, got in steps:
                if agree(expected, got):
                    new += asked + expected
                else:
                    wrong += 1
                    print(f"--- {path.name}\n{asked}expected:\n{expected}got:\n{got}")
                    new += asked + got
            pieces += [text[at : block.start("body")], new.rstrip("\n") + "\n"]
            at = block.end("body")
    if write:
        path.write_text("".join([*pieces, text[at:]]), encoding="utf-8")
    return wrong


def main() -> None:
    """Run the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="PAGE.md")
    parser.add_argument("--write", action="store_true", help="put the outputs of this run into the pages")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    pages = [DOCS / page for page in arguments.pages] or sorted(DOCS.glob("*.md"))
    with tempfile.TemporaryDirectory() as temporary:
        first = Path(temporary) / "first"
        first.mkdir()
        os.chdir(first)
        Path("tiny.py").write_text(file_of(DOCS / "tutorial.md", "tiny.py"), encoding="utf-8")
        print(shell("python tiny.py && python tiny.py base sft"), end="")
        tasks = [(page, Path(temporary) / page.stem, arguments.write) for page in pages]
        for _, folder, _ in tasks:
            shutil.copytree(first, folder)
        # A process for each page, so that none finds what another has imported; the longest are at the end.
        with multiprocessing.get_context("fork").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
            wrong = sum(pool.starmap(run_page, reversed(tasks), chunksize=1))
        os.chdir(DOCS)
    if wrong:
        sys.exit(f"{wrong} outputs differ from those on the pages")


if __name__ == "__main__":
    main()
