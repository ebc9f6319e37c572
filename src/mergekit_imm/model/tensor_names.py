"""Tensor names: the layer and kind of a tensor, tied embeddings, and patterns that match given names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from os.path import commonprefix

from ..common.messages import shown
from ..errors import ArgumentError

# Input embeddings and output heads, which `tie_word_embeddings` makes one tensor, by the last components of their names
# in today's architectures. A name missing here is handled as an ordinary tensor.
_INPUT_EMBEDDINGS = tuple(
    f"{module}.weight"
    for module in (
        "embed_tokens tokens_embed wte word_embedding word_embeddings tok_embeddings embed_in embeddings embedding"
        " shared"
    ).split()
)
_OUTPUT_HEADS = tuple(
    f"{module}.weight"
    for module in (
        "lm_head generator_lm_head lm_loss embed_out output output_layer output_projection proj_out vocab_projector"
        " pred_layer.proj lm_head.out_proj predictions.decoder lm_head.decoder mlm_score.decoder head.decoder"
    ).split()
)
_DECODER = "decoder.weight"  # a head if it is a module of the model itself

# Kinds of tensors by the name of module or parameter; `weight_kind` tries them in its own order.
_SCALE = re.compile(r"(^|_)(scale|scales|scale_inv|zeros|qzeros|g_idx)$|^(A_log|inv_freq)$")  # of other forms, of scans
_BIAS = re.compile(r"(^|_)bias(_|$)")
_NORM = re.compile(r"norm|^ln(_|\d|$)|_ln$", re.IGNORECASE)
_EMBEDDING = re.compile(r"(^|_)(embed|embeddings?|wte|wpe)$|^embed_|^relative_attention_bias$")
_CONVOLUTION = re.compile(r"(^|_)conv(\d|_|$)|(^|_)conv[12]d$")
_GENERIC = ("weight", "gamma", "beta")  # parameter names that tell nothing, unlike their module's name

# Characters of a pattern: up to the first, list kinds of names one by one; beyond the second, advise no pattern.
_READABLE, _LONGEST = 160, 2000

_LAYER = re.compile(r"(?:[^.]*\.)*?[0-9]+(?![^.])")
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def layer_key(name: str) -> str | None:
    """Return the layer of a tensor: its name up to and including the first purely numeric component.

    >>> layer_key("model.layers.3.mlp.experts.7.up_proj.weight")
    'model.layers.3'
    >>> layer_key("model.embed_tokens.weight") is None
    True
    """
    found = _LAYER.match(name)
    return found[0] if found else None


def folder_of(name: str) -> str:
    """Return the folder of a tensor's part of the model, with its slash; "" at the top.

    >>> folder_of("2_Dense/linear.weight"), folder_of("lm_head.weight")
    ('2_Dense/', '')
    """
    return name[: name.rfind("/") + 1]


def weight_kind(name: str, shape: Sequence[int]) -> str:
    """Return the kind of a tensor, by its name and shape, in a file or a live model.

    One of "linear" (a weight matrix of a layer, or a stack of them such as fused experts: the W of Eq. 2 to 4),
    "embedding", "head", "norm", "bias" (also of norms), "other" (convolutions, scales, vectors, and matrices outside
    the layers such as image projectors). The paper says "the linear weight matrix" without a rule; this one is ours: it
    knows the names in use, and calls every other matrix of a layer linear.

    Source: "Superficial Self-Improved Reasoners Benefit from Model Merging" (arXiv 2503.02103), Eq. 2 to 4.

    >>> weight_kind("model.layers.0.mlp.up_proj.weight", (64, 32)), weight_kind("lm_head.weight", (96, 32))
    ('linear', 'head')
    >>> weight_kind("model.layers.0.mlp.experts.down_proj", (4, 32, 16))
    'linear'
    """
    parts = unwrapped(name).split(".")
    module = parts[-2] if len(parts) > 1 and parts[-1] in _GENERIC else parts[-1]
    in_layer = layer_key(name) is not None
    if len(shape) > 3 or _SCALE.search(parts[-1]):
        return "other"
    if (is_output_head(name) and (not in_layer or module == "lm_head")) or parts[-3:-1] == ["shared_head", "head"]:
        return "head"
    if _EMBEDDING.search(module) or (is_input_embedding(name) and not in_layer):
        return "embedding"
    if _BIAS.search(parts[-1]):
        return "bias"
    if _NORM.search(module):
        return "norm"
    is_matrix = len(shape) == 2 or (len(shape) == 3 and sum(size > 1 for size in shape) > 1)
    if in_layer and is_matrix and not _CONVOLUTION.search(module):
        return "linear"
    return "other"


def blanked(name: str) -> str:
    """Return a name with * for each number: the name of a kind of tensors.

    >>> blanked("model.layers.3.mlp.up_proj.weight")
    'model.layers.*.mlp.up_proj.weight'
    """
    return ".".join(["*" if part.isdigit() else part for part in name.split(".")])


def stacks(names: Iterable[str]) -> dict[str, set[str]]:
    """Return the stacks of layers among tensor names: prefix -> layer keys.

    >>> stacks(["h.0.w", "h.1.w", "wte.weight"]) == {"h": {"h.0", "h.1"}}
    True
    """
    found: dict[str, set[str]] = {}
    for name in names:
        key = layer_key(name)
        if key is not None:
            found.setdefault(key.rpartition(".")[0], set()).add(key)
    return found


def layer_order(key: str) -> tuple[str, int]:
    """Return the sort key of a layer key: its stack, then its number."""
    return key.rpartition(".")[0], int(key.rpartition(".")[2])


def loading_order(name: str) -> tuple[int, str, int]:
    """Return the sort key of a tensor where models are loaded layer by layer: embeddings, layers, the rest.

    >>> names = ["lm_head.weight", "h.10.w", "h.2.w", "wte.weight", "embeddings.norm.weight"]
    >>> sorted(names, key=loading_order)
    ['wte.weight', 'embeddings.norm.weight', 'h.2.w', 'h.10.w', 'lm_head.weight']
    """
    key = layer_key(name)
    if key is not None:
        return (1, *layer_order(key))
    is_embedding = is_input_embedding(name) or any(map(_EMBEDDING.search, unwrapped(name).split(".")))
    return (0 if is_embedding and not is_output_head(name) else 2, "", 0)


def thirds(layers: Sequence[str]) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    """Return the early, the middle and the late layers: third t of N are floor(t N / 3) to floor((t + 1) N / 3) - 1.

    >>> [len(third) for third in thirds([f"h.{n}" for n in range(8)])]
    [2, 3, 3]
    """
    first, second = len(layers) // 3, 2 * len(layers) // 3
    return layers[:first], layers[first:second], layers[second:]


def resolve_layers(values: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Check values per layer against a model's tensor names, and return them by full layer keys.

    Keys are layer keys (`model.layers.3`), or plain indices (`3`) if the model has one stack of layers. A stack must be
    complete if any of its layers is given. Raises ArgumentError, which lists missing or unknown layers.
    """
    there = stacks(names)
    if values and all(key.isascii() and key.isdigit() for key in values):
        if len(there) != 1:
            raise ArgumentError(
                f"layers are given as plain indices, but the model has {len(there)} stacks of layers"
                f" ({', '.join(map(shown, sorted(there))) or 'none'}); use full keys such as 'model.layers.0'"
            )
        prefix = next(iter(there))
        values = {f"{prefix}.{key}" if prefix else key: value for key, value in values.items()}
    known = set().union(*there.values())
    unknown = sorted(set(values) - known)
    if unknown:
        raise ArgumentError(
            f"no tensor of the model lies in layer '{shown(unknown[0])}' ({len(unknown)} such keys);"
            f" its layers are {_abbreviated(known)}"
        )
    for prefix in {key.rpartition(".")[0] for key in values}:
        missing = there[prefix] - set(values)
        if missing:
            raise ArgumentError(
                f"layers {shown(prefix)}.* are given for {len(there[prefix]) - len(missing)} of"
                f" {len(there[prefix])}: missing {_abbreviated(missing)}; name every layer of a stack or none"
            )
    return dict(values)


