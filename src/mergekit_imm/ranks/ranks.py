"""One merge by many processes: who they are, and how they come to one end."""

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
    """The place of this process among those that run one merge together; all must make the same call.

    `gather` takes a value and returns those of all ranks in their order, once each has given its own.
    """

    rank: int
    size: int
    gather: Callable[[Any], list[Any]]

    @classmethod
    def of_group(cls, group: ProcessGroup | None = None) -> Ranks:
        """Return the ranks of a process group of torch.distributed; of the default one for None.

        `gather` raises RankError when another rank has ended, or is not there before the group's timeout: that must
        be longer than the slowest rank may take.
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
                    " say why; start the same job again, and it goes on with what was written"
                ) from error
            return values

        return cls(rank, size, gather)


def reason_of(error: Exception) -> str:
    """Return the first sentence of an error of torch.distributed, without the place in its source.

    >>> reason_of(RuntimeError("[/a/pair.cc:53] Connection closed by peer [127.0.0.1]:27. This is typically ..."))
    'Connection closed by peer [127.0.0.1]:27'
    """
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return shown(re.split(r"[.] [A-Z]", re.sub(r"^.*[.](cc|cpp|hpp):[0-9]+\] ", "", line))[0])


ALONE = Ranks(0, 1, lambda value: [value])


def together(ranks: Ranks, step: Callable[[], T]) -> T:
    """Run a step on each rank and return what it returns on this one, once all have done theirs.

    Where it fails on some, all fail with the first of these: by the same MergeError, or, if it was no such, by a
    RankError that says what it was.
    """
    failure: Exception | None = None
    try:
        result = step()
    except RankError:
        raise  # there is nobody to tell
    except Exception as error:
        failure = error
    told = failure
    if failure is not None and not isinstance(failure, MergeError):
        told = RankError(f"{type(failure).__name__}: {shown(failure, 300)}")
    for rank, each in enumerate(ranks.gather(told)):
        if each is not None:
            if failure is not None and rank == ranks.rank:
                raise failure
            raise type(each)(f"rank {rank} of {ranks.size}: {each}" if rank else str(each))
    return result


def check_same(ranks: Ranks, recipes: Sequence[Mapping[str, Any]]) -> None:
    """Raise MismatchError, on every rank, if one sees other inputs than rank 0, or is of another version."""
    recipes = [without_places(each) for each in recipes]  # all go on with the paths that rank 0 was given
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
