"""Entry points: `imm-merge` and its siblings, and `python -m mergekit_imm merge|verify|loop|analyze`."""

import sys


def _begin(name: str) -> None:
    # If the parent closed a standard stream, the next file opened would take its place and be printed into.
    if sys.stdin is None or sys.stdout is None or sys.stderr is None:
        _open_standard_streams()
    try:
        from .cli import main

        getattr(main, name)()
    except KeyboardInterrupt:  # during imports; afterwards the commands handle it
        sys.stderr.write("error: interrupted; nothing was started\n")
        sys.exit(130)


def _open_standard_streams() -> None:
    import os

    while os.open(os.devnull, os.O_RDWR) < 2:
        pass
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115 - open until exit


def imm_merge() -> None:
    """Run `imm-merge`."""
    _begin("imm_merge")


def imm_verify() -> None:
    """Run `imm-verify`."""
    _begin("imm_verify")


def imm_loop() -> None:
    """Run `imm-loop`."""
    _begin("imm_loop")


def imm_analyze() -> None:
    """Run `imm-analyze`."""
    _begin("imm_analyze")


if __name__ == "__main__":
    _begin("main")
