"""What a merge has to give: the formulas, tensor by tensor, on what transformers and PEFT say the models are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import reference

from .inputs import Input, NotBuiltError, State, state_of
from .situations import Round
from .zoo import shared_names

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_LOW = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}  # half a step, relative
_TINY = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-25, torch.float32: 2.0**-149}


@dataclass(frozen=True)
class Merge:
    """The models of a round as mappings, names those of the base's files, a tied tensor under each of its names."""

    base: State
    start: State  # what the delta is taken from
    sft: State
    stored: Mapping[str, torch.dtype]  # what the base's files hold
    classes: tuple[frozenset[str], ...]  # names that are one tensor in the base
    one: Round
    iteration: int
    seed: int

    @cached_property
    def names(self) -> list[str]:
        """All names of the base and of the SFT."""
        return [*self.base, *(name for name in self.sft if name not in self.base)]

    @cached_property
    def resized(self) -> set[str]:
        """Names of the tensors whose shapes differ."""
        states = (self.sft, self.start)
        return {n for n, t in self.base.items() if any(n in state and state[n].shape != t.shape for state in states)}

    @cached_property
    def together(self) -> list[frozenset[str]]:
        """Names that are one tensor in all the models."""
        found: list[set[str]] = []
        for names in self.classes:
            parts: list[set[str]] = []
            for name in sorted(names):
                same = next((part for part in parts if all(self._equal(name, other) for other in part)), None)
                if same is None:
                    parts.append({name})
                else:
                    same.add(name)
            found += parts
        single = set(self.base).difference(*self.classes) if self.classes else set(self.base)
        return [frozenset(part) for part in (*found, *({name} for name in sorted(single)))]

    @cached_property
    def broken(self) -> bool:
        """Whether the SFT or the start hold apart what is one tensor in the base."""
        return not set(self.classes) <= set(self.together)

    def _equal(self, one: str, other: str) -> bool:
        return all(torch.equal(state[one], state[other]) for state in (self.base, self.start, self.sft))

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that a tensor is written in."""
        if self.one.dtype != "base":
            return getattr(torch, self.one.dtype)  # type: ignore[no-any-return]
        twins = next((names for names in self.classes if name in names), frozenset({name}))
        return next(self.stored[twin] for twin in (name, *sorted(twins)) if twin in self.stored)

    def exact(self, name: str) -> bool:
        """Whether the bits are defined: not where an adapter changes the tensor, whose products PEFT adds otherwise."""
        return self.one.adapter is None or torch.equal(self.sft[name], self.start[name])

    def merged(self, name: str, key: str) -> Tensor:
        """A tensor of the result, its mask keyed by a name."""
        b, s, f = self.base[name], self.start[name], self.sft[name]
        if b.shape[1:] != f.shape[1:] or b.shape[1:] != s.shape[1:]:  # a row, with a column for each token
            return self._by_columns(name, key)
        common = min(len(b), len(s), len(f)) if name in self.resized else None
        dtype = self.dtype_of(name)
        rows = [each[:common].contiguous() for each in (b, f, s)]
        found = reference.merge_tensors(
            rows[0],
            rows[1],
            rows[2],
            dtype,
            name=key,
            alpha=self.one.alpha,
            drop=self.one.drop,
            seed=self.seed,
            iteration=self.iteration,
        )
        if common is None:
            return found
        owner = b if self.one.vocab == "base" else f
        return torch.cat([found, owner[common:].to(dtype)])

    def _by_columns(self, name: str, key: str) -> Tensor:
        base, start, sft = ({name: s[name].T.contiguous()} for s in (self.base, self.start, self.sft))
        return replace(self, base=base, start=start, sft=sft).merged(name, key).T

    def slack(self, name: str, expected: Tensor) -> Tensor:
        """How far an element may be off that PEFT computed with sums in another order."""
        sizes = [expected.abs().double()]
        for state in (self.base, self.start, self.sft):
            size = torch.zeros(expected.shape, dtype=torch.float64)
            common = tuple(map(slice, map(min, expected.shape, state[name].shape)))
            size[common] = state[name][common].abs().double()
            sizes.append(size)
        scale = 65536 / reference.keep16_of(self.one.drop)
        dtype = expected.dtype
        step = torch.maximum(2 * _LOW[dtype] * sizes[0], torch.tensor(_TINY[dtype], dtype=torch.float64))
        return step + 2e-6 * scale * torch.stack(sizes).sum(0)


def merge_of(base: Input, start: Input, sft: Input, *, one: Round, iteration: int, seed: int) -> Merge:
    """Return what a round merges."""
    origin = start if one.reference == "start" else base
    states = [state_of(each.model) | each.parts for each in (base, origin, sft)]
    if set(states[0]) - set(states[2]) - set(base.parts):
        raise NotBuiltError("transformers stores other names of a model that it resized")
    values = [base.model.get_parameter(min(names)) for names in shared_names(base.model)]
    classes = tuple(
        frozenset(n for n, t in states[0].items() if t.shape == value.shape and torch.equal(t, value))
        for value in values
    )
    return Merge(states[0], states[1], states[2], dtypes_in(base.folder), classes, one, iteration, seed)


def weights_in(folder: Path) -> State:
    """Return the tensors of every weight file of a folder, those of sub-folders by their path."""
    state: State = {}
    for file in sorted(folder.rglob("*.safetensors")):
        state |= {_prefix(file, folder) + name: tensor for name, tensor in load_file(file).items()}
    for file in sorted(folder.rglob("*.bin")):
        state |= {_prefix(file, folder) + name: t for name, t in torch.load(file).items()}
    return state


def dtypes_in(folder: Path) -> dict[str, torch.dtype]:
    """Return the dtype of every tensor of a folder."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                found[_prefix(file, folder) + name] = DTYPES[opened.get_slice(name).get_dtype()]
    for file in sorted(folder.rglob("*.bin")):
        found |= {_prefix(file, folder) + name: tensor.dtype for name, tensor in torch.load(file).items()}
    return found


def _prefix(file: Path, folder: Path) -> str:
    path = file.relative_to(folder).parent
    return f"{path}/" if path.name else ""


def says_in(folder: Path) -> dict[str, object]:
    """Return config.json of a folder."""
    found: dict[str, object] = json.loads((folder / "config.json").read_text())
    return found


def listed(names: Iterable[str]) -> str:
    """Return names in one line, the first few of many."""
    ordered = sorted(names)
    return ", ".join(ordered[:4]) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")
