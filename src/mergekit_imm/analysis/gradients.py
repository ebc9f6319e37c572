"""How important each layer is to a loss: sums of |gradient * weight|, with little memory, and the model left as it was.

Gradients come one at a time: a hook takes each when autograd has it whole, uses it, and frees it.
"""

from __future__ import annotations

import inspect
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.messages import bytes_text, shown
from ..errors import ArgumentError, MismatchError, NonFiniteError, OutputError
from ..model.tensor_names import blanked, layer_key, tied_key, unwrapped, weight_kind
from ..options.layer_factors import Importance
from ..output.direct_io import allocate

ORDERS = ("first", "second", "mix", "per-sample")
_PIECE = 1 << 22  # elements at a time in float32: no copy of a whole gradient is made
_BUCKETS = {"embedding": "embeddings", "head": "head", "norm": "norms", "bias": "biases", "other": "other"}

Loss = Callable[[nn.Module, Any], tuple[Tensor, int]]


def layer_importance(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    order: str = "first",
    loss: Loss | None = None,
    accumulate: str | Path = "memory",
    progress: Callable[[int], None] | None = None,
) -> Importance:
    """Measure how much each layer matters to a model's loss on data.

        I_n = sum of |s| over all linear weights W of layer n,  and s is, by `order`,
        "first"        G * W                                                            (Eq. 2', 3)
        "second"       W * F * W,              F = mean over samples of g_j^2
        "mix"          G * W - W * F * W / 2
        "per-sample"   I_n = sum over samples of (tokens_j / tokens) * sum of |g_j * W|: not Eq. 3

    G is the gradient of the mean loss over all tokens of the data set, g_j that of the mean loss of sample j. The
    absolute value is taken after gradients are summed over the data: what samples disagree on cancels. "per-sample"
    takes it before, and is therefore never smaller than "first". "second" and "mix" are LLM-Pruner's, as its code has
    them: F without the factor 1/2, and a mean, where Eq. 2 writes a sum over samples.

    Which weights are linear is `weight_kind`'s to say. Frozen ones count as well, and one that goes by several names
    counts once. All else is summed up apart, in `Importance.outside`.

    Args:
        model: a causal language model of transformers, or any module with a `loss`; float weights, on any device.
        batches: any iterable, read once. Of the default loss: mappings with `input_ids`, `labels` (-100: does not
            count) and whatever else the model takes; tensors are moved to the model's device.
        order: of all but "first", each sample has a backward pass of its own, and batches are split along their first
            dimension.
        loss: `loss(model, batch)` -> (mean loss, a scalar tensor; number of tokens it is a mean of).
        accumulate: where G and F are summed over several batches: "memory", or a folder with room for them.
        progress: called with the number of sequences that are done.

    Memory, beside the model and its activations: one gradient at a time, in the weights' dtype. One batch with
    "first", and any number with "per-sample", need no more. Several batches need the sum of gradients in float32, 4
    bytes for each parameter (8 with "mix"), in main memory or, while it runs, in a file without a name in the folder.
    A weight that is tied has the gradient of one end held until the other's is there.

    While it runs, the model is in evaluation mode: no dropout. At the end, also after an error, modes, requires_grad
    and gradients are as they were. Sums are in float32 and float64. Gradients of float16 weights underflow: load such
    a model in float32 or bfloat16.

    Raises ArgumentError for no batch, a batch without labels or without a token that counts, an unknown order;
    MismatchError for models it is not for; NonFiniteError for NaN or infinity, naming the batch or the weight;
    OutputError if the folder has no room.

    Source: "Superficial Self-Improved Reasoners Benefit from Model Merging" (arXiv 2503.02103), Eq. 2 and 3;
    LLM-Pruner (arXiv 2305.11627).

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0, -1.0]]))
    >>> batches = [torch.tensor([[1.0, 2.0]]), torch.tensor([[-1.0, 0.0]])]
    >>> layer_importance(model, batches, loss=lambda model, x: (model(x).mean(), len(x))).layers
    {'0': 1.0}
    """
    if order not in ORDERS:
        raise ArgumentError(f"order is {shown(repr(order))}; it must be one of {', '.join(ORDERS)}")
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}; give a torch module, such as a loaded model")
    if torch.is_inference_mode_enabled():
        raise ArgumentError(
            "torch.inference_mode is on, in which there are no gradients; call layer_importance outside"
        )
    weights = _weights(model)
    steps = _steps(batches, split=order != "first")
    step = next(steps, None)
    if step is None:
        raise ArgumentError("batches is empty; give at least one batch")
    following = next(steps, None)
    at_once = order == "per-sample" or (order == "first" and following is None)
    sums = {} if at_once else _room(weights, {"first": "G", "second": "F", "mix": "GF"}[order], accumulate)
    found = dict.fromkeys(weights, 0.0)
    state = _Backward()

    def arrived(name: str, weight: nn.Parameter) -> None:
        grad, weight.grad = weight.grad, None
        if name in state.arrived:
            raise MismatchError(
                f"the gradient of '{shown(name)}' comes in parts, as with reentrant checkpointing; switch that off"
            )
        state.arrived.add(name)
        assert grad is not None
        grad = grad.to_dense().detach() if grad.is_sparse else grad.detach()
        if at_once:
            size = sum(float((g * w).abs().sum(dtype=torch.float64)) for _, g, w in _pieces(grad, weight.detach()))
            finite = math.isfinite(size)
            found[name] += state.tokens * size
        else:
            finite = True
            for span, g in _pieces(grad):
                if "G" in sums:
                    sums["G"][name][span].add_(g, alpha=state.tokens)
                if "F" in sums:
                    sums["F"][name][span].addcmul_(g, g)
                finite &= math.isfinite(float(g.sum(dtype=torch.float64)))
        if not finite:
            raise NonFiniteError(
                f"the gradient of '{shown(name)}' for {state.place} holds NaN or infinity, or the weight does;"
                " look at the data there, or load the model in float32"
            )

    sequences, tokens = 0, 0
    losses = []
    with _borrowed(model, weights, arrived):
        while step is not None:
            value = _backward(model, step, loss or _language_loss, state)
            losses.append(value * state.tokens)
            tokens += state.tokens
            sequences += step.sequences
            if progress is not None:
                progress(sequences)
            step, following = following, next(steps, None)
    with torch.no_grad():
        for name, weight in weights.items():
            if at_once:
                found[name] /= tokens
            else:
                mine = {kind: each[name] for kind, each in sums.items()}
                found[name] = _salience(weight.detach(), mine, tokens, sequences)
    sorted_out = _sorted_out(weights, found, state.used)
    return Importance(*sorted_out, order=order, sequences=sequences, tokens=tokens, loss=math.fsum(losses) / tokens)


