"""Quantised models: dequantize FP8 weights, refuse the others with the cure."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Computed, Matrix, Read, Reads, Tensor, decoded
from ..checkpoint.safetensors_file import TensorInfo
from ..common.messages import shown
from ..common.notes import note
from ..errors import CheckpointError, MismatchError
from ..model.config import quantisation
from ..model.tensor_names import ready_option
from ..numerics.native import Loop
from .quantised_units import FP8, Copied, Unit, pattern_of, scales_of, units_of

_BLOCK = (128, 128)  # if the config does not say
_WIDEST = 1 << 20  # scales in a row of blocks, which are read at once

_MADE_FROM = "merge the unquantised checkpoint it was made from, and quantise the result"
_CURES = {
    "bitsandbytes": f"{_MADE_FROM}; for a QLoRA run, BASE is the unquantised model and SFT the adapter",
    "MXFP4": "load it with transformers' `Mxfp4Config(dequantize=True)`, then `save_pretrained`, and merge that",
    "FP8": "--dequantize multiplies its weights by their scales",
}
_ORPHAN = re.compile(r"(_scale_inv|\.weight_scale|\.scale_weight)$")
_OF_ACTIVATIONS = re.compile(r"(.+)([._])(input_scale|input_scale_ub|activation_scale|act_scale|scale_input)")
_OF_CACHE = re.compile(r"\.([qkv]|output)_scale$")
_MARKER = re.compile(r"(^|\.)scaled_fp8$")  # ComfyUI's mark for scaled weights, an empty tensor
_FORMAT = re.compile(r"(.+\.)comfy_quant")  # its successor: a text with the format of a module
_QUANTISER_FILES = ("hf_quant_config.json",)  # side files that describe the quantisation


_NOTHING = Copied(lambda _: False, lambda _: False)

dequantize = Loop("mergekit_imm.transforms.numba_loops", "dequantize")


def check_unquantised(checkpoint: Checkpoint, copied: Copied) -> None:
    """Raise CheckpointError for a quantised model unless all its quantised tensors are copied unchanged.

    The config decides; without it, names and dtypes of tensors.
    """
    said = stated_quantisation(checkpoint)
    units = units_of(checkpoint.tensors, said=said is not None)
    if said is not None and not units:
        raise CheckpointError(_refused(checkpoint, *said))
    _check_units(checkpoint, units, copied, said)


def stated_quantisation(checkpoint: Checkpoint) -> tuple[str, Mapping[str, Any]] | None:
    """Return a model's quantisation config and its place; None for an adapter, where it describes the base."""
    return quantisation(checkpoint.config) if checkpoint.adapter is None else None


def _refused(checkpoint: Checkpoint, place: str, settings: Mapping[str, Any]) -> str:
    method = _method(settings)
    what = f"a {shown(place)} of {shown(method)}" if method else f"a {shown(place)}"
    known = {"mxfp4": "MXFP4", "bitsandbytes": "bitsandbytes"}.get(method, "")
    cure = _CURES.get(known, _MADE_FROM)
    if method in ("fp8", "fbgemm_fp8") and not _has_fp8(checkpoint):
        cure = "but none of its tensors is FP8: if they were saved unquantised, remove that entry from config.json"
    elif _has_fp8(checkpoint) and not _unread(settings):
        cure = _CURES["FP8"]
    return f"{checkpoint.label} is quantised (config.json has {what}); {cure}"


def _method(settings: Mapping[str, Any]) -> str:
    if "quant_method" not in settings and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"
    return str(settings.get("quant_method", ""))


def _has_fp8(checkpoint: Checkpoint) -> bool:
    return any(tensor.dtype in FP8 for tensor in checkpoint.tensors.values())


