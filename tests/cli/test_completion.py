"""What a shell completes: asked by its protocol, and typed into bash, zsh and fish."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from commands import HUNG

PROGRAMS = ("merge", "verify", "loop", "analyze")
FILES, FOLDERS = [("file", "")], [("dir", "")]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the four programs."""
    folder = tmp_path_factory.mktemp("bin")
    for name in PROGRAMS:
        program = folder / f"imm-{name}"
        program.write_text(f"#!{sys.executable}\nfrom mergekit_imm.__main__ import imm_{name}\nimm_{name}()\n")
        program.chmod(0o755)
    return folder


def asked(programs: Path, line: str, shell: str = "bash") -> list[tuple[str, str]]:
    """The type and the value of each completion of the last word of a line."""
    words = line.split(" ")
    name = words[0].replace("-", "_").upper()
    variables = {"COMP_WORDS": line, f"_{name}_COMPLETE": f"{shell}_complete"}
    variables["COMP_CWORD"] = words[-1] if shell == "fish" else str(len(words) - 1)
    ran = subprocess.run(
        [programs / words[0]], env={**os.environ, **variables}, capture_output=True, text=True, timeout=HUNG, check=True
    )
    assert ran.stderr == ""
    if shell == "zsh":
        lines = ran.stdout.splitlines()
        return list(zip(lines[::3], lines[1::3], strict=False))
    pairs = [line.partition("\t")[0].partition(",") for line in ran.stdout.splitlines() if line]
    return [(kind, value) for kind, _, value in pairs]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("imm-merge ", FILES),
        ("imm-merge base ", FILES),
        ("imm-merge base sft --start ", FILES),
        ("imm-merge base sft --importance ", FILES),
        ("imm-merge base sft --layer-factors ", FILES),
        ("imm-merge base sft -o ", FOLDERS),
        ("imm-merge base sft --out ", FOLDERS),
        ("imm-merge base sft --alpha ", []),
        ("imm-merge base sft --rename ", []),
        ("imm-merge base sft --leave-out ", []),
        ("imm-merge base sft --clip 0.5 ", []),
        ("imm-merge base sft --reference ", [("plain", "start"), ("plain", "base")]),
        ("imm-merge base sft --device ", [("plain", "cpu"), ("plain", "cuda")]),
        ("imm-merge base sft --sparsify d", [("plain", "dare"), ("plain", "della")]),
        ("imm-merge base sft --over", [("plain", "--overwrite")]),
        ("imm-verify ", FILES),
        ("imm-verify out --base ", FILES),
        ("imm-verify out --method l", [("plain", "lora"), ("plain", "linear")]),
        ("imm-loop ", FILES),
        ("imm-loop base -o ", FOLDERS),
        ("imm-loop base --train ", []),
        ("imm-loop base --anchor p", [("plain", "previous")]),
        ("imm-analyze ", [("plain", x) for x in ("importance", "change", "kl", "samples", "pareto")]),
        ("imm-analyze importance ", FILES),
        ("imm-analyze importance base --data ", FILES),
        ("imm-analyze importance base -o ", FILES),
        ("imm-analyze change base ", FILES),
        ("imm-analyze kl base sft --add-to ", FILES),
        ("imm-analyze samples ", FILES),
        ("imm-analyze pareto run --in ", []),
        ("imm-analyze pareto run -o ", FOLDERS),
    ],
)
def test_values_are_completed_by_what_they_are(programs: Path, line: str, expected: list[tuple[str, str]]) -> None:
    assert asked(programs, line) == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_told_the_same(programs: Path, shell: str) -> None:
    assert asked(programs, "imm-merge base sft -o ", shell)[0][0] == "dir"
    assert asked(programs, "imm-merge base sft --alpha ", shell) == []
    assert asked(programs, "imm-analyze k", shell) == [("plain", "kl")]
    assert asked(programs, "imm-merge --dtype=bf", shell) == [("plain", "--dtype=bfloat16")]


START = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}
PREPARE = {"zsh": "autoload -Uz compinit; compinit -u -D; "}


def of_the_page(shell: str) -> str:
    """The line for a shell on the page of commands."""
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    found = re.search(rf"^\| {shell}\b[^|]*\| `(.*?)` \|", page, re.MULTILINE)
    assert found
    return found[1].replace("\\|", "|")


class Terminal:
    """A shell on a terminal."""

    def __init__(self, shell: str, folder: Path, path: str) -> None:
        self.master, slave = pty.openpty()
        environment = {
            **os.environ,
            "PATH": path,
            "TERM": "xterm",
            "HOME": str(folder),
            "HISTFILE": "",
            "XDG_RUNTIME_DIR": str(folder),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", TERMINAL, *START[shell]],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, pattern: str) -> re.Match[str]:
        """Read until it has printed this."""
        seen = ""
        while True:
            ready, _, _ = select.select([self.master], [], [], 120)
            assert ready, seen
            seen += os.read(self.master, 1 << 16).decode(errors="replace")
            found = re.search(pattern, seen)
            if found:
                return found


# The terminal becomes the one that controls the shell: 200 columns wide.
TERMINAL = """
import fcntl, os, struct, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("shell", START)
def test_the_line_of_the_page_completes_what_is_typed(shell: str, programs: Path, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    for name in ("basement", "sft", "other model"):
        (tmp_path / name).mkdir()
    (tmp_path / "model.safetensors").touch()
    terminal = Terminal(shell, tmp_path, f"{programs}:{os.environ['PATH']}")
    try:
        terminal.type(f"{PREPARE.get(shell, '')}{of_the_page(shell)}; echo rea''dy\r")
        terminal.until("ready\r?\n")
        for number, (typed, whole) in enumerate(
            {
                "imm-merge mod": "imm-merge model.safetensors",
                "imm-merge base": "imm-merge basement",
                "imm-merge oth": "imm-merge other model",
                "imm-merge basement --start sf": "imm-merge basement --start sft",
                "imm-merge basement sft -o mod": "imm-merge basement sft -o mod",  # a file is no folder
                "imm-merge --alpha sf": "imm-merge --alpha sf",
                "imm-merge --dtype bf": "imm-merge --dtype bfloat16",
                "imm-merge --dtype=bf": "imm-merge --dtype=bfloat16",
                "imm-analyze kl --da": "imm-analyze kl --data",
                "imm-loop sf": "imm-loop sft",
                "imm-verify sf": "imm-verify sft",
            }.items()
        ):
            # Then at the start of the line `echo`, at its end a mark: the shell prints what it was completed to.
            terminal.type(f"{typed}\t\x01echo '<'\x05 '>'{number}\r")
            printed = terminal.until(rf"\n\x1b?[^\n]*?<(imm-[^<>\n]*?)/? +>{number}\r?\n")
            assert printed[1] == whole
    finally:
        terminal.process.kill()  # an interactive shell ignores SIGTERM
        terminal.process.wait(HUNG)
        os.close(terminal.master)
