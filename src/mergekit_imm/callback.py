"""A callback of transformers' Trainer that merges the model back towards its base, in place, while it is trained."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from .errors import ArgumentError, extra_error

try:
    from transformers import TrainerCallback, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise extra_error("IMMCallback", "transformers", "analyze") from error

from .checkpoint.source import open_checkpoint
from .live import merge_into

logger = logging.getLogger(__name__)


class IMMCallback(TrainerCallback):  # type: ignore[misc]
    """Merge the model that a Trainer trains, by `merge_into`: at its end, after each epoch, or every n steps.

        merged = alpha * base + (1 - alpha) * (start + DARE(model - start))                              (Eq. 6)

    Args:
        base: the model to pull back to, as in `merge_into`.
        every: "end" (of the training), "epoch", or a number of steps.
        merge_adapter: of a PEFT model: merge the adapter into its base at the end, and that back towards `base`; the
            result is `callback.model`. Without it a model with adapters is left alone, which is said.
        options: alpha, drop, seed, start, iteration, and so on, as in `merge_into`.

    Every rank merges what it holds (single process, DDP, FSDP2), once. The optimizer's state is left alone: after a
    merge during the training its moments are those of the weights before it. Merges more often than at the end are
    rounds of which each starts from the merged model before it, which is on no disk: they need reference="base". Works
    with TRL's trainers. Raises ArgumentError when the training begins, for DeepSpeed too, whose optimizer keeps weights
    of its own.

    >>> trainer = transformers.Trainer(model, arguments, callbacks=[IMMCallback("base", alpha=0.5)])  # doctest: +SKIP
    """

    def __init__(
        self, base: str | Path, *, every: str | int = "end", merge_adapter: bool = False, **options: Any
    ) -> None:
        if every not in ("end", "epoch") and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ArgumentError(f"every is {every!r}; it must be 'end', 'epoch' or a number of steps")
        if every != "end" and options.get("reference", "start") != "base":
            raise ArgumentError(
                f"every is {every!r}: the start of the second round is the first merged model, which is on no disk;"
                " give reference='base', or merge at the end and begin a training for each round"
            )
        if every != "end" and merge_adapter:
            raise ArgumentError(f"every is {every!r}; an adapter can be merged at the end only")
        self.base, self.every, self.merge_adapter, self.options = base, every, merge_adapter, options
        self.iteration = options.pop("iteration", None)
        self.merges = 0
        self.model: Any = None

    def on_train_begin(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        """Refuse now what would be refused hours later."""
        if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):
            raise ArgumentError(
                "IMMCallback does not work with DeepSpeed, whose optimizer keeps master weights of its own and would"
                " undo the merge; save the model, and merge it with merge_checkpoints"
            )
        open_checkpoint(self.base, "base", dry_run=True)
        if _has_adapters(kwargs["model"]) and not self.merge_adapter:
            logger.warning(
                "the model has adapters: IMMCallback merges nothing. Save the adapter, then `imm-merge %s ADAPTER`; or"
                " merge_adapter=True",
                self.base,
            )

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        """Merge, if that is when."""
        if self.every == "end":
            self._merge(kwargs["model"])

    def on_epoch_end(self, *_: Any, **kwargs: Any) -> None:
        """Merge, if that is when."""
        if self.every == "epoch":
            self._merge(kwargs["model"])

    def on_step_end(self, _: TrainingArguments, state: TrainerState, *__: Any, **kwargs: Any) -> None:
        """Merge, if that is when."""
        if isinstance(self.every, int) and state.global_step % self.every == 0:
            self._merge(kwargs["model"])

    def _merge(self, model: Any) -> None:
        if _has_adapters(model):
            if not self.merge_adapter:
                return
            model = model.merge_and_unload()
        first = self.iteration if self.iteration is not None or self.every == "end" else 0
        iteration = None if first is None else first + self.merges
        report = merge_into(model, self.base, iteration=iteration, **self.options)
        self.model = model
        self.merges += 1
        logger.info("merged %s towards %s, round %d", dict(report.tensors), self.base, report.iteration)
        for note in report.notes:
            logger.info(note)


def _has_adapters(model: Any) -> bool:
    return any(type(module).__module__.startswith("peft.") for module in model.modules())
