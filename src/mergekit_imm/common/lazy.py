"""Public names of a package, imported when they are first used: importing the package itself loads nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module

from ..errors import extra_error


def lazy(
    package: str, names: Mapping[str, str], extras: Mapping[str, str] | None = None
) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package.

    Args:
        package: `__name__` of the package.
        names: a module, written as in a relative import -> the names to take from it, separated by spaces.
        extras: the same for names that need an optional dependency; `__all__` leaves them out, so that
            `from package import *` works without it.

    Type checkers do not see these names: repeat them as imports under `if TYPE_CHECKING`. A name must not be that of a
    module of the package, which would replace it once it is imported.

    >>> __getattr__, __dir__, __all__ = lazy("mergekit_imm.functional", {".merge": "dare dare_merge"})
    >>> __all__
    ['dare', 'dare_merge']
    >>> __getattr__("dare").__module__
    'mergekit_imm.functional.merge'
    """
    home = {name: module for module, listed in names.items() for name in listed.split()}
    public = sorted(home)
    home |= {name: module for module, listed in (extras or {}).items() for name in listed.split()}

    def get(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(import_module(home[name], package), name)
        except ModuleNotFoundError as error:
            if error.name != "torch":  # which merging folders does not need
                raise
            raise extra_error(name, "torch") from error

    return get, lambda: sorted(home), public
