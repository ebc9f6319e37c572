"""One merge by many processes: their ranks, and how they succeed or fail together."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..common.messages import first_few, shown
from ..common.version import __version__
from ..errors import MergeError, MismatchError, RankError
from ..options.recipe import differences, to_json, without_places

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The rank of this process among those that run one merge together; all must make the same call.

    `gather` takes this rank's value and returns the values of all ranks, in order (an all-gather).
    """

    rank: int
    size: int
    gather: Callable[[Any], list[Any]]

    @classmethod
    def of_group(cls, group: ProcessGroup | None = None) -> Ranks:
        """Return this process's rank in a torch.distributed process group; None: the default group.

        `gather` raises RankError when another rank has ended or does not arrive within the group's timeout, which
        must be longer than the slowest rank takes.
        """
        import torch.distributed as dist

        rank, size = dist.get_rank(group), dist.get_world_size(group)

        def gather(value: Any) -> list[Any]:
            values: list[Any] = [None] * size
            try:
                dist.all_gather_object(values, value, group=group)
            except RuntimeError as error:
                raise RankError(
                    f"rank {rank} of {size} has lost the others ({reason_of(error)}): one of them has ended, and may"
                    " say why; start the same job again to resume"
                ) from error
            return values

        return cls(rank, size, gather)


def reason_of(error: Exception) -> str:
    """Return the first sentence of a torch.distributed error, without its source location.

    >>> reason_of(RuntimeError("[/a/pair.cc:53] Connection closed by peer [127.0.0.1]:27. This is typically ..."))
    'Connection closed by peer [127.0.0.1]:27'
    """
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return shown(re.split(r"[.] [A-Z]", re.sub(r"^.*[.](cc|cpp|hpp):[0-9]+\] ", "", line))[0])


ALONE = Ranks(0, 1, lambda value: [value])


def together(ranks: Ranks, step: Callable[[], T]) -> T:
    """Run a step on every rank, wait for all, and return this rank's result.

    If it fails on any, all ranks fail with the error of the first: its MergeError, or a RankError that describes any
    other exception.
    """
    failure: Exception | None = None
    try:
        result = step()
    except RankError:
        raise  # the others cannot be reached
    except Exception as error:
        failure = error
    shared = failure
    if failure is not None and not isinstance(failure, MergeError):
        shared = RankError(f"{type(failure).__name__}: {shown(failure, 300)}")
    for rank, each in enumerate(ranks.gather(shared)):
        if each is not None:
            if failure is not None and rank == ranks.rank:
                raise failure
            raise type(each)(f"rank {rank} of {ranks.size}: {each}" if rank else str(each))
    return result


def check_same(ranks: Ranks, recipes: Sequence[Mapping[str, Any]]) -> None:
    """Raise MismatchError on every rank if one has other inputs, options or another version than rank 0."""
    if ranks.size == 1:
        return
    recipes = [without_places(each) for each in recipes]  # paths may differ: all use those of rank 0
    own = hashlib.blake2b(b"\0".join([__version__.encode(), *map(to_json, recipes)]), digest_size=16).digest()
    first, *others = ranks.gather(own)
    other = next((rank for rank, each in enumerate(others, 1) if each != first), None)
    if other is None:
        return
    seen = ranks.gather((__version__, list(recipes)))
    (version, theirs), (its_version, its) = seen[0], seen[other]
    changes = [] if version == its_version else [f"mergekit_imm {version} -> {its_version}"]
    for one, another in zip(theirs, its, strict=False):
        changes += differences(one, another)
    raise MismatchError(
        f"rank {other} of {ranks.size} would make another merge than rank 0 ({first_few(changes)});"
        " give all ranks the same command, inputs and version"
    )
