"""Importance of each layer to a loss: sums of |gradient * weight|, in little memory, with the model left unchanged.

Gradients are handled one at a time: a hook gets each as soon as autograd has accumulated it, uses it, and frees it.
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
_PIECE = 1 << 22  # elements converted to float32 at a time, to avoid copies of whole gradients
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
    """Measure how much each layer matters to a model's loss on some data.

        I_n = sum of |s| over all linear weights W of layer n,  and s is, by `order`,
        "first"        G * W                                                            (Eq. 2', 3)
        "second"       W * F * W,              F = mean over samples of g_j^2
        "mix"          G * W - W * F * W / 2
        "per-sample"   I_n = sum over samples of (tokens_j / tokens) * sum of |g_j * W|: not Eq. 3

    G is the gradient of the mean loss over all tokens of the data, g_j that of the mean loss of sample j. Gradients are
    summed over the data before the absolute value is taken, so contributions of opposite sign cancel. "per-sample"
    takes it first, and so is never smaller than "first". "second" and "mix" follow LLM-Pruner's code: F has no factor
    1/2, and is a mean where Eq. 2 has a sum over samples.

    `weight_kind` decides which weights are linear. Frozen weights count too, and tied weights count once. All other
    weights are summed in `Importance.outside`.

    Args:
        model: a causal language model of transformers, or any module with a `loss`; float weights, on any device.
        batches: any iterable, read once. For the default loss: mappings with `input_ids`, `labels` (-100 does not
            count) and any other inputs of the model; tensors are moved to the model's device.
        order: all but "first" split batches along the first dimension, for one backward pass per sample.
        loss: `loss(model, batch)` -> (mean loss, a scalar tensor; the number of tokens in the mean).
        accumulate: where to sum G and F over several batches: "memory", or a folder with enough space.
        progress: called with the number of sequences done.

    Memory beyond the model and its activations: one gradient at a time, in the weights' dtype. This is all for
    "per-sample", and for "first" with one batch. Otherwise sums of gradients in float32 take 4 bytes per parameter
    ("mix": 8), in memory or in an unnamed temporary file in the folder. For a tied weight, autograd holds the first
    gradient until the second exists.

    The model runs in evaluation mode, without dropout. Afterwards, also after an error, its modes, requires_grad and
    gradients are restored. Sums are in float32 and float64. Gradients of float16 weights underflow: load the model in
    float32 or bfloat16.

    Raises ArgumentError for no batches, a batch without labels or without a token that counts, or an unknown order;
    MismatchError for unsuitable models; NonFiniteError for NaN or infinity, naming the batch or the weight; OutputError
    if memory or disk space runs out.

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
        raise ArgumentError("torch.inference_mode is on, which disables gradients; call layer_importance outside of it")
    weights = _weights(model)
    steps = _steps(batches, split=order != "first")
    step = next(steps, None)
    if step is None:
        raise ArgumentError("batches is empty; give at least one batch")
    following = next(steps, None)
    at_once = order == "per-sample" or (order == "first" and following is None)
    sums = {} if at_once else _allocate_sums(weights, {"first": "G", "second": "F", "mix": "GF"}[order], accumulate)
    found = dict.fromkeys(weights, 0.0)
    state = _Backward()

    def arrived(name: str, weight: nn.Parameter) -> None:
        grad, weight.grad = weight.grad, None
        if name in state.arrived:
            raise MismatchError(
                f"the gradient of '{shown(name)}' arrives in parts, as with reentrant checkpointing; turn that off"
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
                " check the data there, or load the model in float32"
            )

    sequences, tokens = 0, 0
    losses = []
    with _prepared(model, weights, arrived):
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
    sorted_out = _by_layer(weights, found, state.used)
    return Importance(*sorted_out, order=order, sequences=sequences, tokens=tokens, loss=math.fsum(losses) / tokens)


@dataclass(frozen=True)
class _Step:
    """The input of one backward pass."""

    place: str  # for messages
    batch: Any
    sequences: int


@dataclass
class _Backward:
    """The current backward pass, as the hooks see it."""

    place: str = ""
    tokens: int = 0
    arrived: set[str] = field(default_factory=set)  # weights with a gradient in this pass
    used: set[str] = field(default_factory=set)  # weights with a gradient in any pass


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's weights by name, tied ones once. Raises MismatchError for weights without a usable gradient."""
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
            why = "was created in torch.inference_mode; load the model outside of it"
        elif hasattr(weight, "placements"):
            why = "is sharded over several processes; load the whole model in one"
        elif getattr(weight, "_post_accumulate_grad_hooks", None):
            why = "has a hook on its gradient, which may change the weight; remove the hook"
        if why:
            raise MismatchError(f"weight '{shown(name)}' {why}")
    if not any(weight_kind(name, weight.shape) == "linear" for name, weight in weights.items()):
        raise MismatchError(
            f"none of the model's {len(weights)} weights is linear and in a layer; names in layers have a number, as in"
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
    """Number of sequences in a batch: the first dimension of its labels, or of its first tensor."""
    tensors = _tensors(batch)
    first = next((value for key, value in tensors if key == "labels"), tensors[0][1] if tensors else None)
    return 1 if first is None or not first.ndim else len(first)


def _sample(batch: Any, at: int, count: int, place: str) -> Any:
    def cut(value: Any) -> Any:
        return value[at : at + 1] if isinstance(value, Tensor) and value.ndim else value

    strange = [f"'{shown(key)}' {list(value.shape)}" for key, value in _tensors(batch) if len(value) != count]
    if strange:
        raise ArgumentError(
            f"{place} cannot be separated: {strange[0]} does not have {count} rows; give batches of one sequence"
        )
    if isinstance(batch, Mapping):
        return {key: cut(value) for key, value in batch.items()}
    return cut(batch) if isinstance(batch, Tensor) else getattr(batch, "_make", type(batch))(map(cut, batch))


def _language_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """The mean loss of a transformers model, and its number of tokens: labels from the second on, except -100."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
        kind = f"has {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"is a {type(batch).__name__}"
        raise ArgumentError(f"a batch {shown(kind)}; give mappings with a tensor 'labels', or a `loss`")
    tokens = int((batch["labels"][..., 1:] != -100).sum())
    if not tokens:
        return torch.zeros(()), 0
    device = next(model.parameters()).device
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    given = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return model(**{**options, **given}).loss, tokens


def _backward(model: nn.Module, step: _Step, loss: Loss, state: _Backward) -> float:
    """Run one forward and backward pass; returns the mean loss."""
    answer = loss(model, step.batch)
    is_pair = isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], int | float | Tensor)
    if not is_pair or not isinstance(answer[0], Tensor) or answer[0].numel() != 1:
        raise ArgumentError(f"the loss of {step.place} is not a pair; return (scalar tensor, number of tokens)")
    mean, tokens = answer[0].squeeze(), int(answer[1])
    value = float(mean.detach())
    if tokens < 1:
        raise ArgumentError(
            f"{step.place} has no token that counts in the loss (all labels but the first are -100); leave it out"
        )
    if not math.isfinite(value):
        raise NonFiniteError(f"the loss of {step.place} is {value}; check its data, or load the model in float32")
    if not mean.requires_grad:
        raise ArgumentError(f"the loss of {step.place} has no gradient; compute it from the model, without no_grad")
    state.place, state.tokens = step.place, tokens
    state.arrived.clear()
    mean.backward()  # type: ignore[no-untyped-call]
    state.used |= state.arrived
    return value


@contextmanager
def _prepared(
    model: nn.Module, weights: Mapping[str, nn.Parameter], arrived: Callable[[str, nn.Parameter], None]
) -> Iterator[None]:
    """Put the model in evaluation mode and pass each weight's gradient to `arrived`; restore everything at the end."""
    modes = [(module, module.training) for module in model.modules()]
    before = [(weight, weight.requires_grad, weight.grad) for weight in weights.values()]
    hooks = []
    try:
        with torch.enable_grad():
            model.eval()
            for name, weight in weights.items():
                weight.grad = None
                weight.requires_grad_(True)
                hook: Any = weight.register_post_accumulate_grad_hook  # untyped in torch
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
    """Yield (span, pieces of the flat tensors there), in float32 or float64; a single tensor is moved to the CPU."""
    wide = _wide(first.dtype)
    flat = [each.reshape(-1) for each in (first, *others)]
    for begin in range(0, first.numel(), _PIECE):
        span = slice(begin, min(begin + _PIECE, first.numel()))
        yield span, *(each[span].to(device=None if others else "cpu", dtype=wide) for each in flat)


def _allocate_sums(
    weights: Mapping[str, nn.Parameter], kinds: str, accumulate: str | Path
) -> dict[str, dict[str, Tensor]]:
    """Zeros for sums of gradients (G) or of their squares (F): kind -> weight name -> flat tensor."""
    import numpy as np

    sizes = {name: -(-weight.numel() // 2) * 2 * _wide(weight.dtype).itemsize for name, weight in weights.items()}
    total = sum(sizes.values()) * len(kinds)
    try:
        if accumulate == "memory":
            space = np.zeros(total, np.uint8)
        else:
            with tempfile.TemporaryFile(dir=Path(accumulate).expanduser()) as file:  # unnamed; the map keeps it alive
                allocate(file.fileno(), total)
                space = np.memmap(file, np.uint8, "r+", shape=(total,))
    except MemoryError as error:
        raise OutputError(
            f"the sums of gradients need {bytes_text(total)} of memory, which is not available; accumulate them in a"
            " folder on disk"
        ) from error
    except OSError as error:
        raise OutputError(
            f"the sums of gradients need a file of {bytes_text(total)} in {shown(accumulate)}: {error.strerror};"
            " give a folder on a disk with enough space"
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
    """The sum of |s| over a weight; `sums` holds G as a sum of tokens * gradient, F as a sum of squares."""
    sizes = []
    for span, w in _pieces(weight):
        first = w * (sums["G"][span] / tokens) if "G" in sums else 0.0
        second = w * (sums["F"][span] / samples) * w if "F" in sums else 0.0
        s = first - 0.5 * second if "G" in sums and "F" in sums else first if "G" in sums else second
        assert isinstance(s, Tensor)
        sizes.append(float(s.abs().sum(dtype=torch.float64)))
    return math.fsum(sizes)


def _by_layer(
    weights: Mapping[str, nn.Parameter], found: Mapping[str, float], used: set[str]
) -> tuple[dict[str, float], dict[str, float], dict[str, dict[str, float]], tuple[str, ...]]:
    """Sum weights into the fields of `Importance`: layers, outside, modules, unused."""
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
            "the gradients of all linear weights in layers are 0, as when float16 underflows; load the model in float32"
        )
    return layers, outside, modules, tuple(unused)
