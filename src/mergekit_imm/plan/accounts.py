"""Check a plan against the inputs' files before a byte is written: is every tensor accounted for?

The check is independent of the planner: it starts from the headers and follows the bytes that the plan reads. A
finding is a bug in this program, not a fault of the inputs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import zip_longest

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Tensor, leaves
from ..checkpoint.safetensors_file import TensorInfo
from ..common.json_files import parse_json
from ..common.messages import shown
from ..errors import PlanError
from ..model.config import CONFIG, stated_tie
from ..model.tensor_names import folder_of, is_output_head
from .decide import Decided
from .plan import Item, Plan
from .tied_embeddings import SameBytes, Ties


def check_tensors(decided: Decided, same_bytes: SameBytes) -> None:
    """Check that every tensor in the inputs' files is merged, kept, taken or copied. Raises PlanError."""
    for role, each in decided.used.items():
        _check_files(role, each)
    items = {out.name: item for item in decided.items for out in item.outs}
    items |= {name: items[group.written[0]] for name, group in decided.ties.groups.items() if group.written[0] in items}
    for role, each in decided.used.items():
        for name, tensor in each.tensors.items():
            item = items.get(name)
            if item is not None and item.action == "merge" and item.sides.get(role) is tensor:
                continue  # nearly always
            if item is None:
                raise _fault(f"tensor '{shown(name)}' of {each.label} would not be used")
            if item.action == ("take" if role == "base" else "keep") or (role == "start" and item.action == "take"):
                continue
            side = item.sides.get(role)
            if side is None:
                raise _fault(f"tensor '{shown(name)}' of {each.label} would not enter '{shown(item.name)}'")
            if side is tensor or _same_leaves(side, tensor, role):
                continue
            other = each.tensors.get(side.name, side)
            if name not in decided.ties.groups or not same_bytes(each, other, tensor):
                raise _fault(f"tensor '{shown(name)}' of {each.label} is not what is read for '{shown(item.name)}'")


def check_plan(plan: Plan, ties: Ties) -> None:
    """Check that every name the base stores is written exactly once, and that configs match. Raises PlanError."""
    base = plan.models["base"]
    written = {out.name: item for item in plan.items for out in item.outs}
    if len(written) < sum([len(item.outs) for item in plan.items]):
        names = Counter(out.name for item in plan.items for out in item.outs)
        raise _fault(f"tensor '{shown(max(names, key=names.__getitem__))}' would be written twice")
    for tensor in () if base.tensors.keys() <= written.keys() else _stored(base):
        if tensor.name in base.tensors and tensor.name not in written:
            raise _fault(f"tensor '{shown(tensor.name)}' of {base.label} would not be written")
    for folder, tied in ties.tied.items():
        _check_tie(plan, folder, tied, ties, written)


def check_adapter(plan: Plan) -> None:
    """Check that every tensor of an adapter's files is written once, in its shape. Raises PlanError."""
    stored = sorted((tensor.name, tensor.shape) for tensor in _stored(plan.models["sft"]))
    written = sorted((out.name, out.shape) for item in plan.items for out in item.outs)
    if stored != written:
        lost = next((name for name, _ in stored if name not in dict(written)), stored[0][0])
        raise _fault(f"tensor '{shown(lost)}' of {plan.models['sft'].label} would not be written once")


def _check_files(role: str, checkpoint: Checkpoint) -> None:
    """Check that a model's tensors are read from every byte its files hold."""
    if all(one is other for one, other in zip_longest(checkpoint.tensors.values(), _stored(checkpoint))):
        return  # each is read as it is stored
    others = [tensor for tensor in _stored(checkpoint) if checkpoint.tensors.get(tensor.name) is not tensor]
    ranges: dict[str, list[tuple[int, int]]] = {}
    for tensor in checkpoint.tensors.values():
        for owner, leaf in leaves(tensor, role):
            if owner == role:
                ranges.setdefault(leaf.file, []).append((leaf.begin, leaf.begin + leaf.nbytes))
    unread = {(tensor.file, tensor.begin) for tensor in checkpoint.unread}
    # A resized vocabulary may lose rows; of copies under one name, one is read.
    joined = {name: _joined(found) for name, found in ranges.items()}
    copies = {(tensor.name, tensor.shape) for tensor in _stored(checkpoint) if _covered(tensor, joined, whole=True)}
    for tensor in others:
        if not tensor.nbytes or (tensor.file, tensor.begin) in unread or (tensor.name, tensor.shape) in copies:
            continue
        if not _covered(tensor, joined, whole=checkpoint.rows is None):
            raise _fault(
                f"tensor '{shown(tensor.name)}' in {shown(tensor.file)} of {checkpoint.label} would not be read"
            )


def _stored(checkpoint: Checkpoint) -> Iterator[TensorInfo]:
    for file in checkpoint.files.values():
        yield from file.tensors


def _joined(ranges: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Return begins and ends of ranges in order, touching ones joined."""
    begins: list[int] = []
    ends: list[int] = []
    for begin, end in sorted(ranges):
        if ends and begin <= ends[-1]:
            ends[-1] = max(end, ends[-1])
        else:
            begins.append(begin)
            ends.append(end)
    return begins, ends


def _covered(tensor: TensorInfo, joined: Mapping[str, tuple[list[int], list[int]]], *, whole: bool) -> bool:
    begins, ends = joined.get(tensor.file, ([], []))
    at = bisect_right(begins, tensor.begin) - 1
    return at >= 0 and ends[at] >= (tensor.begin + tensor.nbytes if whole else tensor.begin + 1)


def _same_leaves(side: Tensor, tensor: Tensor, role: str) -> bool:
    read, wanted = ({(r, t.file, t.begin, t.nbytes) for r, t in leaves(one, role)} for one in (side, tensor))
    return bool(wanted) and wanted <= read


def _check_tie(plan: Plan, folder: str, tied: bool | None, ties: Ties, written: Mapping[str, Item]) -> None:
    """Check that the config of a folder agrees with the tied tensors written there."""
    path = f"{folder}{CONFIG}"
    if path in plan.configs:
        says = stated_tie(parse_json(plan.configs[path]))
    elif path in plan.side:
        says = stated_tie(plan.models[plan.side[path][0]].config_of(folder))
    else:
        return
    groups = [group for name, group in ties.groups.items() if folder_of(name) == folder]
    for group in groups:
        if not any(name in written for name in group.names):
            raise _fault(f"tensor '{shown(group.key)}' would not be written")
    if tied is None or not groups:
        return
    heads = [
        (name, group.siblings[0])  # and the tensor that the base ties it to
        for group in groups
        for name in group.names
        if is_output_head(name) and name != group.siblings[0]
    ]
    apart = any(written[head].name != written[other].name for head, other in heads if {head, other} <= {*written})
    if apart and says is not False:
        raise _fault(f"{shown(path)} would say tied, and the tensors are not: '{shown(heads[0][0])}'")
    if says is False and tied:
        raise _fault(f"{shown(path)} would say untied, and '{shown(groups[0].key)}' is one tensor")


def _fault(what: str) -> PlanError:
    return PlanError(
        f"this is a bug in mergekit_imm: {what}; nothing was written: please report this line with the output of"
        " `imm-merge --check`"
    )