def _check_units(
    checkpoint: Checkpoint, units: Sequence[Unit], copied: Copied, said: tuple[str, Mapping[str, Any]] | None
) -> None:
    """Raise CheckpointError unless each quantised weight is copied completely, from one side."""
    left = [unit for unit in units if not copied.copies(unit)]
    if not left:
        return
    tensors = checkpoint.tensors
    names, every = ([name for unit in some for name in unit.names] for some in (left, units))
    # For another model than the base, the pattern also names what the base has instead.
    kept = every if checkpoint.role == "base" else [*dict.fromkeys((*every, *(unit.weight for unit in units)))]
    pattern = pattern_of(kept, tensors.keys() - {*kept})
    keep = f"--keep {shlex.quote(pattern)}" if pattern.isprintable() else ready_option("--keep", *kept)
    if any(map(copied.is_copied, every)):
        name = next((name for name in names if not copied.is_copied(name)), names[0])
        raise CheckpointError(
            f"{checkpoint.label} is quantised, and {len(names)} of its {len(every)} quantised tensors belong to weights"
            f" that are copied in part only, first '{shown(name)}': keep all of them: {keep}"
        )
    if said is not None:
        message = _refused(checkpoint, *said)
    else:
        unit, cure = left[0], _CURES.get(left[0].method, _MADE_FROM)
        seen = f"'{shown(unit.evidence)}' {unit.reason}, as in {unit.method} models"
        message = f"{checkpoint.label} is quantised ({seen}); {cure}"
    # Do not offer it for most of a model: little would be merged.
    size = sum(tensors[name].stored for name in names)
    if copied is not _NOTHING and 3 * size < sum(tensor.stored for tensor in tensors.values()):
        message += f"; or keep the base's quantised tensors: {keep}"
    raise CheckpointError(message)


def dequantised(checkpoint: Checkpoint, copied: Copied) -> Checkpoint:
    """Return a checkpoint with FP8 weights multiplied by their scales; unchanged if it has none.

    The scales are removed, and so are those of activations, with a note. Raises CheckpointError for methods that are
    not supported and for weights or scales without a counterpart, MismatchError for scales that do not fit.
    """
    if not _has_fp8(checkpoint):
        check_unquantised(checkpoint, copied)
        return checkpoint
    _, settings = quantisation(checkpoint.config) or ("", {"quant_method": "fp8"})
    reason = _unread(settings)
    if reason:
        raise CheckpointError(
            f"{checkpoint.label} is quantised by {reason}, which --dequantize does not support; {_MADE_FROM}"
        )
    others = [unit for unit in units_of(checkpoint.tensors) if unit.method != "FP8"]
    # With a config they cannot be kept: it describes the FP8 weights too, and would be wrong for one or the other.
    _check_units(checkpoint, others, copied if quantisation(checkpoint.config) is None else _NOTHING, None)
    block = _block_of(settings, checkpoint.label)
    tensors = checkpoint.tensors
    fp8 = {name for name, tensor in tensors.items() if tensor.dtype in FP8 and not _MARKER.search(name)}
    weights: dict[str, Computed] = {}
    gone: set[str] = set()
    for name in tensors:
        if name not in fp8:
            continue
        scales = scales_of(name, tensors)
        if len(scales) == 1:
            weights[name] = _dequantised(tensors[name], tensors[scales[0]], block, checkpoint)
            gone.add(scales[0])
        elif not copied.is_copied(name):
            beside = f"{len(scales)} tensors of scales" if scales else "no scales"
            raise CheckpointError(
                f"tensor '{shown(name)}' is {tensors[name].dtype} in {checkpoint.label}, with {beside}"
                f" ({', '.join(map(shown, scales)) or f'{shown(name)}_scale'}), so its values are unknown;"
                f" use an unquantised checkpoint, or {ready_option('--keep', name)} or {ready_option('--take', name)}"
            )
    unused = tuple(name for name in tensors if name not in gone and _is_only_for_fp8(name, tensors[name], fp8))
    gone |= {*unused}
    orphan = next(
        (name for name in tensors if name not in gone and _ORPHAN.search(name) and not copied.is_copied(name)), None
    )
    if orphan is not None:
        raise CheckpointError(
            f"{checkpoint.label} stores '{shown(orphan)}', scales of a weight that is missing or not FP8; use a"
            " complete FP8 checkpoint, or an unquantised one"
        )
    left_out = [
        note(
            "scales left out",
            "left out {count} scales of activations or marks of {label}, which only FP8 needs, such as '{first}'",
            count=len(unused),
            label=checkpoint.label,
            first=shown(first),
        )
        for first in unused[:1]
    ]
    return replace(
        checkpoint,
        tensors={name: weights.get(name, tensor) for name, tensor in tensors.items() if name not in gone},
        side={path: file for path, file in checkpoint.side.items() if path not in _QUANTISER_FILES},
        left_out=(*checkpoint.left_out, *(path for path in checkpoint.side if path in _QUANTISER_FILES)),
        notes=(*checkpoint.notes, *left_out),
        unread=(*checkpoint.unread, *(tensor for name in unused if isinstance(tensor := tensors[name], TensorInfo))),
    )


