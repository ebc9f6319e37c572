"""LoRA adapters as PEFT writes them: what each of their tensors does to a tensor of the model they were trained on."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Computed, Tensor, renamed
from ..checkpoint.parts import leave_out_option
from ..checkpoint.safetensors_file import MERGED, TensorInfo
from ..common.messages import shown
from ..errors import CheckpointError, MismatchError
from ..model.config import says_tied
from ..model.rename import Shape, by_name, mapping_note, ruled
from ..model.tensor_names import (
    is_end,
    is_input_embedding,
    is_output_head,
    only_in,
    outer_bias,
    ready_option,
    unwrapped,
)
from .experts import Layout, cut_experts, fused_shape, single_layout
from .lora_tensor import LowRank, OfExperts, Rescaled, WithRows

# What changes the meaning of the factors, with the reason. Absent, None, false and empty are as if not there.
_REFUSED = {
    "alora_invocation_tokens": "it acts on some tokens only",
    "use_qalora": "it pools its input",
    "use_bdlora": "its factors are block-diagonal",
    "layer_replication": "its layers are not those of the base",
    "velora_config": "it changes how the factors are trained",
    "monteclora_config": "its factors are samples",
    "arrow_config": "it routes between adapters",
    "kasa_config": "its factors have a third between them",
}
_FIRST = "merge it first: peft's `merge_and_unload()`, then `save_pretrained`"
_USES = ("use_rslora", "use_dora")
# Starts that leave the base as it was; others took a part out of it, so that the adapter alone is not the change.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_FACTOR = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.default)?(?:\.(weight|bias))?"
)
_ROWS = ".token_adapter.trainable_tokens_delta"
_WITHOUT_ROWS = re.compile(r"\.token_adapter(?=\.(weight|bias)$)")  # of a module whose vocabulary was resized
Equal = Callable[[Tensor, Tensor], bool]
_KEPT_IN_RECIPE = (
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_dora",
    "trainable_token_indices", "ensure_weight_tying", "target_parameters",
)  # fmt: skip


def settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what the numbers of an adapter depend on. Raises CheckpointError for what is not read, by its name."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{where} is a {shown(kind)} adapter, and only LORA is read; {_FIRST}")
    for name, reason in _REFUSED.items():
        if config.get(name):
            raise CheckpointError(f"{where} has {name}: {reason}, which is not read; {_FIRST}")
    unknown = [key for key, value in config.items() if key.startswith("use_") and value and key not in _USES]
    if unknown:
        raise CheckpointError(f"{where} has {shown(unknown[0])}, which is not known here; {_FIRST}")
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise CheckpointError(
            f"{where} was initialised by {shown(start)}, which changed its base: the adapter alone is not the change;"
            " save it with peft's `path_initial_model_for_weight_conversion`, or merge it first"
        )
    found = {name: config.get(name) for name in _KEPT_IN_RECIPE}
    for name, kinds in (("r", int), ("lora_alpha", (int, float))):
        value = found[name]
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < math.inf:
            raise CheckpointError(f"{where}: its {name} is {shown(value)}, no positive number; save the adapter again")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = found[name] or {}
        if not isinstance(pattern, dict) or not all(map(_is_pattern, pattern, pattern.values())):
            raise CheckpointError(
                f"{where}: its {name} is no mapping of patterns to positive numbers; save the adapter again"
            )
        found[name] = pattern
    targets = found["target_parameters"] or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{where}: its target_parameters is no list of names; save the adapter again")
    try:
        json.dumps(found, allow_nan=False)  # it goes into the recipe
    except ValueError as error:
        raise CheckpointError(
            f"{where}: its adapter_config.json holds infinity or NaN; save the adapter again"
        ) from error
    return {**found, "target_parameters": targets}


def _is_pattern(key: str, value: object) -> bool:
    try:
        re.compile(key)
    except re.error:
        return False
    return isinstance(value, (int, float)) and 0 < value < math.inf


@dataclass
class _Parts:
    """The tensors of an adapter, by what they change and how. Names are the adapter's own."""

    factors: dict[tuple[str, str], dict[str, Tensor]] = field(default_factory=dict)  # module, kind -> A, B, vector
    experts: dict[str, dict[int, dict[str, Tensor]]] = field(default_factory=dict)  # module -> depth -> A, B
    rows: dict[str, Tensor] = field(default_factory=dict)  # module -> trained tokens
    whole: dict[str, Tensor] = field(default_factory=dict)
    copies: list[Tensor] = field(default_factory=list)  # of what the model has


