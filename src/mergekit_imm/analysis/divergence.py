"""How far a model's predictions are from its base's: KL(base || model) per token of some texts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..common.display import Displayed, Summary
from ..common.messages import shown
from ..errors import ArgumentError, MismatchError, NonFiniteError
from ..evaluation.bootstrap import Indices, Interval, bootstrap
from ..evaluation.reversal import FEWEST
from .calibration import IGNORED

_PIECE = 1 << 22  # logits converted to float64 at a time


@dataclass(frozen=True, repr=False)
class Divergence(Displayed):
    """KL(base || model) in nats per token, with its interval over texts; and the sum and the tokens of each text."""

    kl: Interval
    sums: tuple[float, ...]
    tokens: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the mean and the totals as plain data."""
        return {"kl": self.kl.to_dict(), "texts": len(self.sums), "tokens": sum(self.tokens)}

    def _summary(self) -> Summary:
        interval = "" if math.isnan(self.kl.low) else f" [{self.kl.low:.3g}, {self.kl.high:.3g}]"
        return Summary(
            f"{self.kl.value:.3g}{interval} nats per token, on {sum(self.tokens)} tokens of {len(self.sums)} texts"
        )


def mean_kl(
    base: nn.Module,
    model: nn.Module,
    batches: Iterable[Any],
    *,
    vocabulary: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Divergence:
    """Measure how far the predictions of a model are from those of its base: the forward KL, per token.

        KL_t = sum_v p(v | x_<t) * (log p(v | x_<t) - log q(v | x_<t)),   p of base, q of model
        kl   = sum_t KL_t / number of t,   over the positions t of all texts that count

    Each KL_t is exact: a sum over the whole vocabulary, not an estimate from sampled tokens. The contexts x_<t are
    those of the given texts. If base wrote them, unselected, at temperature 1, the sum over a text estimates without
    bias the KL of whole texts; otherwise kl is a mean over other contexts than base's own.

    Args:
        base, model: causal language models of transformers, on any device.
        batches: any iterable, read once: mappings with `input_ids`, `labels` (-100 does not count, nor does the first
            token), and any other inputs of the models. Padding may be on either side, if `attention_mask` shows it.
        vocabulary: compare the first so many tokens alone, with their probabilities renormalised in both models. None:
            all of base's. Tokens that only `model` has take probability from the others, and base gives them none.
        progress: called with the number of texts done.

    Softmax, KL and sums are in float64, a few MiB at a time, whatever the vocabulary. Logits of bfloat16 have three
    digits, which adds about 1e-3 nats: load models in float32. The interval is a 95 % percentile bootstrap over texts,
    as tokens of one text are not independent; with fewer than 6 texts there is none. Both models run in evaluation
    mode and are left unchanged.

    Raises ArgumentError for no batches, a batch without labels, or a text without a token that counts; MismatchError if
    base has tokens that the model lacks; NonFiniteError for NaN or infinity, naming the text.

    Source: "RL's Razor", 2025 (arXiv 2509.04259), where it predicts forgetting, on texts of the new task. The interval
    is ours.

    >>> import torch, transformers
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    ... )
    >>> base, model = (transformers.AutoModelForCausalLM.from_config(config) for _ in range(2))
    >>> texts = torch.arange(8).repeat(6, 1)
    >>> mean_kl(base, base, [{"input_ids": texts, "labels": texts}]).kl
    Interval(value=0.0, low=0.0, high=0.0, n=6)
    >>> mean_kl(base, model, [{"input_ids": texts, "labels": texts}]).kl.value > 0
    True
    """
    for name, network in (("base", base), ("model", model)):
        if not isinstance(network, nn.Module):
            raise ArgumentError(f"{name} is a {type(network).__name__}; give a loaded model")
    sums: list[float] = []
    tokens: list[int] = []
    with _evaluating(base, model), torch.no_grad():
        for number, batch in enumerate(batches, 1):
            counts, keep = _counted(batch, f"batch {number}")
            logits = [_logits(network, batch, keep) for network in (base, model)]
            for row, at in enumerate(counts):
                where = f"text {len(sums) + 1}"
                sums.append(_text_kl(logits[0][row], logits[1][row], at, vocabulary, where))
                tokens.append(len(at))
            if progress is not None:
                progress(len(sums))
    if not sums:
        raise ArgumentError("batches is empty; give at least one batch")
    return Divergence(_interval(np.array(sums), np.array(tokens)), tuple(sums), tuple(tokens))


def _interval(sums: Any, tokens: Any) -> Interval:
    def mean(i: Indices) -> float:
        return math.fsum(sums[i]) / int(tokens[i].sum())

    found = bootstrap(mean, len(sums))
    return found if found.n >= FEWEST else replace(found, low=math.nan, high=math.nan)


def _counted(batch: Any, where: str) -> tuple[list[Tensor], int]:
    """Return the positions whose logits count in each text of a batch, among the last so many positions."""
    if not isinstance(batch, Mapping) or not all(isinstance(batch.get(key), Tensor) for key in ("input_ids", "labels")):
        kind = f"has {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"is a {type(batch).__name__}"
        raise ArgumentError(f"{where} {shown(kind)}; give mappings with the tensors 'input_ids' and 'labels'")
    labels = batch["labels"]
    if labels.ndim != 2 or labels.shape != batch["input_ids"].shape:
        shapes = f"{list(batch['input_ids'].shape)} and {list(labels.shape)}"
        raise ArgumentError(f"input_ids and labels of {where} have shapes {shapes}; give both (texts, tokens)")
    counts = (labels[:, 1:] != IGNORED).cpu()
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        counts &= (mask[:, :-1] != 0).cpu()  # the first token after padding has no context
    empty = next((row for row, each in enumerate(counts) if not each.any()), None)
    if empty is not None:
        raise ArgumentError(
            f"text {empty + 1} of {where} has no token that counts (all labels but the first are -100); leave it out"
        )
    first = int(counts.any(dim=0).nonzero()[0])  # label t is predicted from position t - 1
    return [each[first:].nonzero()[:, 0] for each in counts], labels.shape[1] - first


def _logits(network: nn.Module, batch: Mapping[str, Any], keep: int) -> Tensor:
    """Run a model on a batch; return its logits at the last `keep` positions, of shape (texts, keep, vocabulary)."""
    device = next(network.parameters()).device
    given = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    del given["labels"]
    accepted = inspect.signature(network.forward).parameters
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and "position_ids" in accepted and not mask[:, 0].all():  # padded on the left
        given.setdefault("position_ids", (mask.long().cumsum(dim=1) - 1).clamp(min=0))
    options = {"use_cache": False, "logits_to_keep": keep}  # not the logits of long prompts
    found = network(**{key: value for key, value in options.items() if key in accepted}, **given)
    logits: Tensor = getattr(found, "logits", found)
    return logits[:, -keep:]


def _text_kl(base: Tensor, model: Tensor, at: Tensor, vocabulary: int | None, where: str) -> float:
    """Return the sum of KL(base || model) over some positions of a text; logits of shape (positions, vocabulary)."""
    rows = base.shape[1] if vocabulary is None else vocabulary
    if min(base.shape[1], model.shape[1]) < rows:
        raise MismatchError(
            f"base has {base.shape[1]} tokens and the model {model.shape[1]}, fewer than the {rows} to compare; if the"
            " tokens that it lacks are padding, give the number of the others as vocabulary"
        )
    sums = []
    size = max(1, _PIECE // model.shape[1])
    for begin in range(0, len(at), size):
        part = at[begin : begin + size]
        one, other = base[part.to(base.device)].double(), model[part.to(model.device)].double().to(base.device)
        log_p = one[:, :rows].log_softmax(dim=1)
        log_q = other[:, :vocabulary].log_softmax(dim=1)[:, :rows]
        p = log_p.exp()
        each = (p * (log_p - log_q)).masked_fill_(p == 0, 0.0).sum(dim=1)  # 0 log 0 = 0
        total = float(each.clamp_(min=0.0).sum())  # a sum of rounded terms may fall 1e-17 below
        if not math.isfinite(total):
            whose = next((name for name, x in (("base", one), ("the model", other)) if x.isnan().any()), None)
            why = f"{whose} predicts NaN" if whose else "the model rules out a token that base predicts, or overflows"
            raise NonFiniteError(f"the KL of {where} is {total}: {why}; load the models in float32")
        sums.append(total)
    return math.fsum(sums)


@contextmanager
def _evaluating(*networks: nn.Module) -> Iterator[None]:
    """Put models in evaluation mode, without dropout; restore all modes at the end."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
