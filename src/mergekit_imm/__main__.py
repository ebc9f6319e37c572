"""Where the commands begin: `imm-merge`, `imm-verify`, and `python -m mergekit_imm merge|verify`."""

import sys


def _begin(name: str) -> None:
    try:
        from . import cli
    except KeyboardInterrupt:  # while modules are loaded; from there on the commands see to it themselves
        sys.stderr.write("error: interrupted; nothing was begun\n")
        sys.exit(130)
    getattr(cli, name)()


def imm_merge() -> None:
    """Run `imm-merge`."""
    _begin("imm_merge")


def imm_verify() -> None:
    """Run `imm-verify`."""
    _begin("imm_verify")


if __name__ == "__main__":
    _begin("main")
