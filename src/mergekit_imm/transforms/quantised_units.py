"""Group the tensors of a quantised model: packed weights with their scales and whatever else they need."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..checkpoint.lazy_tensor import Tensor
from ..common.messages import shown
from ..numerics.dtypes import MERGED

IsCopied = Callable[[str], bool]  # whether a tensor is copied unchanged

FP8 = ("F8_E4M3", "F8_E5M2")
_PLAIN = (*MERGED, "I64", "BOOL")  # dtypes of unquantised models


@dataclass(frozen=True)
class Copied:
    """Which tensors --keep and --take name."""

    kept: IsCopied
    taken: IsCopied

    def copies(self, unit: Unit) -> bool:
        """Whether all tensors of a unit are copied, from one side."""
        return all(map(self.kept, unit.names)) or all(map(self.taken, unit.names))

    def is_copied(self, name: str) -> bool:
        """Whether a tensor is copied unchanged."""
        return self.kept(name) or self.taken(name)


# Names that only quantised models store.
_STORED = (
    ("bitsandbytes", re.compile(r"\.((nested_)?(absmax|quant_map)|quant_state\.\w+|SCB|weight_format)$")),
    ("GPTQ or AWQ", re.compile(r"\.(qweight|qzeros|g_idx)$")),
    ("compressed-tensors", re.compile(r"\.weight_(packed|zero_point|global_scale)$")),
    ("NVFP4 of modelopt", re.compile(r"\.weight_scale_2$")),
    ("optimum-quanto", re.compile(r"\.weight\._data$")),
    ("torchao", re.compile(r"\._weight_qdata$")),
    ("HQQ", re.compile(r"\.W_q$")),
)
# Names of scales: appended to the weight's name, or replacing its last component.
_APPENDED, _REPLACING = ("_scale_inv", "_scale"), ("scale_weight", "scale")


@dataclass(frozen=True)
class Unit:
    """A quantised weight and every tensor needed to read it."""

    method: str
    names: tuple[str, ...]
    evidence: str  # the tensor that shows it
    reason: str  # how it shows it
    weight: str  # the weight's name in an unquantised model


def scales_of(weight: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the scales stored with a weight, in any of the spellings in use.

    `X.weight_scale_inv` (DeepSeek), `X.weight_scale` (compressed-tensors, fbgemm, modelopt), `X.scale_weight`
    (ComfyUI), `X.scale` (DeepSeek's own format). In spite of `_inv` all of them multiply the weight.
    """
    found = [weight + ending for ending in _APPENDED]
    if weight.endswith(".weight"):
        found += [weight.removesuffix("weight") + name for name in _REPLACING]
    return [name for name in found if name in tensors]


def units_of(tensors: Mapping[str, Tensor], *, said: bool = False) -> list[Unit]:
    """Return the quantised weights of a model; if its config says that it is quantised (`said`), judge by dtype too.

    >>> from mergekit_imm.checkpoint.safetensors_file import TensorInfo
    >>> names = {"a.weight": "F8_E4M3", "a.weight_scale": "F32", "a.bias": "BF16", "b.weight": "BF16"}
    >>> model = {name: TensorInfo(name, dtype, (1,), "", 0, 1) for name, dtype in names.items()}
    >>> [unit.names for unit in units_of(model)]
    [('a.weight', 'a.weight_scale')]
    """
    if all(tensor.dtype in MERGED for tensor in tensors.values()):
        return []
    found: dict[str, tuple[str, str, str, str]] = {}  # by the common prefix of a unit's names
    for name, tensor in tensors.items():
        for method, stem, reason, weight in _signs(name, tensor, tensors):
            found.setdefault(stem, (method, name, reason, weight))
    if said:
        for name, tensor in tensors.items():
            if tensor.dtype not in _PLAIN and next(_stems(name, found), None) is None:
                stem = _module(name) if tensor.dtype not in FP8 or name.endswith(".weight") else name
                found[stem] = ("", name, f"is {tensor.dtype}", name if stem == name else f"{stem}weight")
    parts: dict[str, list[str]] = {stem: [] for stem in found}
    for name in tensors:
        for stem in _stems(name, found):
            parts[stem].append(name)
    return [Unit(method, tuple(parts[stem]), *rest) for stem, (method, *rest) in found.items()]


