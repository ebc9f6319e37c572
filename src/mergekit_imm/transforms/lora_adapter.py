"""LoRA adapters as PEFT writes them: the change that an adapter makes to each tensor of its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Computed, Tensor, renamed
from ..checkpoint.model_files import leave_out_option
from ..checkpoint.safetensors_file import TensorInfo
from ..common.messages import shown
from ..errors import CheckpointError, MismatchError
from ..model.config import says_tied
from ..model.rename_rules import mapping_note
from ..model.tensor_names import is_input_embedding, is_output_head
from ..numerics.dtypes import MERGED
from .experts import fused_shape, single_layout, split_experts
from .lora_config import MERGE_FIRST, read_settings, scaling_of
from .lora_names import match_to_model, name_in_model
from .lora_parts import file_of, parameters_of, sort_parts
from .lora_tensor import LowRank, OfExperts, Rescaled, WithRows

Equal = Callable[[Tensor, Tensor], bool]


def applied(
    adapter: Checkpoint,
    model: Checkpoint,
    equal: Equal,
    rules: Sequence[str] = (),
    taken: Callable[[str], bool] = lambda _: False,
) -> Checkpoint:
    """Return an adapter with its changes as tensors, under the model's names.

    A pair of factors becomes a `LowRank` (`Rescaled` with a magnitude, `OfExperts` for experts), trained rows a
    `WithRows`; a tensor trained whole is unchanged. `rules` rename as `--rename` does. A tensor that was trained whole
    and is `taken` need not be in the model. `equal` compares a tensor of the adapter with one of the model: PEFT stores
    the original embedding beside its factors. Raises MismatchError if a tensor does not belong to the model,
    CheckpointError for one that is not supported.
    """
    assert adapter.adapter is not None
    adapter = replace(adapter, adapter=read_settings(adapter.adapter, adapter.label))
    parts = sort_parts(adapter)
    names = match_to_model(parts, adapter, model, rules, taken)
    original_names = {name: path for path, name in names.items() if path != name}
    notes = (mapping_note(original_names, adapter.label, model.label),) if original_names else ()
    adapter = replace(adapter, original_names=original_names, notes=(*adapter.notes, *notes))
    trained = {names[path]: renamed(tensor, names[path]) for path, tensor in parts.whole.items()}
    computed: dict[str, Computed] = {}

    def put(change: Computed) -> None:
        if change.name in computed:
            raise CheckpointError(f"{adapter.label} changes tensor '{shown(change.name)}' in two ways; {MERGE_FIRST}")
        computed[change.name] = change

    for module, rows in parts.rows.items():
        name = names[f"{module}.weight"]
        whole = trained.pop(name, None)
        origin, target = (model, _target(name, model)) if whole is None else (adapter, whole)
        put(_with_rows(name, module, rows, adapter, origin, target))
    for (module, kind), pair in parts.factors.items():
        name = names[f"{module}.{'bias' if kind == 'bias' else 'weight'}"]
        whole = trained.pop(name, None)
        target = _target(name, model)
        if whole is not None and not equal(whole, target):
            file = file_of(whole)
            beside = any(part.beside and file in part.files for part in adapter.parts)
            cure = f"; or leave {shown(file)} out: {leave_out_option(file)}" if beside else ""
            raise CheckpointError(f"{adapter.label} changes tensor '{shown(name)}' in two ways; {MERGE_FIRST}{cure}")
        parts.copies += [whole] if whole is not None else []
        delta = _low_rank(name, module, kind, pair, adapter, target)
        put(_rescaled(delta, pair["vector"], adapter, model) if "vector" in pair else delta)
    for module, pairs in parts.experts.items():
        for change in _of_experts(module, [pairs[depth] for depth in sorted(pairs)], adapter, model, names):
            put(change)
    _check_tie(trained, adapter, model)
    if not trained and not computed:
        raise CheckpointError(f"{adapter.label} holds no tensor; save it again")
    unread = (*adapter.unread, *(copy for copy in parts.copies if isinstance(copy, TensorInfo)))
    return replace(adapter, tensors={**trained, **computed}, unread=unread)


def _of_experts(
    module: str, pairs: Sequence[Mapping[str, Tensor]], adapter: Checkpoint, model: Checkpoint, names: Mapping[str, str]
) -> list[Computed]:
    """Return the deltas of a module of experts as the model stores them: fused, or one for each expert.

    PEFT does not store which parameter a pair of factors belongs to, nor its orientation: the shapes decide. If both
    parameters fit (experts without gates), order decides: pairs are outermost first, and PEFT wraps in order of
    definition.
    """
    assert adapter.adapter is not None
    layout = single_layout(model.tensors)
    targets = {}  # parameter -> name and shape as one tensor
    for parameter in parameters_of(module, adapter):
        wanted = name_in_model(module, parameter, layout)
        name = names[wanted]
        targets[parameter] = name, model.tensors[name].shape
        if layout and wanted != f"{module}.{parameter}":  # the model stores single experts
            path = name.removesuffix(wanted.removeprefix(module))
            targets[parameter] = f"{path}.{parameter}", fused_shape(path, parameter, layout, model.tensors)
    found = []
    for number, pair in enumerate(pairs):
        a, b = pair.get("A"), pair.get("B")
        if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
            raise CheckpointError(f"{adapter.label} has only one factor for '{shown(module)}'; save it again")
        _check_float(a, adapter)
        _check_float(b, adapter)
        fits = []
        for parameter, (name, shape) in targets.items():
            rank, scaling = scaling_of(adapter.adapter, f"{module}.{parameter}")
            sizes = {(b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])}
            if len(shape) == 3 and shape[1:] in sizes and a.shape[0] == b.shape[1] == shape[0] * rank:
                fits.append(OfExperts(name, shape, a, b, scaling, shape[1:] != (b.shape[0], a.shape[1])))
        if len(fits) == len(pairs) == 2 and {*targets} == {"down_proj", "up_proj"}:
            fits = [each for each in fits if each.name == targets[("down_proj", "up_proj")[number]][0]]
        if len(fits) != 1:
            raise MismatchError(
                f"{adapter.label} has factors {list(b.shape)} and {list(a.shape)} for '{shown(module)}', which fit"
                f" {len(fits)} of {', '.join(f'{shown(n)} {list(shape)}' for n, shape in targets.values())}; is this"
                " the model that the adapter was trained on?"
            )
        found += fits
    # A square parameter leaves its orientation open, but all parameters of a module share one.
    orientations = {change.is_transposed for change in found if change.shape[1] != change.shape[2]}
    if len(orientations) != 1:
        raise CheckpointError(
            f"{adapter.label}: the orientation of '{shown(found[0].name)}' is unknown, as it is square; {MERGE_FIRST}"
        )
    found = [replace(change, is_transposed=next(iter(orientations))) for change in found]
    parts: list[Computed] = []
    for change in found:
        if change.name in model.tensors or layout is None:
            parts.append(change)
        else:
            parts += [p for _, p, _ in split_experts("sft", change.name, change, layout) if isinstance(p, Computed)]
    return parts


def _with_rows(
    name: str, module: str, rows: Tensor, adapter: Checkpoint, model: Checkpoint, target: Tensor
) -> WithRows:
    assert adapter.adapter is not None
    given = adapter.adapter["trainable_token_indices"]
    if isinstance(given, dict):
        own = next((found for key, found in given.items() if module == key or module.endswith(f".{key}")), None)
        # PEFT stores the same rows for a tied head, but lists the embedding only.
        given = own if own is not None or len(given) != 1 else next(iter(given.values()))
    places = tuple(given) if isinstance(given, list) and all(type(place) is int for place in given) else ()
    if rows.shape != (len(places), *target.shape[1:]) or any(not 0 <= place < target.shape[0] for place in places):
        raise _misfit(name, adapter, target, f"{list(rows.shape)} rows for {len(places)} tokens")
    _check_float(target, model)
    _check_float(rows, adapter)
    return WithRows(name, target.shape, target, model.role, rows, places)


def _rescaled(change: LowRank, magnitude: Tensor, adapter: Checkpoint, model: Checkpoint) -> Rescaled:
    target = _target(change.name, model)
    if change.is_transposed:
        raise CheckpointError(
            f"{adapter.label} has DoRA for '{shown(change.name)}', a Conv1D, which is not supported; {MERGE_FIRST}"
        )
    if change.right is None or magnitude.count != target.shape[0]:
        raise _misfit(change.name, adapter, target, f"a magnitude of shape {list(magnitude.shape)}")
    _check_float(target, model)
    _check_float(magnitude, adapter)
    return Rescaled(change.name, target.shape, change, magnitude, target, model.role)


def _check_float(tensor: Tensor, where: Checkpoint) -> None:
    if tensor.dtype not in ("BF16", "F16", "F32"):
        raise CheckpointError(
            f"{where.label} stores '{shown(tensor.name)}' as {tensor.dtype}; with an adapter only BF16, F16 and F32 are"
            " supported: save it again in one of these"
        )


def _check_tie(trained: Mapping[str, Tensor], adapter: Checkpoint, model: Checkpoint) -> None:
    """Refuse an embedding trained apart from a tied head that no file stores: the head would change with it."""
    assert adapter.adapter is not None
    if not says_tied(model.config):
        return
    embedding = next(filter(is_input_embedding, trained), None)
    if embedding is not None and not any(map(is_output_head, {*trained, *model.tensors})):
        raise CheckpointError(
            f"{adapter.label} holds '{shown(embedding)}', trained apart from the head that {model.label} ties to it;"
            f" train both (modules_to_save), or {MERGE_FIRST}"
        )


def _target(name: str, model: Checkpoint) -> Tensor:
    """Return a tensor of the model; for a tied head that is not stored, the embedding."""
    return model.tensors.get(name) or next(t for n, t in model.tensors.items() if is_input_embedding(n))


def _low_rank(
    name: str, module: str, kind: str, pair: Mapping[str, Tensor], adapter: Checkpoint, target: Tensor
) -> LowRank:
    a, b = pair.get("A"), pair.get("B")
    if {*pair} == {"vector"}:
        raise CheckpointError(
            f"{adapter.label} has DoRA for '{shown(name)}', an embedding, which is not supported; {MERGE_FIRST}"
        )
    if b is None or (a is None) != (kind == "bias"):
        raise CheckpointError(f"{adapter.label} has only one factor for '{shown(name)}'; save it again")
    for factor in (a, b):
        if factor is not None:
            _check_float(factor, adapter)
    assert adapter.adapter is not None
    rank, scaling = scaling_of(adapter.adapter, module)
    if a is None:
        if b.shape != target.shape:
            raise _misfit(name, adapter, target, f"a bias of shape {list(b.shape)}")
        return LowRank(name, b.shape, b, None, scaling)
    fits = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] == rank
    if target.dtype not in MERGED:
        raise MismatchError(
            f"{adapter.label} changes tensor '{shown(name)}', which is quantised, {target.dtype}: give the unquantised"
            " model or, if it is FP8, --dequantize"
        )
    if not fits:
        raise _misfit(name, adapter, target, f"factors {list(b.shape)} and {list(a.shape)}, and rank {rank}")
    plain, transposed = (b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])
    # A Conv1D stores its weight transposed; if it is square only the config can tell.
    is_transposed = kind == "embedding" or (
        target.shape == transposed and (plain != transposed or bool(adapter.adapter["fan_in_fan_out"]))
    )
    if target.shape != (transposed if is_transposed else plain):
        raise _misfit(name, adapter, target, f"a change of shape {list(transposed if is_transposed else plain)}")
    if is_transposed:
        return LowRank(name, target.shape, a, b, scaling, is_transposed=True)
    return LowRank(name, target.shape, b, a, scaling)


def _misfit(name: str, adapter: Checkpoint, target: Tensor, what: str) -> MismatchError:
    return MismatchError(
        f"tensor '{shown(name)}' is {target.dtype} {list(target.shape)}, but {adapter.label} has {what} for it;"
        " is this the model that the adapter was trained on?"
    )