def names_of(adapter: Checkpoint, model: Checkpoint) -> list[str]:
    """Return the names of what an adapter changes, before any rule: the model's as they were in memory."""
    assert adapter.adapter is not None
    adapter = replace(adapter, adapter=settings(adapter.adapter, adapter.label))
    return list(_wanted(_parts(adapter), adapter, model))


def applied(
    adapter: Checkpoint,
    model: Checkpoint,
    equal: Equal,
    rules: Sequence[str] = (),
    taken: Callable[[str], bool] = lambda _: False,
) -> Checkpoint:
    """Return an adapter with its tensors under the names of the model's that they change.

    A pair of factors becomes a `LowRank` (with a magnitude, a `Rescaled`; of experts, an `OfExperts`), trained rows
    become a `WithRows`; a tensor that was trained whole stays as it is. `rules` rename, as `--rename` does. One that is
    `taken`, and trained whole, need not be in the model. Raises
    MismatchError for one that belongs to no tensor of the model, CheckpointError for one that is not understood.
    `equal` compares the values of tensors of the two: PEFT stores an embedding that has factors as it was, beside them.
    """
    assert adapter.adapter is not None
    adapter = replace(adapter, adapter=settings(adapter.adapter, adapter.label))
    parts = _parts(adapter)
    names = _names(parts, adapter, model, rules, taken)
    was = {name: path for path, name in names.items() if path != name}
    notes = (mapping_note(was, adapter.label, model.label),) if was else ()
    adapter = replace(adapter, original_names=was, notes=(*adapter.notes, *notes))
    trained = {names[path]: renamed(tensor, names[path]) for path, tensor in parts.whole.items()}
    computed: dict[str, Computed] = {}

    def put(change: Computed) -> None:
        if change.name in computed:
            raise CheckpointError(f"{adapter.label} changes tensor '{shown(change.name)}' in two ways; {_FIRST}")
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
            file = _file(whole)
            beside = any(part.beside and file in part.files for part in adapter.parts)
            cure = f"; or leave {shown(file)} out: {leave_out_option(file)}" if beside else ""
            raise CheckpointError(f"{adapter.label} changes tensor '{shown(name)}' in two ways; {_FIRST}{cure}")
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


def _parts(adapter: Checkpoint) -> _Parts:
    parts = _Parts()
    for key, tensor in adapter.tensors.items():
        plain = re.sub(r"\.(modules_to_save|original_module)\.", ".", key)
        if plain != key and plain in adapter.tensors:
            parts.copies.append(tensor)
            continue  # of an embedding that was resized and trained, PEFT also stores what it was, and itself again
        path = _unwrapped(key)
        found = _FACTOR.fullmatch(path)
        if found is not None:
            module, factor, part = found.groups()
            which = factor.rpartition("_")[2]
            if _parameters(module, adapter):
                depth = key.split(".").count("base_layer")
                parts.experts.setdefault(module, {}).setdefault(depth, {})[which] = tensor
                continue
            kind = "bias" if part == "bias" else "embedding" if "embedding" in factor else "weight"
            parts.factors.setdefault((module, kind), {})[which] = tensor
        elif path.endswith(_ROWS):
            parts.rows[path.removesuffix(_ROWS)] = tensor
        elif _WITHOUT_ROWS.search(path):
            parts.whole[_WITHOUT_ROWS.sub("", path)] = tensor
        elif "lora_" in path or "token_adapter" in path:
            raise CheckpointError(f"{adapter.label} stores '{shown(key)}', which is not understood; {_FIRST}")
        else:
            if path in parts.whole:
                raise CheckpointError(
                    f"{adapter.label} stores tensor '{shown(path)}' twice, in {shown(_file(parts.whole[path]))} and in"
                    f" {shown(_file(tensor))}; leave one of the files out: {leave_out_option(_file(tensor))}"
                )
            parts.whole[path] = tensor
    return parts


def _file(tensor: Tensor) -> str:
    return tensor.file if isinstance(tensor, TensorInfo) else ""