def is_input_embedding(name: str) -> bool:
    """Whether a name is that of an input embedding, which names a tied tensor."""
    return _is_of(name, _INPUT_EMBEDDINGS)


def is_output_head(name: str) -> bool:
    """Whether a name is that of an output head, which `tie_word_embeddings` may tie to the embedding."""
    return _is_of(name, _OUTPUT_HEADS) or name == _DECODER or name.endswith(f"/{_DECODER}")


def _is_of(name: str, ends: tuple[str, ...]) -> bool:
    """Whether a name is one of these, or ends in one as its last components."""
    if not name.endswith(ends):  # nearly always
        return False
    return any(name == end or name.endswith((f".{end}", f"/{end}")) for end in ends)


def unwrapped(name: str) -> str:
    """Return a tensor's name without the components of wrappers: FSDP, torch.compile, checkpointing, DDP.

    >>> unwrapped("module.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    parts = name.removeprefix("module.").split(".")
    return ".".join(part for part in parts if part not in _WRAPPERS)


def outer_bias(name: str) -> str:
    """Return the other name of a head's bias in encoders that store it under two; "" for any other name.

    >>> outer_bias("cls.predictions.decoder.bias")
    'cls.predictions.bias'
    """
    module = name.removesuffix(".bias").rpartition(".")[0]
    return f"{module}.bias" if name.endswith(".bias") and module else ""


def is_embedding_or_head(name: str) -> bool:
    """Whether a name is that of an input embedding or output head, which have one row per token."""
    return is_input_embedding(name) or is_output_head(name)


def tied_key(names: Iterable[str]) -> str:
    """Return the name that keys the mask of a tied tensor: the input embedding's, else the first.

    >>> tied_key(["lm_head.weight", "model.embed_tokens.weight"])
    'model.embed_tokens.weight'
    """
    ordered = sorted(names)
    return next((name for name in ordered if is_input_embedding(name)), ordered[0])


def only_in(one: Iterable[str], other: Iterable[str], one_label: str, other_label: str) -> str | None:
    """Return one line on the names that `one` has and `other` lacks, by kind, with the closest names; None if none."""
    others = set(other)
    surplus = set(one) - others
    if not surplus:
        return None
    kinds = by_kind(surplus)
    free = set(map(blanked, others)) | others if len(others) <= 20_000 else set()
    listed = []
    for kind, names in list(kinds.items())[:3]:
        known = names[0] if len(names) == 1 else kind
        there = kind in free and len(kinds) > 1  # the kind exists there: `one` has more layers
        close = [
            each for each in get_close_matches(known, sorted(free), n=2, cutoff=0.8) if each != kind and not there
        ][:1]
        count = f" ({len(names)})" if len(names) > 1 else ""
        listed.append(f"'{shown(known)}'{count}" + (f" (closest there: '{shown(close[0])}')" if close else ""))
    more = f" and {len(kinds) - 3} more kinds" if len(kinds) > 3 else ""
    count_of = "1 tensor is" if len(surplus) == 1 else f"{len(surplus)} tensors are"
    return f"{count_of} in {one_label} only, not in {other_label}: {', '.join(listed)}{more}"


def matcher(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """Return a function that tells whether any of the patterns is found in a name."""
    if not patterns:
        return lambda _: False  # asked for each tensor: quick
    compiled = [re.compile(pattern) for pattern in patterns]
    return lambda name: any(pattern.search(name) for pattern in compiled)


def by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Group names by kind, their name without numbers.

    >>> by_kind(["h.0.w", "h.1.w", "wte.weight"])
    {'h.*.w': ['h.0.w', 'h.1.w'], 'wte.weight': ['wte.weight']}
    """
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        found.setdefault(blanked(name), []).append(name)
    return found