@dataclass(frozen=True)
class _Step:
    """What one backward pass is of."""

    place: str  # for messages
    batch: Any
    sequences: int


@dataclass
class _Backward:
    """The backward pass that is under way, for the hooks."""

    place: str = ""
    tokens: int = 0
    arrived: set[str] = field(default_factory=set)  # weights whose gradient was there
    used: set[str] = field(default_factory=set)  # the same, of all passes


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's weights by name, each once. Raises MismatchError for those that have no usable gradient."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(weight, []).append(unwrapped(name))
    weights = {tied_key(called): weight for weight, called in names.items()}
    for name, weight in weights.items():
        why = ""
        if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
            why = f"is {weight.dtype}; load the model unquantised, in float32 or bfloat16"
        elif weight.device.type == "meta":
            why = "is on the device 'meta', without values; load the whole model"
        elif weight.is_inference():
            why = "was made in torch.inference_mode; load the model outside of it"
        elif hasattr(weight, "placements"):
            why = "is spread over several processes; load the whole model in one"
        elif getattr(weight, "_post_accumulate_grad_hooks", None):
            why = "has a hook on its gradient, which may change the weight; remove the hook"
        if why:
            raise MismatchError(f"weight '{shown(name)}' {why}")
    if not any(weight_kind(name, weight.shape) == "linear" for name, weight in weights.items()):
        raise MismatchError(
            f"none of the model's {len(weights)} weights is linear and in a layer; names of layers have a number, as"
            " 'model.layers.0.mlp.up_proj.weight'"
        )
    return weights


