"""Tensors of a stream that may be tied: which waits for which, and digests, to compare tensors that are gone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Tensor
from ..model.config import stated_tie
from ..model.tensor_names import folder_of, is_embedding_or_head, layer_key
from ..numerics.dtypes import MERGED
from ..plan.plan import Item
from ..plan.tied_embeddings import Group, SameBytes
from ..ranks.ranks import Ranks
from .given import Given, digest


class StreamTies:
    """The tensors that came so far and may be tied, by their names in the base."""

    def __init__(self, models: Mapping[str, Checkpoint]) -> None:
        self._base = base = models["base"]
        self._stored = {name for each in models.values() for name in each.tensors}  # and so in the result
        ends = [tensor.shape for name, tensor in base.tensors.items() if is_embedding_or_head(name)]
        self._shapes = {*ends, *(shape[:1] for shape in ends)}  # of embeddings, heads, and the biases of heads
        self._digests: dict[str, bytes] = {}
        self.came: dict[str, Given] = {}
        self.pending: set[str] = set()

    @property
    def waiting(self) -> set[str]:
        """The names, in the stream, of those that wait for others."""
        return {self.came[name].given for name in self.pending}

    def concerns(self, name: str, side: Given, groups: Mapping[str, Group]) -> bool:
        """Whether a tensor may be tied to another that comes."""
        if layer_key(name) is not None or not 1 <= len(side.shape) <= 2 or side.dtype not in MERGED:
            return False
        denied = stated_tie(self._base.config_of(folder_of(name))) is False
        return name in groups or (not denied and side.shape in self._shapes)

    def add(self, name: str, side: Given, tensor: torch.Tensor, *, waits: bool) -> None:
        """Remember a tensor that came."""
        found = digest(tensor)
        if isinstance(tensor, DTensor) and dist.is_initialized():
            found = b"".join(Ranks.of_group().gather(found))  # equal on one rank is not equal
        self._digests[side.given] = found
        self.came[name] = side
        if waits:
            self.pending.add(name)

    def settle(self, groups: Mapping[str, Group]) -> None:
        """No longer wait for tensors that base or start stores, where all of them have come."""
        for name in [*self.pending]:
            names = groups[name].siblings if name in groups else (name,)
            if all(each in self.came for each in names if each in self._stored):
                self.pending.discard(name)

    def same(self, compare: SameBytes) -> SameBytes:
        """Return a function that compares tensors of an input; of the stream, what has not come may be equal."""

        def equal(checkpoint: Checkpoint, one: Tensor, other: Tensor) -> bool:
            if checkpoint.role != "sft":
                return compare(checkpoint, one, other)
            digests = [self._digests.get(each.given) for each in (one, other) if isinstance(each, Given)]
            if not digests:
                return compare(self._base, one, other)
            return len(digests) == 1 or (digests[0] is not None and digests[0] == digests[1])

        return equal


def comes_first(name: str, item: Item, group: Group) -> bool:
    """Whether a tied tensor is merged the same, under this name alone, whatever comes under its other names."""
    is_whole = {*group.names} == {*group.siblings}
    return is_whole and group.siblings[0] == name and [out.name for out in item.outs] == [name]