def _parameters(module: str, adapter: Checkpoint) -> list[str]:
    """Which parameters of a module have factors, that are no weight of a layer."""
    assert adapter.adapter is not None
    targets = (target.rpartition(".") for target in adapter.adapter["target_parameters"])
    # Without a path, as PEFT writes what it was told by the names of modules, it is of the experts.
    of_experts = module.rpartition(".")[2].endswith("experts")
    inside = {n for path, _, n in targets if (f".{module}".endswith(f".{path}") if path else of_experts)}
    return sorted(inside - {"weight", "bias"})


def _wanted(parts: _Parts, adapter: Checkpoint, model: Checkpoint) -> dict[str, Shape]:
    """Every tensor that an adapter changes, by its own name, and its shape where that is certain."""
    assert adapter.adapter is not None
    wanted: dict[str, Shape] = dict.fromkeys((f"{module}.weight" for module in parts.rows), None)
    wanted |= {path: tensor.shape for path, tensor in parts.whole.items()}
    for (module, kind), pair in parts.factors.items():
        straight = {"A", "B"} <= set(pair) and kind == "weight" and not adapter.adapter["fan_in_fan_out"]
        shape = (*pair["B"].shape[:1], *pair["A"].shape[1:]) if straight else None
        wanted[f"{module}.{'bias' if kind == 'bias' else 'weight'}"] = shape
    layout = single_layout(model.tensors)
    for module in parts.experts:
        for parameter in _parameters(module, adapter):
            wanted[_wanted_of(module, parameter, layout)] = None
    return wanted


def _names(
    parts: _Parts, adapter: Checkpoint, model: Checkpoint, rules: Sequence[str], taken: Callable[[str], bool]
) -> dict[str, str]:
    """Return what each name is in the model."""
    wanted = _wanted(parts, adapter, model)
    names = dict(zip(wanted, ruled(wanted, rules), strict=True))
    # The other names of a tied tensor, of which the model need not store all; a head that it does store is that one.
    widths = {t.shape[1:] for n, t in model.tensors.items() if is_input_embedding(n) and says_tied(model.config)}
    lost = {n: path for path, n in names.items() if n not in model.tensors}
    tied = {n for n, path in lost.items() if is_end(n) and ((shape := wanted[path]) is None or shape[1:] in widths)}
    tied = tied if widths else set()
    for name, path in lost.items():  # and of its bias
        outer = model.tensors.get(outer_bias(name))
        if outer is not None and outer.shape == wanted[path] and is_output_head(f"{name.removesuffix('bias')}weight"):
            tied.add(name)
    stored = any(is_output_head(name) for name in model.tensors if name not in names.values())
    there = {name: tensor.shape for name, tensor in model.tensors.items()}
    # Vocabularies of different sizes are not told here.
    sought = {
        n: None if is_end(n) else wanted[path]
        for n, path in lost.items() if stored or n not in tied or not is_output_head(n)
    }  # fmt: skip
    found = by_name(sought, there)
    lost = {n: path for n, path in lost.items() if n in found or n not in tied}
    names |= {lost[name]: new for name, new in found.items()}
    homes = {_unwrapped(name): file for name, file in adapter.homes.items()}
    beside = {file for part in adapter.parts if part.beside or part.folder for file in part.files}
    own = set(lost) - set(found)
    every = {*names, *model.tensors}
    for file in sorted(beside):
        names_of_file = {name for name in own if homes.get(lost[name]) == file}
        surplus = {name for name in names_of_file if not taken(name)}
        complaint = only_in(surplus, model.tensors, f"{adapter.label} ({shown(file)})", model.label)
        if complaint:
            option = ready_option("--take", *sorted(surplus), every=every)
            cure = f"to let them through: {option}; or " if option else ""
            raise MismatchError(f"{complaint}; {cure}leave the file out: {leave_out_option(file)}")
        own -= names_of_file
    whole = {name for name in own if lost[name] in parts.whole}
    surplus = {name for name in own if name not in whole or not taken(name)}
    complaint = only_in(surplus, model.tensors, adapter.label, model.label)
    if complaint:
        option = ready_option("--take", *sorted(surplus), every=every) if surplus <= whole else ""
        cure = f"to let them through: {option}; " if option else ""
        raise MismatchError(
            f"{complaint}; {cure}is this the model that the adapter was trained on? If so, tell --rename"
        )
    twice = next((new for new, count in Counter(names.values()).items() if count > 1), None)
    if twice is not None:
        both = " and ".join(f"'{shown(path)}'" for path, name in names.items() if name == twice)
        raise MismatchError(f"{both} of {adapter.label} would be '{shown(twice)}' of {model.label}; change --rename")
    return names