def _unread(settings: Mapping[str, Any]) -> str:
    """Return why a quantisation is not plain FP8 weights with scales; "" if it is."""
    method, algorithm, form = (settings.get(key) for key in ("quant_method", "quant_algo", "format"))
    if method in ("fp8", "fbgemm_fp8"):
        return ""
    if method == "modelopt":
        return "" if str(algorithm).startswith("FP8") else f"modelopt's {shown(algorithm)}"
    if method == "compressed-tensors":
        sparsity = settings.get("sparsity_config") or {"format": "dense"}
        if not isinstance(sparsity, Mapping) or sparsity.get("format") != "dense":
            return "compressed-tensors with a sparsity_config"
        if settings.get("transform_config"):
            return "compressed-tensors with a transform_config"
        return "" if form in ("float-quantized", "naive-quantized") else f"compressed-tensors' {shown(form)}"
    return shown(_method(settings) or "a method that its config does not name")


def _block_of(settings: Mapping[str, Any], label: str) -> tuple[int, int] | None:
    """Return rows and columns of a block that shares a scale; None if scales are per row or per tensor."""
    found = settings.get("weight_block_size", _BLOCK if settings["quant_method"] == "fp8" else None)
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        found = found or (weights.get("block_structure") if isinstance(weights, Mapping) else None)
    if found is None:
        return None
    if isinstance(found, (list, tuple)) and len(found) == 2 and all(type(n) is int and n > 0 for n in found):
        return found[0], found[1]
    raise CheckpointError(
        f"{label}: its config.json gives {shown(found)} as block size of scales, not two positive numbers;"
        " download it again"
    )


def _is_only_for_fp8(name: str, tensor: Tensor, fp8: set[str]) -> bool:
    if _MARKER.search(name):
        return tensor.count <= 2
    if found := _FORMAT.fullmatch(name):
        return f"{found[1]}weight" in fp8
    found = _OF_ACTIVATIONS.fullmatch(name)
    if found is not None:
        return found[1] + (".weight" if found[2] == "." else "") in fp8
    return tensor.count == 1 and _OF_CACHE.search(name) is not None


def _dequantised(weight: Tensor, scale: Tensor, block: tuple[int, int] | None, checkpoint: Checkpoint) -> Dequantised:
    if scale.dtype not in ("F32", "BF16", "F16", "F8_E8M0"):
        raise CheckpointError(
            f"{checkpoint.label} stores the scales '{shown(scale.name)}' as {scale.dtype}; only F32, BF16, F16 and"
            " F8_E8M0 are supported: use an unquantised checkpoint"
        )
    fit = _fit(weight, scale, block)
    if fit is None:
        blocks = f"one for each {block[0]} x {block[1]}, " if block else ""
        raise MismatchError(
            f"tensor '{shown(weight.name)}' is {weight.dtype} {list(weight.shape)} in {checkpoint.label}, but its"
            f" scales '{shown(scale.name)}' are {list(scale.shape)}; they must be {blocks}one for each row, or one:"
            " download it again"
        )
    return Dequantised(weight.name, weight.shape, weight, scale, checkpoint.role, *fit)


Pair = tuple[int, int]