def _steps(batches: Iterable[Any], *, split: bool) -> Iterator[_Step]:
    for number, batch in enumerate(batches, 1):
        count = _count(batch)
        if not split or count == 1:
            yield _Step(f"batch {number}", batch, count)
            continue
        for at in range(count):
            place = f"sample {at + 1} of batch {number}"
            yield _Step(place, _sample(batch, at, count, place), 1)


def _tensors(batch: Any) -> list[tuple[Any, Tensor]]:
    if isinstance(batch, Tensor):
        return [("", batch)]
    pairs = batch.items() if isinstance(batch, Mapping) else enumerate(batch) if isinstance(batch, list | tuple) else ()
    return [(key, value) for key, value in pairs if isinstance(value, Tensor) and value.ndim]


def _count(batch: Any) -> int:
    """How many sequences a batch has: the first dimension of its labels, or of its first tensor."""
    tensors = _tensors(batch)
    first = next((value for key, value in tensors if key == "labels"), tensors[0][1] if tensors else None)
    return 1 if first is None or not first.ndim else len(first)


def _sample(batch: Any, at: int, count: int, place: str) -> Any:
    def cut(value: Any) -> Any:
        return value[at : at + 1] if isinstance(value, Tensor) and value.ndim else value

    strange = [f"'{shown(key)}' {list(value.shape)}" for key, value in _tensors(batch) if len(value) != count]
    if strange:
        raise ArgumentError(
            f"{place} cannot be cut out: {strange[0]} does not have {count} rows; give batches of one sequence"
        )
    if isinstance(batch, Mapping):
        return {key: cut(value) for key, value in batch.items()}
    return cut(batch) if isinstance(batch, Tensor) else getattr(batch, "_make", type(batch))(map(cut, batch))