def _of_experts(
    module: str, pairs: Sequence[Mapping[str, Tensor]], adapter: Checkpoint, model: Checkpoint, names: Mapping[str, str]
) -> list[Computed]:
    """The deltas of a module's parameters: as the model stores them, one tensor or one for each expert.

    Which parameter a pair of factors belongs to, and which way round it is, PEFT does not store: shapes do. If both fit
    (experts without gates), the order tells: pairs are outermost first, and PEFT wraps what is defined first first.
    """
    assert adapter.adapter is not None
    layout = single_layout(model.tensors)
    targets = {}  # parameter -> name and shape as one tensor
    for parameter in _parameters(module, adapter):
        wanted = _wanted_of(module, parameter, layout)
        name = names[wanted]
        targets[parameter] = name, model.tensors[name].shape
        if layout and wanted != f"{module}.{parameter}":  # stored one by one
            path = name.removesuffix(wanted.removeprefix(module))
            targets[parameter] = f"{path}.{parameter}", fused_shape(path, parameter, layout, model.tensors)
    found = []
    for number, pair in enumerate(pairs):
        a, b = pair.get("A"), pair.get("B")
        if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
            raise CheckpointError(f"{adapter.label} has one factor only for '{shown(module)}'; save it again")
        _check_float(a, adapter)
        _check_float(b, adapter)
        fits = []
        for parameter, (name, shape) in targets.items():
            rank, scaling = _scaling(adapter.adapter, f"{module}.{parameter}")
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
    turned = {change.turned for change in found if change.shape[1] != change.shape[2]}
    if len(turned) != 1:  # of a square one shapes do not tell, but of a module all are the same way round
        raise CheckpointError(f"{adapter.label}: which way round '{shown(found[0].name)}' is cannot be told; {_FIRST}")
    found = [replace(change, turned=next(iter(turned))) for change in found]
    parts: list[Computed] = []
    for change in found:
        if change.name in model.tensors or layout is None:
            parts.append(change)
        else:
            parts += [p for _, p, _ in cut_experts("sft", change.name, change, layout) if isinstance(p, Computed)]
    return parts


def _wanted_of(module: str, parameter: str, layout: Layout | None) -> str:
    """The tensor to look for in the model: the parameter itself, or its part in the first expert."""
    ends = (layout or {}).get(parameter)
    return f"{module}.0.{ends[0]}" if ends else f"{module}.{parameter}"


def _with_rows(
    name: str, module: str, rows: Tensor, adapter: Checkpoint, model: Checkpoint, target: Tensor
) -> WithRows:
    assert adapter.adapter is not None
    given = adapter.adapter["trainable_token_indices"]
    if isinstance(given, dict):
        own = next((found for key, found in given.items() if module == key or module.endswith(f".{key}")), None)
        # PEFT stores the same rows for a head that is tied, and names the embedding alone.
        given = own if own is not None or len(given) != 1 else next(iter(given.values()))
    places = tuple(given) if isinstance(given, list) and all(type(place) is int for place in given) else ()
    if rows.shape != (len(places), *target.shape[1:]) or any(not 0 <= place < target.shape[0] for place in places):
        raise _misfit(name, adapter, target, f"{list(rows.shape)} rows for {len(places)} tokens")
    _check_float(target, model)
    _check_float(rows, adapter)
    return WithRows(name, target.shape, target, model.role, rows, places)


def _rescaled(change: LowRank, magnitude: Tensor, adapter: Checkpoint, model: Checkpoint) -> Rescaled:
    target = _target(change.name, model)
    if change.turned:
        raise CheckpointError(
            f"{adapter.label} has DoRA for '{shown(change.name)}', a Conv1D, which is not read; {_FIRST}"
        )
    if change.right is None or magnitude.count != target.shape[0]:
        raise _misfit(change.name, adapter, target, f"a magnitude of shape {list(magnitude.shape)}")
    _check_float(target, model)
    _check_float(magnitude, adapter)
    return Rescaled(change.name, target.shape, change, magnitude, target, model.role)


