"""Run commands in forks of this process, which has already imported their modules: importing takes a second.

python forked.py        reads requests from standard input, one JSON object a line, and answers with an exit status
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any


def run(arguments: list[str], cwd: str, environment: dict[str, str], out: str, err: str) -> int:
    """Run `python -m mergekit_imm` with standard output and error in files."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY), number)
    sys.argv = ["mergekit_imm", *arguments]
    try:
        __main__._begin("main")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def flushed(request: dict[str, Any]) -> int:
    """Run a request and flush its output."""
    status = run(**request)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        status = 120  # as Python does
    return status


if __name__ == "__main__":
    os.environ["MERGEKIT_IMM_WIDE_VECTORS"] = "1"  # set by commands before they load the kernel
    from mergekit_imm import __main__
    from mergekit_imm.cli import main  # noqa: F401
    from mergekit_imm.cli import merge as merge_command  # noqa: F401
    from mergekit_imm.cli import verify as verify_command  # noqa: F401
    from mergekit_imm.engine import merge, verify  # noqa: F401
    from mergekit_imm.numerics import cpu  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(flushed(json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
