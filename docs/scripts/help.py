"""Write what the commands' --help prints into docs/cli.md.

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
        [sys.executable, "-m", "mergekit_imm", *command.split(), "--help"],
        env={**os.environ, "COLUMNS": "84"},
        capture_output=True,
        text=True,
        check=True,
    )
    return f"```text\n{shown.stdout.rstrip()}\n```"


if __name__ == "__main__":
    analyses = ("importance", "change", "kl", "samples", "pareto")
    names = ("merge", "verify", "loop", *(f"analyze {each}" for each in analyses))
    update("cli.md", {f"imm-{name} --help": help_of(name) for name in names}, __doc__)