def _check_float(tensor: Tensor, where: Checkpoint) -> None:
    if tensor.dtype not in ("BF16", "F16", "F32"):
        raise CheckpointError(
            f"{where.label} stores '{shown(tensor.name)}' as {tensor.dtype}; with an adapter, BF16, F16 and F32 are"
            " read: save it again in one of these"
        )


def _unwrapped(key: str) -> str:
    """A tensor's name without what wraps modules, PEFT's own among it."""
    parts = unwrapped(key.removeprefix("base_model.model.")).split(".")
    path = ".".join(part for part in parts if part != "base_layer")
    return path.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")


def _check_tie(trained: Mapping[str, Tensor], adapter: Checkpoint, model: Checkpoint) -> None:
    """Refuse an embedding that was trained apart from a head that is stored nowhere: it would change with it."""
    assert adapter.adapter is not None
    if not says_tied(model.config):
        return
    embedding = next(filter(is_input_embedding, trained), None)
    if embedding is not None and not any(map(is_output_head, {*trained, *model.tensors})):
        raise CheckpointError(
            f"{adapter.label} holds '{shown(embedding)}', trained apart from the head that {model.label} ties to it;"
            f" train both (modules_to_save), or {_FIRST}"
        )


def _target(name: str, model: Checkpoint) -> Tensor:
    """The tensor of a name; of a head that is not stored, as it is tied, the embedding."""
    return model.tensors.get(name) or next(t for n, t in model.tensors.items() if is_input_embedding(n))


def _low_rank(
    name: str, module: str, kind: str, pair: Mapping[str, Tensor], adapter: Checkpoint, target: Tensor
) -> LowRank:
    a, b = pair.get("A"), pair.get("B")
    if {*pair} == {"vector"}:
        raise CheckpointError(
            f"{adapter.label} has DoRA for '{shown(name)}', an embedding, which is not read; {_FIRST}"
        )
    if b is None or (a is None) != (kind == "bias"):
        raise CheckpointError(f"{adapter.label} has one factor only for '{shown(name)}'; save it again")
    for factor in (a, b):
        if factor is not None:
            _check_float(factor, adapter)
    assert adapter.adapter is not None
    rank, scaling = _scaling(adapter.adapter, module)
    if a is None:
        if b.shape != target.shape:
            raise _misfit(name, adapter, target, f"a bias of shape {list(b.shape)}")
        return LowRank(name, b.shape, b, None, scaling)
    fits = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] == rank
    if target.dtype not in MERGED:
        changed = f"tensor '{shown(name)}' is {target.dtype}, quantised, and {adapter.label} changes it"
        raise MismatchError(f"{changed}: give the unquantised model, or, if it is FP8, --dequantize")
    if not fits:
        raise _misfit(name, adapter, target, f"factors {list(b.shape)} and {list(a.shape)}, and rank {rank}")
    straight, turned = (b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])
    # A Conv1D stores its weight transposed; of a square one only the config can tell.
    is_turned = kind == "embedding" or (
        target.shape == turned and (straight != turned or bool(adapter.adapter["fan_in_fan_out"]))
    )
    if target.shape != (turned if is_turned else straight):
        raise _misfit(name, adapter, target, f"a change of shape {list(turned if is_turned else straight)}")
    if is_turned:
        return LowRank(name, target.shape, a, b, scaling, turned=True)
    return LowRank(name, target.shape, b, a, scaling)


def _misfit(name: str, adapter: Checkpoint, target: Tensor, what: str) -> MismatchError:
    return MismatchError(
        f"tensor '{shown(name)}' is {target.dtype} {list(target.shape)}, and {adapter.label} has {what} for it;"
        " is this the model that the adapter was trained on?"
    )


def _scaling(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank and scaling of a module: the first pattern that its name ends with, else the adapter's own."""

    def chosen(pattern: Mapping[str, Any], default: Any) -> Any:
        return next((v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)

    rank = chosen(config["rank_pattern"], config["r"])
    alpha = chosen(config["alpha_pattern"], config["lora_alpha"])
    return rank, alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank
