"""Write what `imm-merge`, `imm-verify` and `imm-loop --help` print into docs/cli.md.

python docs/scripts/help.py [--check]
"""

from __future__ import annotations

import os
import subprocess
import sys

from pages import update


def help_of(command: str) -> str:
    """Run a command's --help as in a terminal as wide as the page."""
    shown = subprocess.run(
        [sys.executable, "-m", "mergekit_imm", command, "--help"],
        env={**os.environ, "COLUMNS": "84"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return f"```text\n{shown.stdout.rstrip()}\n```"


if __name__ == "__main__":
    update("cli.md", {f"imm-{name} --help": help_of(name) for name in ("merge", "verify", "loop")}, __doc__)