def ready_option(option: str, *names: str, every: Iterable[str] = ()) -> str:
    r"""Return an option, quoted for a shell, whose pattern matches these names and no other of `every`; or "".

    >>> print(ready_option("--keep", "lm_head.weight"))
    --keep '^lm_head\.weight$'
    >>> print(ready_option("--keep", "h.0.q_norm.weight", "h.1.q_norm.weight"))
    --keep '^h\.\d+\.q_norm\.weight$'
    """
    pattern = exact_pattern(names, every)
    return f"{option} {shlex.quote(pattern)}" if pattern else ""


def exact_pattern(names: Iterable[str], every: Iterable[str] = ()) -> str:
    r"""Return the most readable pattern that matches these names and no other of `every`; "" if all are too long.

    Tries kinds of names joined by `|`, then parts of the model that hold nothing else, then a common prefix.

    >>> names = [f"mtp.{n}.{part}" for n in range(9) for part in ("a_long_name.weight", "b_long_name.weight")]
    >>> print(exact_pattern(names, [*names, "model.norm.weight"]))
    ^mtp\.\d+\.a_long_name\.weight$|^mtp\.\d+\.b_long_name\.weight$
    """
    wanted = set(names)
    everything = wanted | set(every)
    rest = by_kind(everything - wanted)
    kinds = {kind: _of_kind(members, rest.get(kind, [])) for kind, members in by_kind(wanted).items()}
    joined = "|".join(kinds.values())
    start = commonprefix(sorted(wanted))  # noqa: RUF071 - names, not paths
    shorter = ["|".join(_parts(wanted, everything - wanted)), f"^{_escaped(start)}" if start else ""]
    for pattern in [*([joined] if len(joined) <= _READABLE else []), *shorter, joined]:
        if pattern and len(pattern) <= _LONGEST and {n for n in everything if re.search(pattern, n)} == wanted:
            return pattern
    return ""


