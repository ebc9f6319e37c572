"""Rounds of your own training loop in Python: which models the next round merges, and where it starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.json_files import parse_json, read_small
from ..common.messages import shown
from ..engine.merge import merge_checkpoints
from ..errors import ArgumentError, CheckpointError, OutputError
from ..options.options import check_keywords
from ..options.recipe import to_json
from ..output import direct_io
from ..schedules import Schedule
from .early_checks import check_options, keywords
from .saving import saving

if TYPE_CHECKING:
    import torch

FORMAT, VERSION = "mergekit_imm rounds", 1


@dataclass(frozen=True)
class Rounds:
    """Where a loop is: the base, the model that the next round starts from, and the round's number (IMM).

        merged_t = alpha_t * base + (1 - alpha_t) * (start_t + DARE(sft_t - start_t)),    start_t+1 = merged_t

    `alpha` and `drop` are numbers or functions of the round (`mergekit_imm.schedules`); `start`, None: the base;
    `options`: further keyword arguments of the merges (`importance`, `keep`, …). All are checked here against the
    base's headers, before any training; schedules at their first value. Immutable: a merge returns the next state.
    Raises MergeError. Source: arXiv 2503.02103, Eq. 6.

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
    _checked: InitVar[bool] = False  # already, by an earlier round
    _unsaved: list[torch.Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self, _checked: bool) -> None:
        """Raise MergeError for what the first merge would refuse after hours of training."""
        if _checked:
            return
        own = {each.name for each in fields(self)}
        twice = sorted(own & set(self.options))
        if twice:
            raise ArgumentError(
                f"options have '{twice[0]}', which is a parameter of Rounds: Rounds(..., {twice[0]}=...)"
            )
        check_keywords(self.options, keywords(merge_checkpoints) - own - {"dry_run", "as_adapter"}, "Rounds")
        numbers = {name: value for name, value in self.numbers().items() if name != "start"}
        check_options(self.base, numbers)

    def numbers(self) -> dict[str, Any]:
        """Return this round's keyword arguments for `merge_checkpoints` and `merge_into`."""
        alpha, drop = (value(self.iteration) if callable(value) else value for value in (self.alpha, self.drop))
        return {
            "start": self.start,
            "alpha": alpha,
            "drop": drop,
            "seed": self.seed,
            "iteration": self.iteration,
            **self.options,
        }

    def merge(
        self,
        sft: str | Path | torch.nn.Module | Mapping[str, torch.Tensor],
        out: str | Path,
        *,
        save: Callable[[Any, Path], object] | None = None,
    ) -> Rounds:
        """Merge the trained model into `out`, where the next round starts; return the state after this round.

        `sft` is a checkpoint, or an adapter on disk, merged by `merge_checkpoints`; or a model in memory, or a mapping
        of names to tensors, merged in place by `merge_into` and then saved in `out` by `save(sft, out)`, or else by the
        model's `save_pretrained`; a mapping as one safetensors file, with shared tensors under the names the base
        stores. If several ranks hold the model, every rank calls this, with a `save` that all can call. Raises
        MergeError.

        A PEFT model's adapter is merged into its model, which must be `start`; `out` is a whole model, with the bits of
        a merge of the saved adapter in the dtypes of the model. `sft.get_base_model()` is then that model, without
        adapter: give it to `get_peft_model` for the next round, and make a new optimizer.

        Everything is checked before memory changes, including that `out` is free; without `save`, `out` appears only
        when complete. If saving fails all the same (a full disk), the model in memory is already merged: this object
        refuses to merge it again; call `save_merged`.
        """
        if isinstance(sft, str | Path):
            merge_checkpoints(self.base, sft, out, **self.numbers())
            return self._after(out)
        from ..live.merge_adapter import merge_adapter, peft_model
        from ..live.merge_into import merge_into

        check_keywords(self.options, keywords(merge_into), "a merge in memory")
        module = _module_of(sft, save)
        if self._holds(module):
            raise ArgumentError(
                f"round {self.iteration} of this model is already merged but not saved: call save_merged(sft, out) on"
                " this Rounds; if the model was loaded and trained again since, create a new Rounds"
            )
        with saving(sft, Path(out), self.base, save) as write:
            merge = merge_into if peft_model(module) is None else merge_adapter
            merge(module, self.base, **self.numbers())
            return self._written(module, write, out)

    def save_merged(
        self,
        sft: torch.nn.Module | Mapping[str, torch.Tensor],
        out: str | Path,
        *,
        save: Callable[[Any, Path], object] | None = None,
    ) -> Rounds:
        """Save the model that `merge` merged in memory but failed to save; return the state after this round.

        Raises ArgumentError for another model, OutputError if it fails again.
        """
        module = _module_of(sft, save)
        if not self._holds(module):
            raise ArgumentError(f"round {self.iteration} has not merged this model; call merge")
        with saving(sft, Path(out), self.base, save) as write:
            return self._written(module, write, out)

    def _holds(self, module: torch.nn.Module) -> bool:
        """Whether a model is merged and not saved. Its tensors are kept alive, so that no others reuse their memory."""
        kept = {(tensor.device, tensor.data_ptr()) for tensor in self._unsaved}
        return any((tensor.device, tensor.data_ptr()) in kept for tensor in _local_tensors(module))

    def _written(self, module: torch.nn.Module, write: Callable[[], object], out: str | Path) -> Rounds:
        try:
            write()
        except BaseException as error:
            self._unsaved[:] = _local_tensors(module)
            if not isinstance(error, Exception):
                raise
            why = error.strerror if isinstance(error, OSError) and error.strerror else shown(error, 300)
            raise OutputError(
                f"round {self.iteration} is merged, in memory, and cannot be saved in {shown(out)}: {why}; fix that,"
                " and call save_merged(sft, out) on this Rounds, which does not merge again"
            ) from error
        self._unsaved.clear()
        return self._after(out)

    def _after(self, out: str | Path) -> Rounds:
        return replace(self, start=out, iteration=self.iteration + 1, _checked=True)

    def save(self, path: str | Path) -> None:
        """Write base, start, seed and round as JSON, atomically. Raises OutputError."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "base": str(self.base),
            "start": None if self.start is None else str(self.start),
            "seed": self.seed,
            "iteration": self.iteration,
        }
        from ..output.write_errors import output_errors

        with output_errors(Path(path)):
            direct_io.replace_file(Path(path), to_json(content))

    def restored(self, path: str | Path) -> Rounds:
        """Return the state that `save` wrote to a file; this one if there is no file yet.

        Raises CheckpointError for a damaged file, ArgumentError for another base or seed.
        """
        path = Path(path)
        if not path.exists():
            return self
        try:
            content = parse_json(read_small(path))
            if (content["format"], content["version"]) != (FORMAT, VERSION):
                raise ValueError(f"it has format {content['format']!r}, version {content['version']!r}")
            base, start, seed, iteration = (content[key] for key in ("base", "start", "seed", "iteration"))
            if type(iteration) is not int or iteration < 0 or not isinstance(start, str | None):
                raise ValueError("its round is not a number")
        except OSError as error:
            raise CheckpointError(f"{shown(path)} cannot be read: {error.strerror}; make it readable") from error
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{shown(path)} is damaged: {shown(error, 200)}; restore or remove it") from error
        if (base, seed) != (str(self.base), self.seed):
            raise ArgumentError(
                f"{shown(path)} has base {shown(base)} and seed {shown(seed)}, and this Rounds has"
                f" {shown(self.base)} and {self.seed}; give another file, or the same base and seed"
            )
        return replace(self, start=start, iteration=iteration, _checked=True)


def _module_of(sft: torch.nn.Module | Mapping[str, torch.Tensor], save: object) -> torch.nn.Module:
    """Return a model as it is, or tensors as the parameters of a module. Raises ArgumentError."""
    import torch
    from torch.distributed.tensor import DTensor

    from ..live.local_shards import is_distributed

    if not isinstance(sft, Mapping):
        if save is None and not hasattr(sft, "save_pretrained"):
            raise ArgumentError(
                f"{type(sft).__name__} has no save_pretrained; give `save`, a function of the model and a path"
            )
        if save is None and is_distributed(sft):
            raise ArgumentError(
                f"{type(sft).__name__} is held by several ranks; give a `save` that all of them can call"
            )
        return sft
    root = torch.nn.Module()
    for name, tensor in sft.items():
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentError(
                f"'{shown(name)}' is a {type(tensor).__name__}; give a mapping of names to torch tensors"
            )
        if save is None and isinstance(tensor, DTensor):
            raise ArgumentError(f"'{shown(name)}' is a DTensor, and this rank holds only a part; give `save`")
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))
    return root


def _local_tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    """Return the non-empty parts of a model's tensors that this process holds."""
    from ..live.local_shards import live_tensors
    from ..live.merge_adapter import own_tensors, peft_model

    wrapped = peft_model(module)
    tensors = live_tensors(module) if wrapped is None else own_tensors(wrapped)
    return [part.tensor for live in tensors.values() for part in live.parts]
