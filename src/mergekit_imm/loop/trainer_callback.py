"""A callback for transformers' Trainer that merges the model back towards its base, in place, during training."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, extra_error

try:
    from transformers import TrainerCallback, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise extra_error("IMMCallback", "transformers") from error

from ..checkpoint.open_checkpoint import open_checkpoint
from ..live.merge_adapter import has_adapters, merge_adapter, peft_model
from ..live.merge_into import check_untrained, merge_into
from ..options.options import check_keywords
from ..plan.open_inputs import round_of, without_same_start
from .early_checks import check_options, keywords

logger = logging.getLogger(__name__)


class IMMCallback(TrainerCallback):  # type: ignore[misc]
    """Merge a Trainer's model with `merge_into`: at the end of training, after each epoch, or every n steps.

        merged = alpha * base + (1 - alpha) * (start + DARE(model - start))                              (Eq. 6)

    Args:
        base: the model to pull back to, as in `merge_into`.
        every: "end" (of training), "epoch", or a number of steps.
        merge_adapter: for a PEFT model: at the end, merge the adapter into its model, and that back towards `base`: the
            bits of `merge_checkpoints` with the saved adapter. The result is `callback.model`, without adapter, in the
            dtypes of the model; `trainer.save_model` and the PEFT model's `save_pretrained` then save it whole. The
            model under the adapter must be `start`. If False, a model with adapters is not merged, and a warning says
            so.
        options: alpha, drop, seed, start, iteration, and so on, as in `merge_into`.

    Every rank merges what it holds (single process, DDP, FSDP2), once. The optimizer's state does not change: after a
    merge during training, its moments are still those of the weights before. With "epoch" or steps, every later round
    starts from the previous merged model, which is not on disk, so reference="base" is required. Works with TRL's
    trainers. Options are checked here, against the headers of `base` and `start`. Before the first training step the
    model is checked too: its values must be the start's, unless reference="base". Raises MergeError; ArgumentError for
    DeepSpeed, which keeps master weights in its optimizer.

    >>> trainer = transformers.Trainer(model, arguments, callbacks=[IMMCallback("base", alpha=0.5)])  # doctest: +SKIP
    """

    def __init__(
        self, base: str | Path, *, every: str | int = "end", merge_adapter: bool = False, **options: Any
    ) -> None:
        if every not in ("end", "epoch") and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ArgumentError(f"every is {every!r}; it must be 'end', 'epoch' or a number of steps")
        if every != "end" and options.get("reference", "start") != "base":
            raise ArgumentError(
                f"every is {every!r}: the start of the second round is the first merged model, which is not on disk;"
                " give reference='base', or merge at the end and train each round separately"
            )
        if every != "end" and merge_adapter:
            raise ArgumentError(
                f"every is {every!r}; an adapter can only be merged at the end: what the trainer saved after that would"
                " be an adapter on a model that is not on disk; leave `every` out"
            )
        check_keywords(options, keywords(merge_into) - {"dry_run"}, "IMMCallback")
        check_options(base, options)
        self.base, self.every, self.merge_adapter, self.options = base, every, merge_adapter, options
        self.iteration = options.pop("iteration", None)
        options.setdefault("progress", False)  # the trainer has a bar
        self.merges = 0
        if options.get("start") is not None:
            refs = {"base": base, "start": options["start"]}
            inputs = without_same_start({role: open_checkpoint(ref, role, dry_run=True) for role, ref in refs.items()})
            if self._iteration() is None:
                round_of(inputs)
        self.model: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Check the model and options before the first step."""
        if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):
            raise ArgumentError(
                "IMMCallback does not work with DeepSpeed: its optimizer keeps master weights and would undo the"
                " merge; save the model, and merge it with merge_checkpoints"
            )
        model = kwargs["model"]
        if not has_adapters(model):
            resumed = getattr(state, "global_step", 0)  # a loop by hand may have no state
            check = merge_into if resumed else check_untrained
            check(model, self.base, **{"iteration": self._iteration(), "dry_run": True, **self.options})
        elif not self.merge_adapter:
            given = {"start": self.options.get("start"), "iteration": self._iteration()}
            logger.warning(
                "the model has adapters: IMMCallback merges nothing. Save the adapter, then `imm-merge %s ADAPTER%s"
                " -o OUT`; or give merge_adapter=True",
                self.base,
                "".join(f" --{name} {value}" for name, value in given.items() if value is not None),
            )
        elif peft_model(model) is None:
            raise ArgumentError(
                f"merge_adapter is given, but this {type(model).__name__} has no merge_and_unload: its adapters are not"
                " a PeftModel's, or cannot be merged; give the trainer what peft.get_peft_model"
                " returns, or save the adapter and merge it with merge_checkpoints"
            )
        else:
            merge_adapter(model, self.base, iteration=self._iteration(), dry_run=True, **self.options)

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        """Merge if `every` is "end"."""
        if self.every == "end":
            self._merge(kwargs["model"])

    def on_epoch_end(self, *_: Any, **kwargs: Any) -> None:
        """Merge if `every` is "epoch"."""
        if self.every == "epoch":
            self._merge(kwargs["model"])

    def on_step_end(self, _: TrainingArguments, state: TrainerState, *__: Any, **kwargs: Any) -> None:
        """Merge every `every` steps, if it is a number."""
        if isinstance(self.every, int) and state.global_step % self.every == 0:
            self._merge(kwargs["model"])

    def _iteration(self) -> int | None:
        first = self.iteration if self.iteration is not None or self.every == "end" else 0
        return None if first is None else first + self.merges

    def _merge(self, model: Any) -> None:
        options = {"iteration": self._iteration(), **self.options}
        if not has_adapters(model):
            report = merge_into(model, self.base, **options)
        elif self.merge_adapter:
            model, report = merge_adapter(model, self.base, **options)
            logger.warning(
                "the adapter is merged into its base: trainer.save_model now saves the merged %s, not an adapter",
                type(model).__name__,
            )
        else:
            return
        self.model = model
        self.merges += 1
        counts = ", ".join(f"{count} {action}" for action, count in report.tensors.items())
        # A warning, or nobody would see it: transformers shows no others by default.
        logger.warning("merged back towards %s: %s; iteration %d", self.base, counts, report.iteration)
        for note in report.notes:
            logger.info(note)