def _of_kind(names: list[str], rest: list[str]) -> str:
    """A pattern for names of one kind, which matches none of the `rest` of that kind."""
    if len(names) == 1:
        return _exactly(names[0])
    rows = [name.split(".") for name in names]
    seen = [{row[i] for row in rows} for i in range(len(rows[0]))]
    every = [{name.split(".")[i] for name in rest} | values for i, values in enumerate(seen)]

    def part(i: int) -> str:
        if not rows[0][i].isdigit():
            return _escaped(rows[0][i])
        if seen[i] == every[i] and len(seen[i]) > 1:
            return r"\d+"
        return (
            _escaped(rows[0][i])
            if len(seen[i]) == 1
            else f"({'|'.join(map(_escaped, sorted(seen[i], key=lambda digits: (len(digits), digits))))})"
        )

    for pattern in (
        r"\.".join(r"\d+" if word.isdigit() else _escaped(word) for word in rows[0]),
        r"\.".join(map(part, range(len(rows[0])))),
    ):
        if all(re.fullmatch(pattern, n) for n in names) and not any(re.fullmatch(pattern, n) for n in rest):
            return f"^{pattern}$"
    return "|".join(map(_exactly, names))


def _parts(names: set[str], rest: set[str]) -> list[str]:
    """Patterns for parts of a model, such as layers or towers, that hold only these names."""
    kinds_of_rest = set(map(blanked, rest))
    taken: set[tuple[str, ...]] = set()
    for name in rest:
        for parts in (name.split("."), blanked(name).split(".")):
            taken.update(tuple(parts[:i]) for i in range(1, len(parts) + 1))
    found: dict[str, None] = {}
    for name in sorted(names):
        parts = (name if blanked(name) in kinds_of_rest else blanked(name)).split(".")
        size = next((i for i in range(1, len(parts)) if tuple(parts[:i]) not in taken), len(parts))
        words = [r"\d+" if part == "*" else _escaped(part) for part in parts[:size]]
        found["^" + r"\.".join(words) + (r"\." if size < len(parts) else "$")] = None
    return list(found)


def _exactly(name: str) -> str:
    return f"^{_escaped(name[:200])}{'$' if len(name) <= 200 else ''}"


def _escaped(text: str) -> str:
    return "".join(re.escape(c) if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _abbreviated(keys: Iterable[str]) -> str:
    names = [shown(key) for key in sorted(keys, key=layer_order)]
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, … {names[-1]}"
