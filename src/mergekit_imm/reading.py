"""The tensors of a plan's inputs: read by range from their files, or computed from what is read; and compared."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .checkpoint.computed import Computed, Matrix, Read, decoded
from .checkpoint.source import Checkpoint
from .checkpoint.tensorfile import DTYPE_BITS, TensorInfo, check_unchanged, open_to_read, read_into
from .plan import Plan

COMPARED = 1 << 20  # elements at a time
AHEAD = 8  # pieces between what is read and what is announced: two for each worker
ANNOUNCED = 64 << 10  # bytes of a piece that is worth it

Raw = npt.NDArray[np.uint8]


class Files:
    """Read-only handles of the input files of a plan, opened when first needed."""

    def __init__(self, plan: Plan) -> None:
        self._inputs = plan.inputs
        self._open: dict[Path, int] = {}
        self._shared: dict[str, Matrix] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Files:  # noqa: D105
        return self

    def __exit__(self, *_: object) -> None:  # noqa: D105
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, role: str, tensor: TensorInfo | Computed, first: int, buffer: Raw) -> None:
        """Fill a buffer from byte `first` of a tensor."""
        if isinstance(tensor, Computed):
            self._compute(tensor, first, buffer)
        else:
            self._read(role, tensor, first, memoryview(buffer))  # type: ignore[arg-type]

    def _compute(self, tensor: Computed, first: int, buffer: Raw) -> None:
        with self._lock:
            shared = self._shared.get(tensor.name)
        if shared is None:
            shared = tensor.shared(self._reads)
            with self._lock:
                while len(self._shared) > 1:  # those of two tensors: workers are at the end of one and in the next
                    del self._shared[next(iter(self._shared))]
                self._shared[tensor.name] = shared
        tensor.fill(self._reads, shared, first // 4, buffer.view(np.float32))

    def _reads(self, role: str) -> Read:
        return functools.partial(self._read, role)

    def _read(self, role: str, tensor: TensorInfo, first: int, buffer: memoryview) -> None:
        path = self._inputs[role].path(tensor)
        with self._lock:
            if path not in self._open:
                self._open[path] = open_to_read(path)
            descriptor = self._open[path]
        _announce(descriptor, tensor.begin + first + AHEAD * len(buffer), len(buffer))
        read_into(descriptor, buffer, tensor.begin + first, path)


def _announce(descriptor: int, offset: int, count: int) -> None:
    """Tell the system what will be read soon, so that the disk works while the workers compute."""
    if count >= ANNOUNCED and hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # it is a hint
            os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_WILLNEED)


def check_inputs(plan: Plan) -> None:
    """Raise ChangedError if a file that a plan reads was written since it was opened."""
    for each in plan.inputs.values():
        for file in each.files.values():
            assert file.path is not None
            check_unchanged(file.path, (file.size, file.written))
        for path, before in each.stamps.items():
            check_unchanged(path, before)


def same_bytes(checkpoint: Checkpoint, one: TensorInfo, other: TensorInfo) -> bool:
    """Compare two tensors of a checkpoint on disk; stops at the first difference."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(np.array_equal(a, b) for a, b in _side_by_side((checkpoint, one), (checkpoint, other)))


def same_values(one: tuple[Checkpoint, TensorInfo], other: tuple[Checkpoint, TensorInfo]) -> bool:
    """Compare the values of two tensors of BF16, F16 or F32; stops at the first difference."""
    dtypes = one[1].dtype, other[1].dtype
    if one[1].shape != other[1].shape or not {*dtypes} <= {"BF16", "F16", "F32"}:
        return False
    return all(np.array_equal(decoded(a, dtypes[0]), decoded(b, dtypes[1])) for a, b in _side_by_side(one, other))


def _side_by_side(*sides: tuple[Checkpoint, TensorInfo]) -> Iterator[tuple[Raw, ...]]:
    """The bytes of the same elements of two tensors, piece by piece."""
    with ExitStack() as stack:
        files = []
        for checkpoint, tensor in sides:
            path = checkpoint.path(tensor)
            files.append((open_to_read(path), path))
            stack.callback(os.close, files[-1][0])
        for first in range(0, sides[0][1].count, COMPARED):
            raws = []
            for (descriptor, path), (_, tensor) in zip(files, sides, strict=True):
                begin, end = (min(at, tensor.count) * DTYPE_BITS[tensor.dtype] // 8 for at in (first, first + COMPARED))
                raws.append(np.empty(end - begin, np.uint8))
                read_into(descriptor, memoryview(raws[-1]), tensor.begin + begin, path)  # type: ignore[arg-type]
            yield tuple(raws)