def _signs(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, str, str]]:
    """Yield what a tensor reveals: the method, the prefix of the unit's names, the reason, the weight's plain name."""
    for method, pattern in _STORED:
        if pattern.search(name):
            stem = _module(name)
            yield method, stem, "is stored", stem[:-1] if stem[:-1] in tensors else f"{stem}weight"
    if tensor.dtype == "U8" and name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in tensors:
        weight = name.removesuffix("_blocks")
        yield "MXFP4", f"{weight}_", "is U8, with scales beside it", weight
    if tensor.dtype in MERGED:
        return
    module = name.removesuffix("weight")
    if tensor.dtype == "U32" and name.endswith(".weight") and f"{module}scales" in tensors:
        yield "MLX", module, "is U32, with scales beside it", name
    for scale in scales_of(name, tensors)[:1]:
        method = "FP8" if tensor.dtype in FP8 else "quantised"
        stem = module if name.endswith(".weight") else f"{name}_"
        yield method, stem, f"is {tensor.dtype}, with '{shown(scale)}' beside it", name


def _module(name: str) -> str:
    """The prefix of a module's tensors; those of its weight may have further components."""
    return name[: found.start() + 1] if (found := re.search(r"\.weight\.", name)) else name.rpartition(".")[0] + "."


def _stems(name: str, known: Mapping[str, object]) -> Iterator[str]:
    """Yield the known prefixes of a name: of its module, or of a parameter `X` that has an `X_scale`."""
    last = name.rpartition(".")[2]
    if last != "bias" and not last.endswith("_bias"):
        candidates = [name, f"{name}_", f"{name}.", _module(name)]
        candidates += [name[: at.end()] for at in re.finditer("_", name) if at.start() >= len(name) - len(last)]
        yield from (stem for stem in dict.fromkeys(candidates) if stem in known)


def pattern_of(names: Iterable[str], others: Iterable[str]) -> str:
    r"""Return a pattern that matches these names and none of the others, with numbers generalised where possible.

    >>> pattern_of([f"h.{n}.up.{part}" for n in (0, 1) for part in ("weight", "weight_scale")], ["h.0.up.bias"])
    '^h\\.\\d+\\.up\\.(weight|weight_scale)$'
    >>> pattern_of(["h.1.up.weight", "h.2.up.weight"], ["h.0.up.weight"])
    '^h\\.(1|2)\\.up\\.weight$'
    """
    names, free = list(names), [*others]
    kinds: dict[tuple[str, ...], list[str]] = {}  # module, numbers blanked out
    for name in names:
        module = name.split(".")[:-1]
        kinds.setdefault(tuple("*" if part.isdigit() else part for part in module), []).append(name)
    by_ends: dict[str, list[str]] = {}
    for parts, kind in kinds.items():
        ends = _either(dict.fromkeys(re.escape(name.rpartition(".")[2]) for name in kind))
        numbers = [sorted({name.split(".")[at] for name in kind}, key=int) for at, p in enumerate(parts) if p == "*"]
        for choice in ([r"\d+"] * len(numbers), [_either(each) for each in numbers]):
            rest = iter(choice)
            head = "".join((next(rest) if part == "*" else re.escape(part)) + r"\." for part in parts)
            if not any(re.fullmatch(head + ends, name) for name in free):
                break
        else:
            return "|".join(f"^{re.escape(name)}$" for name in names)
        by_ends.setdefault(ends, []).append(head)
    return "|".join(f"^{_either(heads)}{ends}$" for ends, heads in by_ends.items())


def _either(patterns: Iterable[str]) -> str:
    each = [*patterns]
    return each[0] if len(each) == 1 else f"({'|'.join(each)})"