def _fit(weight: Tensor, scale: Tensor, block: Pair | None) -> tuple[Pair, Pair, Pair] | None:
    """Return rows and columns of a weight's matrices, of its grid of scales, and of a block; None if nothing fits."""
    rows, columns = (1, 1, *weight.shape)[-2:]
    if scale.count == 1:
        rows *= math.prod(weight.shape[:-2])
        return (rows, columns), (1, 1), (max(1, rows), max(1, columns))
    shape = (*scale.shape, *(1,) * (len(weight.shape) - len(scale.shape)))
    if len(shape) != len(weight.shape) or shape[:-2] != weight.shape[:-2]:
        return None
    down, across = (1, 1, *shape)[-2:]
    if across > _WIDEST:
        return None
    # Two fused matrices: each was quantised separately.
    if len(shape) == 3 and weight.name.endswith("gate_up_proj") and not rows % 2 and not down % 2:
        halves = _size(rows // 2, down // 2, block and block[0]), _size(columns, across, block and block[1])
        if all(halves):
            return (rows // 2, columns), (down // 2, across), halves
    sizes = _size(rows, down, block and block[0]), _size(columns, across, block and block[1])
    return ((rows, columns), (down, across), sizes) if all(sizes) else None


def _size(count: int, scales: int, block: int | None) -> int:
    """How many of `count` elements share one scale; 0 if the number of scales does not fit."""
    if scales == 1:
        return max(1, count)
    if scales == count:
        return 1
    return block if block and scales == -(-count // block) else 0


@dataclass(frozen=True)
class Dequantised(Computed):
    """An FP8 weight times its scales; the last two dimensions are matrices, divided into blocks.

    value[i, j] = float32(weight[i, j]) * float32(scale[i // block[0], j // block[1]])
    """

    weight: Tensor
    scale: Tensor
    role: str  # of the input that holds both
    matrix: Pair  # rows and columns
    grid: Pair  # rows and columns of a matrix's scales
    block: Pair  # rows and columns that share a scale

    @property
    def output_dtype(self) -> str:
        """The usual training dtype of such weights."""
        return "BF16"

    @property
    def stored(self) -> int:
        """Bytes of the weight and its scales."""
        return self.weight.stored + self.scale.stored

    def compute(self, reads: Reads, shared: Any, first: int, out: Matrix) -> None:  # noqa: ARG002
        """Compute the elements from `first` on."""
        read = reads(self.role)
        codes = np.empty(len(out), np.uint8)
        read(self.weight, first, codes)
        begin, end = self._row_of_scales(first), self._row_of_scales(first + len(out) - 1) + 1
        scales = _scales(self.scale, read, begin * self.grid[1], (end - begin, self.grid[1]))
        dequantize(codes, _table(self.weight.dtype), scales, begin, self.matrix, self.grid, self.block, first, out)

    def _row_of_scales(self, element: int) -> int:
        number, row = divmod(element // self.matrix[1], self.matrix[0])
        return number * self.grid[0] + row // self.block[0]


def _scales(tensor: Tensor, read: Read, first: int, shape: Pair) -> Matrix:
    width = {"F32": 4, "F8_E8M0": 1}.get(tensor.dtype, 2)
    raw = np.empty(math.prod(shape) * width, np.uint8)
    read(tensor, first * width, raw)
    values = _table(tensor.dtype)[raw] if width == 1 else decoded(raw, tensor.dtype)
    return values.reshape(shape)


@cache
def _table(dtype: str) -> Matrix:
    """The float32 value of each of the 256 codes of a dtype."""
    code = np.arange(256)
    if dtype == "F8_E8M0":
        return np.exp2(np.where(code < 255, code - 127.0, np.nan)).astype(np.float32)
    bits, bias = {"F8_E4M3": (3, 7), "F8_E5M2": (2, 15)}[dtype]
    exponent, fraction = code % 128 >> bits, code % (1 << bits) / (1 << bits)
    size = np.where(exponent > 0, 1 + fraction, 2 * fraction) * np.exp2(exponent - float(bias))
    if dtype == "F8_E4M3":  # has no infinity
        size[code % 128 == 127] = np.nan
    else:
        size[exponent == 31] = np.where(fraction[exponent == 31] > 0, np.nan, np.inf)
    signed: Matrix = np.where(code < 128, size, -size).astype(np.float32)
    return signed
