"""Map the tensors of a live model: whole tensors by name, and the elements of each that this process holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from ..checkpoint.lazy_tensor import Computed, Pieces, Slice, runs
from ..checkpoint.lazy_tensor import Tensor as LazyTensor
from ..common.messages import shown
from ..errors import MismatchError
from ..numerics.reference import DTYPES

Indices = npt.NDArray[np.int64]

HEADER_DTYPES = {dtype: code for code, dtype in DTYPES.items()}

# Attributes of parameters with a master copy in the optimizer, which would overwrite the merge.
_MASTERS = {
    "ds_id": "DeepSpeed ZeRO-3",
    "ds_tensor": "DeepSpeed ZeRO-3",
    "_hp_mapping": "DeepSpeed",
    "main_param": "Megatron's mixed-precision optimizer",
}
_SAVE = "save the model, merge it with merge_checkpoints, and continue from the result"


@dataclass(frozen=True)
class Part:
    """A box of a tensor that this process holds, starting at index `place`."""

    tensor: Tensor
    place: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class InMemory(Computed):
    """A tensor that is in memory."""

    code: str

    @property
    def dtype(self) -> str:
        """The dtype of its elements."""
        return self.code

    @property
    def stored(self) -> int:
        """Zero: nothing of it is on disk."""
        return 0


@dataclass(frozen=True, eq=False)
class Live(InMemory):
    """A tensor of a live model: the whole shape, and the parts that this process holds."""

    parts: tuple[Part, ...]
    memory: Hashable  # equal for tensors in the same memory

    def transposed(self, role: str) -> Live:  # noqa: ARG002
        """Return it with the last two dimensions swapped: views of the same memory."""
        parts = (Part(p.tensor.transpose(1, 2), (p.place[0], p.place[2], p.place[1])) for p in self.parts)
        return replace(self, shape=(self.shape[0], self.shape[2], self.shape[1]), parts=tuple(parts))


@dataclass(frozen=True, eq=False)
class Held:
    """Elements of a whole tensor that follow each other in a tensor in memory, row-major: run after run."""

    tensor: Tensor
    inside: int  # index of the first in `tensor`
    firsts: Indices  # of each run, in the whole tensor; ascending
    counts: Indices

    @property
    def count(self) -> int:
        """The number of elements."""
        return int(self.counts.sum())


def live_tensors(model: nn.Module) -> dict[str, Live]:
    """Return the parameters and persistent buffers of a model by name; tensors in the same memory share one `Live`.

    Raises MismatchError for a model that cannot be merged in place: quantised, on the meta device, in DeepSpeed or
    FSDP1, wrapped by PEFT.
    """
    _check_modules(model)
    state = model.state_dict(keep_vars=True)  # FSDP2 reshards its parameters here
    _check_whole(model, state)
    return live(state)


def live(state: Mapping[str, object]) -> dict[str, Live]:
    """Return what this process holds of each tensor of a state. Raises MismatchError for one that cannot be merged."""
    found: dict[str, Live] = {}
    known: dict[Hashable, Live] = {}
    for name, tensor in state.items():
        check_tensor(name, tensor)
        assert isinstance(tensor, Tensor)
        parts = parts_of(name, tensor)
        memory = _memory(parts) or id(tensor)
        if memory not in known:
            known[memory] = Live(name, tuple(tensor.shape), HEADER_DTYPES[tensor.dtype], parts, memory)
        found[name] = known[memory]
    _check_apart(found)
    return found


def is_distributed(model: nn.Module) -> bool:
    """Whether a model's parameters are sharded or replicated over several processes as DTensors."""
    if not isinstance(model, nn.Module):
        return False
    tensors = itertools.chain(model.parameters(), model.buffers())
    # After a forward pass, FSDP2 modules may hold unsharded parameters.
    return any(isinstance(tensor, DTensor) for tensor in tensors) or any(map(_is_fully_sharded, model.modules()))