def _language_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """The loss of a model of transformers, and how many tokens it is a mean of: the first predicts none of itself."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
        kind = f"has {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"is a {type(batch).__name__}"
        raise ArgumentError(f"a batch {shown(kind)}; it must be a mapping with a tensor 'labels', or give `loss`")
    tokens = int((batch["labels"][..., 1:] != -100).sum())
    if not tokens:
        return torch.zeros(()), 0
    device = next(model.parameters()).device
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    given = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return model(**{**options, **given}).loss, tokens


def _backward(model: nn.Module, step: _Step, loss: Loss, state: _Backward) -> float:
    """One forward and backward pass; returns the mean loss."""
    answer = loss(model, step.batch)
    is_pair = isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], int | float | Tensor)
    if not is_pair or not isinstance(answer[0], Tensor) or answer[0].numel() != 1:
        raise ArgumentError(f"the loss of {step.place} is no pair (scalar tensor, number of tokens)")
    mean, tokens = answer[0].squeeze(), int(answer[1])
    value = float(mean.detach())
    if tokens < 1:
        raise ArgumentError(
            f"{step.place} has no token that counts in the loss (all labels but the first are -100); leave it out"
        )
    if not math.isfinite(value):
        raise NonFiniteError(f"the loss of {step.place} is {value}; look at its data, or load the model in float32")
    if not mean.requires_grad:
        raise ArgumentError(f"the loss of {step.place} has no gradient; compute it from the model, without no_grad")
    state.place, state.tokens = step.place, tokens
    state.arrived.clear()
    mean.backward()  # type: ignore[no-untyped-call]
    state.used |= state.arrived
    return value


@contextmanager
def _borrowed(
    model: nn.Module, weights: Mapping[str, nn.Parameter], arrived: Callable[[str, nn.Parameter], None]
) -> Iterator[None]:
    """The model in evaluation mode, all weights with gradients, which `arrived` takes; as it was at the end."""
    modes = [(module, module.training) for module in model.modules()]
    before = [(weight, weight.requires_grad, weight.grad) for weight in weights.values()]
    hooks = []
    try:
        with torch.enable_grad():
            model.eval()
            for name, weight in weights.items():
                weight.grad = None
                weight.requires_grad_(True)
                hook: Any = weight.register_post_accumulate_grad_hook  # it has no types
                hooks.append(hook(partial(arrived, name)))
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for weight, needed, grad in before:
            weight.grad = None
            weight.requires_grad_(needed)
            weight.grad = grad
        for module, mode in modes:
            module.training = mode


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pieces(first: Tensor, *others: Tensor) -> Iterator[tuple[Any, ...]]:
    """Spans of flat tensors, and the pieces there, in float32 or float64; of one tensor alone, on the CPU."""
    wide = _wide(first.dtype)
    flat = [each.reshape(-1) for each in (first, *others)]
    for begin in range(0, first.numel(), _PIECE):
        span = slice(begin, min(begin + _PIECE, first.numel()))
        yield span, *(each[span].to(device=None if others else "cpu", dtype=wide) for each in flat)


def _room(weights: Mapping[str, nn.Parameter], kinds: str, accumulate: str | Path) -> dict[str, dict[str, Tensor]]:
    """Zeros for the sums of gradients (G) or of their squares (F), flat, by weight."""
    import numpy as np

    sizes = {name: -(-weight.numel() // 2) * 2 * _wide(weight.dtype).itemsize for name, weight in weights.items()}
    total = sum(sizes.values()) * len(kinds)
    try:
        if accumulate == "memory":
            space = np.zeros(total, np.uint8)
        else:
            with tempfile.TemporaryFile(dir=Path(accumulate).expanduser()) as file:  # it has no name, or soon none
                allocate(file.fileno(), total)
                space = np.memmap(file, np.uint8, "r+", shape=(total,))
    except MemoryError as error:
        raise OutputError(
            f"the sums of gradients need {bytes_text(total)} of memory, which are not there; accumulate them in a"
            " folder of a disk"
        ) from error
    except OSError as error:
        raise OutputError(
            f"the sums of gradients need a file of {bytes_text(total)} in {shown(accumulate)}: {error.strerror};"
            " give a folder of a disk that has room"
        ) from error
    sums: dict[str, dict[str, Tensor]] = {}
    begin = 0
    for kind in kinds:
        sums[kind] = {}
        for name, weight in weights.items():
            flat = torch.from_numpy(space[begin : begin + sizes[name]]).view(_wide(weight.dtype))
            sums[kind][name] = flat[: weight.numel()]
            begin += sizes[name]
    return sums


def _salience(weight: Tensor, sums: Mapping[str, Tensor], tokens: int, samples: int) -> float:
    """The sum of |s| over a weight: G is a sum of tokens * gradient, F one of squares."""
    sizes = []
    for span, w in _pieces(weight):
        first = w * (sums["G"][span] / tokens) if "G" in sums else 0.0
        second = w * (sums["F"][span] / samples) * w if "F" in sums else 0.0
        s = first - 0.5 * second if "G" in sums and "F" in sums else first if "G" in sums else second
        assert isinstance(s, Tensor)
        sizes.append(float(s.abs().sum(dtype=torch.float64)))
    return math.fsum(sizes)


def _sorted_out(
    weights: Mapping[str, nn.Parameter], found: Mapping[str, float], used: set[str]
) -> tuple[dict[str, float], dict[str, float], dict[str, dict[str, float]], tuple[str, ...]]:
    """From the sums over each weight to those over layers: layers, outside, modules, unused of `Importance`."""
    layers: dict[str, float] = {}
    modules: dict[str, dict[str, float]] = {}
    outside = dict.fromkeys(_BUCKETS.values(), 0.0)
    stacks_used = {str(layer_key(name)).rpartition(".")[0] for name in used if layer_key(name) is not None}
    unused: dict[str, None] = {}
    for name, weight in weights.items():
        if not math.isfinite(found[name]):
            raise NonFiniteError(f"the importance of '{shown(name)}' is not finite; load the model in float32")
        kind, layer = weight_kind(name, weight.shape), layer_key(name)
        if kind != "linear":
            outside[_BUCKETS[kind]] += found[name]
            continue
        assert layer is not None
        if layer.rpartition(".")[0] not in stacks_used:
            unused[layer.rpartition(".")[0]] = None
            continue
        layers[layer] = layers.get(layer, 0.0) + found[name]
        of_kind = modules.setdefault(blanked(name), {})
        of_kind[layer] = of_kind.get(layer, 0.0) + found[name]
    if not any(layers.values()):
        raise NonFiniteError(
            "the gradients of all linear weights in layers are 0: in float16 they underflow; load the model in float32"
        )
    return layers, outside, modules, tuple(unused)
