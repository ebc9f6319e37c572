"""Rounds of a loop of your own, in Python: what the next merge is of, and how to go on after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import disk
from .errors import ArgumentError, CheckpointError, shown
from .json_input import parse_json, read_small
from .merge import merge_checkpoints
from .recipe import to_json
from .schedules import Schedule

if TYPE_CHECKING:
    import torch

FORMAT, VERSION = "mergekit_imm rounds", 1


@dataclass(frozen=True)
class Rounds:
    """Where a loop is: the base, the model that the next round starts from, and the round's number (IMM).

        merged_t = alpha_t * base + (1 - alpha_t) * (start_t + DARE(sft_t - start_t)),    start_t+1 = merged_t

    `alpha` and `drop` are numbers, or functions of the round (`mergekit_imm.schedules`); `start` is the base if None;
    `options` are further keyword arguments of the merges (`importance`, `keep`, …). A merge returns the rounds as they
    are after it, and changes nothing here. Source: arXiv 2503.02103, Eq. 6.

    >>> rounds = Rounds(base_folder, alpha=0.5, drop=0.2)
    >>> rounds = rounds.merge(sft_folder, out_folder)
    >>> rounds.iteration, str(rounds.start) == str(out_folder)
    (1, True)
    """

    base: str | Path
    start: str | Path | None = None
    alpha: float | Schedule = 0.5
    drop: float | Schedule = 0.2
    seed: int = 0
    iteration: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        """Return what this round is merged with, as keyword arguments of `merge_checkpoints` and `merge_into`."""
        alpha, drop = (value(self.iteration) if callable(value) else value for value in (self.alpha, self.drop))
        return {
            "start": self.start, "alpha": alpha, "drop": drop, "seed": self.seed, "iteration": self.iteration,
            **self.options,
        }  # fmt: skip

    def merge(
        self,
        sft: str | Path | torch.nn.Module | Mapping[str, torch.Tensor],
        out: str | Path,
        *,
        save: Callable[[Any, Path], object] | None = None,
    ) -> Rounds:
        """Merge what a round has trained into `out`, which the next round starts from; return the rounds after it.

        `sft` is a checkpoint, merged into the folder `out` by `merge_checkpoints`; or a model in memory, or its
        tensors by name, which `merge_into` merges in place, and which then are saved in `out`: by `save(sft, out)`,
        else by the model's own `save_pretrained`, tensors as one safetensors file. Of a model that several ranks hold,
        every rank calls this, with a `save` that all of them can call. Raises MergeError.
        """
        if isinstance(sft, str | Path):
            merge_checkpoints(self.base, sft, out, **self.numbers())
        else:
            if save is None and not isinstance(sft, Mapping) and not hasattr(sft, "save_pretrained"):
                raise ArgumentError(
                    f"{type(sft).__name__} has no save_pretrained; give `save`, called with it and a path"
                )
            self._merge_in_place(sft)
            (save or _save)(sft, Path(out))
        return replace(self, start=out, iteration=self.iteration + 1)

    def _merge_in_place(self, sft: Any) -> None:
        from .live import merge_into

        merge_into(_module_of(sft) if isinstance(sft, Mapping) else sft, self.base, **self.numbers())

    def save(self, path: str | Path) -> None:
        """Write where the loop is: base, start, seed and round, as JSON, whole or not at all."""
        content = {
            "format": FORMAT, "version": VERSION, "base": str(self.base),
            "start": None if self.start is None else str(self.start), "seed": self.seed, "iteration": self.iteration,
        }  # fmt: skip
        disk.replace_file(Path(path), to_json(content))

    def restored(self, path: str | Path) -> Rounds:
        """Return these rounds where a file says that they are; as they are, if there is no such file yet.

        Raises CheckpointError for a damaged file, ArgumentError for one of another base or seed.
        """
        path = Path(path)
        if not path.exists():
            return self
        try:
            content = parse_json(read_small(path))
            if (content["format"], content["version"]) != (FORMAT, VERSION):
                raise ValueError(f"it is of format {content['format']!r}, version {content['version']!r}")
            base, start, seed, iteration = (content[key] for key in ("base", "start", "seed", "iteration"))
            if type(iteration) is not int or iteration < 0 or not isinstance(start, str | None):
                raise ValueError("its round is no number")
        except OSError as error:
            raise CheckpointError(f"{shown(path)} cannot be read: {error.strerror}; make it readable") from error
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{shown(path)} is damaged: {shown(error, 200)}; restore or remove it") from error
        if (base, seed) != (str(self.base), self.seed):
            raise ArgumentError(
                f"{shown(path)} is of base {shown(base)} and seed {shown(seed)}, and these rounds are of"
                f" {shown(self.base)} and {self.seed}; give another file, or the same base and seed"
            )
        return replace(self, start=start, iteration=iteration)


def _module_of(state: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Return a module whose parameters are these tensors, by their names."""
    import torch

    root = torch.nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))
    return root


def _save(sft: Any, out: Path) -> None:
    if isinstance(sft, Mapping):
        from safetensors.torch import save_file

        out.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in sft.items()}, out / "model.safetensors", {"format": "pt"}
        )
    else:
        sft.save_pretrained(out)