def _is_fully_sharded(module: nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def _check_modules(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise MismatchError(f"model is a {type(model).__name__}; give a torch nn.Module")
    for module in model.modules():
        kind = type(module)
        origins = {base.__module__.partition(".")[0] for base in kind.__mro__}
        if "peft" in origins:
            raise MismatchError(
                f"the model is wrapped by PEFT ({kind.__name__}): merge the adapter first, `merge_and_unload()`, or"
                " save it and give it to merge_checkpoints as the sft"
            )
        if "deepspeed" in origins:
            raise MismatchError(
                f"the model is DeepSpeed's ({kind.__name__}): its optimizer keeps master weights and would undo the"
                f" merge; {_SAVE}"
            )
        if any(base.__name__ == "FullyShardedDataParallel" for base in kind.__mro__):
            raise MismatchError(
                "the model is wrapped by FullyShardedDataParallel (FSDP1): its flat parameters cannot be merged in"
                f" place; use FSDP2's fully_shard, or {_SAVE}"
            )
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        for mark, owner in _MASTERS.items():
            if hasattr(tensor, mark):
                raise MismatchError(
                    f"parameter '{shown(name)}' has `{mark}`: {owner} keeps master weights and would undo the"
                    f" merge; {_SAVE}"
                )


def _check_whole(model: nn.Module, state: Mapping[str, object]) -> None:
    """Raise MismatchError if a module's hook makes state_dict return copies, or leave parameters out."""
    own = {id(tensor): name for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())}
    made = [name for name, tensor in state.items() if isinstance(tensor, Tensor) and id(tensor) not in own]
    held = {id(tensor) for tensor in state.values()}
    lacking = [name for name, parameter in model.named_parameters() if id(parameter) not in held]
    for names, what in ((made, "is made by a hook"), (lacking, "is left out of")):
        if names:
            raise MismatchError(
                f"'{shown(names[0])}' {what}{' of' if names is made else ''} the model's state_dict, so what is saved"
                f" is not what is in memory; {_SAVE}"
            )


def check_tensor(name: str, tensor: object) -> None:
    """Raise MismatchError for a tensor that cannot be merged in place: quantised, on meta, made in inference mode."""
    if not isinstance(tensor, Tensor):
        raise MismatchError(
            f"the model's state holds '{shown(name)}', a {type(tensor).__name__}, not a tensor; {_SAVE}"
        )
    check_kind(name, tensor, "the model")
    if tensor.is_inference():
        raise MismatchError(
            f"tensor '{shown(name)}' of the model was made in inference mode and cannot be written; load the model"
            " outside torch.inference_mode()"
        )


def check_kind(name: str, tensor: Tensor, owner: str) -> None:
    """Raise MismatchError for a tensor whose values cannot be merged: quantised, sparse, on the meta device."""
    inner = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    plain = (Tensor, nn.Parameter, nn.Buffer)
    what = ""
    if type(inner) not in plain or type(tensor) not in (*plain, DTensor):
        what = type(inner).__name__
    elif inner.layout != torch.strided or tensor.dtype not in HEADER_DTYPES:
        what = str(tensor.dtype if inner.layout == torch.strided else inner.layout)
    if what:
        raise MismatchError(
            f"tensor '{shown(name)}' of {owner} is {what}; quantised, float8, complex and sparse tensors are not"
            " merged: train an unquantised model, or merge checkpoints of one"
        )
    if inner.is_meta:
        raise MismatchError(
            f"tensor '{shown(name)}' of {owner} is on the meta device and has no values (offloaded?); load the whole"
            " model, or use merge_checkpoints on disk"
        )


def _memory(parts: Sequence[Part]) -> Hashable:
    """Return a key that is equal for tensors in the same memory; empty for empty tensors."""
    tensors = (part.tensor for part in parts)
    return tuple((t.device, t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors)


def _check_apart(tensors: Mapping[str, Live]) -> None:
    """Raise MismatchError for tensors that overlap in memory: the overlap would be merged twice."""
    extents = []
    for name, live in {id(live): (name, live) for name, live in tensors.items()}.values():
        for tensor in (part.tensor for part in live.parts):
            strides = zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in strides)
            if last + 1 < tensor.numel():
                raise MismatchError(
                    f"tensor '{shown(name)}' of the model repeats elements (it was expanded); make it contiguous"
                )
            begin = tensor.data_ptr()
            extents.append((str(tensor.device), begin, begin + (last + 1) * tensor.element_size(), id(live), name))
    extents.sort()
    for one, other in itertools.pairwise(extents):
        if one[0] == other[0] and other[1] < one[2] and one[3] != other[3]:
            raise MismatchError(
                f"tensors '{shown(one[4])}' and '{shown(other[4])}' of the model share part of their memory, which"
                " would be merged twice; clone one of them"
            )


def local_of(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def parts_of(name: str, tensor: Tensor, local: Tensor | None = None) -> tuple[Part, ...]:
    """Return the non-empty boxes of a tensor that this process holds; views of `local`, a copy of what it holds."""
    local = local_of(tensor) if local is None else local
    if not isinstance(tensor, DTensor):
        spans = [[(0, size)] for size in tensor.shape]
    else:
        spans = _spans(name, tensor)
        sizes = tuple(sum(count for _, count in each) for each in spans)
        if local.numel() == 0 and 0 in sizes:
            return ()
        if sizes != tuple(local.shape):
            raise _strange(name, tensor, f"holds {list(local.shape)} instead of {list(sizes)}")
    found = []
    for box in itertools.product(*(_with_places(each) for each in spans)):
        view = local
        for dim, (_, count, inside) in enumerate(box):
            view = view.narrow(dim, inside, count)
        found.append(Part(view, tuple(begin for begin, _, _ in box)))
    return tuple(part for part in found if part.tensor.numel())


def _with_places(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    ends = itertools.accumulate(count for _, count in spans)
    return [(begin, count, end - count) for (begin, count), end in zip(spans, ends, strict=True)]


Spans = list[tuple[int, int]]  # (begin, count) of indices along a dimension, in the order of the local tensor


def _spans(name: str, tensor: DTensor) -> list[Spans]:
    """Return the indices along each dimension that this process holds; placements apply from left to right."""
    spans: list[Spans] = [[(0, size)] for size in tensor.shape]
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:  # not in the mesh
        return [[(0, 0)] for _ in tensor.shape]
    order = getattr(tensor._spec, "shard_order", None) or ()
    if any(list(entry.mesh_dims) != sorted(entry.mesh_dims) for entry in order):
        raise _strange(name, tensor, "is sharded in an order other than its mesh's")
    for axis, placement in enumerate(tensor.placements):
        number, place = tensor.device_mesh.size(axis), coordinate[axis]
        if placement.is_replicate():
            continue
        if isinstance(placement, _StridedShard):
            dim, factor = placement.dim % tensor.ndim, int(placement.split_factor)
            if sum(count for _, count in spans[dim]) % (number * factor):
                raise _strange(name, tensor, f"does not divide into {number} x {factor} equal parts")
            groups = [_cut(spans[dim], factor, each) for each in range(factor)]
            spans[dim] = [span for group in groups for span in _cut(group, number, place)]
        elif isinstance(placement, Shard):
            dim = placement.dim % tensor.ndim
            spans[dim] = _cut(spans[dim], number, place)
        else:
            raise _strange(name, tensor, "is partial: ranks hold summands")
    return spans


def _cut(spans: Spans, number: int, place: int) -> Spans:
    """Return the chunk of indices at `place` when torch.chunk cuts them into `number`."""
    total = sum(count for _, count in spans)
    size = -(-total // number)
    low, high = min(place * size, total), min((place + 1) * size, total)
    found = []
    for begin, count, inside in _with_places(spans):
        first, last = max(low, inside), min(high, inside + count)
        if first < last:
            found.append((begin + first - inside, last - first))
    return found


def _strange(name: str, tensor: DTensor, what: str) -> MismatchError:
    return MismatchError(
        f"tensor '{shown(name)}' of the model has the placements {tensor.placements} and {what}; only Shard,"
        f" Replicate and the placements of fully_shard are merged: {_SAVE}"
    )


def held(tensor: LazyTensor, first: int, end: int) -> Iterator[Held]:
    """Yield which of elements first..end of a tensor (live, or made of live ones) this process holds, part by part."""
    if isinstance(tensor, Slice):
        for each in held(tensor.whole, tensor.first + first, tensor.first + end):
            yield replace(each, firsts=each.firsts - tensor.first)
    elif isinstance(tensor, Pieces):
        for piece in tensor.pieces:
            for at, begin, count in runs(tensor.shape, piece.place, piece.tensor.shape, first, end):
                for each in held(piece.tensor, begin, begin + count):
                    yield replace(each, firsts=each.firsts + (at - begin))
    else:
        assert isinstance(tensor, Live)
        for part in tensor.parts:
            numbers, firsts, counts = _in_box(tensor.shape, part.place, part.tensor.shape, first, end)
            if len(firsts):
                yield Held(part.tensor, int(numbers[0]), firsts, counts)


def _in_box(
    whole: tuple[int, ...], place: tuple[int, ...], sizes: tuple[int, ...], first: int, end: int
) -> tuple[Indices, Indices, Indices]:
    """Return which of elements first..end of a tensor lie in a box: runs of (index in the box, in the tensor, count).

    As `runs`, but as arrays: a matrix that is cut by columns has a run in every row.
    """
    if not whole:
        whole, place, sizes = (1,), (0,), (1,)
    split = len(whole) - 1  # the last dimension that the box does not span; those after it are contiguous
    while split > 0 and sizes[split] == whole[split]:
        split -= 1
    size, length, begin = (each[split] * math.prod(whole[split + 1 :]) for each in (sizes, whole, place))
    lines = np.arange(first // length, -(-end // length))
    numbers, rest, kept, step = np.zeros_like(lines), lines, np.full(lines.shape, fill_value=True), 1
    for dim in reversed(range(split)):
        rest, digits = np.divmod(rest, whole[dim])
        digits -= place[dim]
        kept &= (digits >= 0) & (digits < sizes[dim])
        numbers += digits * step
        step *= sizes[dim]
    begins = lines * length + begin
    low, high = np.maximum(begins, first), np.minimum(begins + size, end)
    kept &= low < high
    return (numbers * size + low - begins)[kept], low[kept], (high - low)[kept]


def boxes(tensor: Tensor, first: int, end: int) -> Iterator[tuple[int, Tensor]]:
    """Yield elements first..end of a tensor, row-major, as few views, each with the offset of its first."""
    if tensor.is_contiguous():
        yield 0, tensor.view(-1)[first:end]
        return
    inner = math.prod(tensor.shape[1:])
    at = first
    while at < end:
        row, skip = divmod(at, inner)
        if skip or end - at < inner:  # a part of a row
            stop = min(end, (row + 1) * inner)
            for offset, view in boxes(tensor[row], skip, skip + stop - at):
                yield at - first + offset, view
        else:
            stop = end // inner * inner
            yield at - first, tensor[row : stop // inner]
        at = stop
