"""Names of tensors: the layer they belong to, and the names that a tied embedding goes by."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from os.path import commonprefix

from ..common.messages import shown
from ..errors import ArgumentError

# The two ends of a model that `tie_word_embeddings` makes one tensor, by the last parts of their names in the
# files of today's architectures. A name missing here is not mishandled: it is a tensor of its own.
_INPUT_EMBEDDING = re.compile(
    r"(^|[./])(embed_tokens|tokens_embed|wte|word_embeddings?|tok_embeddings|embed_in|embeddings|embedding|shared)"
    r"\.weight$"
)
_OUTPUT_HEAD = re.compile(
    r"((^|[./])(lm_head|generator_lm_head|embed_out|output|output_layer|proj_out|(predictions|lm_head)\.decoder)"
    r"|(^|/)decoder)\.weight$"
)

# What a tensor is, told by the part of its name that is its module or parameter; `weight_kind` says in which order.
_SCALE = re.compile(r"(^|_)(scale|scales|scale_inv|zeros|qzeros|g_idx)$|^(A_log|inv_freq)$")  # of other forms, of scans
_BIAS = re.compile(r"(^|_)bias(_|$)")
_NORM = re.compile(r"norm|^ln(_|\d|$)|_ln$", re.IGNORECASE)
_EMBEDDING = re.compile(r"(^|_)(embed|embeddings?|wte|wpe)$|^embed_|^relative_attention_bias$")
_CONVOLUTION = re.compile(r"(^|_)conv(\d|_|$)|(^|_)conv[12]d$")
_PLAIN = ("weight", "gamma", "beta")  # names of parameters that say nothing; their module's name does

_READABLE, _LONGEST = 160, 2000  # characters of a pattern: kinds of names are listed one by one; none is advised

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def layer_key(name: str) -> str | None:
    """Return the layer of a tensor: its name up to and including the first purely numeric component.

    >>> layer_key("model.layers.3.mlp.experts.7.up_proj.weight")
    'model.layers.3'
    >>> layer_key("model.embed_tokens.weight") is None
    True
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isascii() and part.isdigit():
            return ".".join(parts[: i + 1])
    return None


def folder_of(name: str) -> str:
    """Return the part of a model that a tensor is in: the folder before its name, "" at the top.

    >>> folder_of("2_Dense/linear.weight"), folder_of("lm_head.weight")
    ('2_Dense/', '')
    """
    return name[: name.rfind("/") + 1]


def weight_kind(name: str, shape: Sequence[int]) -> str:
    """Return what a tensor is, told by its name and shape, of a file or of a live model.

    One of "linear" (a weight matrix of a layer, or a stack of them, as fused experts are: the W of Eq. 2 to 4),
    "embedding", "head", "norm", "bias" (norms' biases too), "other": convolutions, scales, matrices outside the
    layers (projectors of images), single vectors. The paper says "the linear weight matrix" and names no rule: this
    one is ours. It knows names that are in use, and calls every other matrix of a layer linear.

    Source: "Superficial Self-Improved Reasoners Benefit from Model Merging" (arXiv 2503.02103), Eq. 2 to 4.

    >>> weight_kind("model.layers.0.mlp.up_proj.weight", (64, 32)), weight_kind("lm_head.weight", (96, 32))
    ('linear', 'head')
    >>> weight_kind("model.layers.0.mlp.experts.down_proj", (4, 32, 16))
    'linear'
    """
    parts = unwrapped(name).split(".")
    module = parts[-2] if len(parts) > 1 and parts[-1] in _PLAIN else parts[-1]
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


@cache
def blanked(name: str) -> str:
    """Return a name without its numbers, which is that of a kind of tensors.

    >>> blanked("model.layers.3.mlp.up_proj.weight")
    'model.layers.*.mlp.up_proj.weight'
    """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


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
    """Return what layer keys are sorted by: their stack, then their number."""
    return key.rpartition(".")[0], int(key.rpartition(".")[2])


def thirds(layers: Sequence[str]) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    """Return the early, the middle and the late layers: third t of N are floor(t N / 3) to floor((t + 1) N / 3) - 1.

    >>> [len(third) for third in thirds([f"h.{n}" for n in range(8)])]
    [2, 3, 3]
    """
    first, second = len(layers) // 3, 2 * len(layers) // 3
    return layers[:first], layers[first:second], layers[second:]


def resolve_layers(values: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Return values keyed by full layer keys, having checked them against a model's tensor names.

    Keys are layer keys (`model.layers.3`) or, where the model has one stack of layers, plain indices (`3`).
    Each stack that is named must be named whole. Raises ArgumentError that lists what is missing or unknown.
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
    """Whether a name is that of an input embedding, the end a tied tensor is called by."""
    return bool(_INPUT_EMBEDDING.search(name))


def is_output_head(name: str) -> bool:
    """Whether a name is that of an output head, which `tie_word_embeddings` may tie to the embedding."""
    return bool(_OUTPUT_HEAD.search(name))


def unwrapped(name: str) -> str:
    """Return a tensor's name without what wraps modules: FSDP, torch.compile, activation checkpointing, DDP.

    >>> unwrapped("module.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    parts = name.removeprefix("module.").split(".")
    return ".".join(part for part in parts if part not in _WRAPPERS)


def outer_bias(name: str) -> str:
    """Return the bias that one of a head is tied to, in the encoders that give it two names; "" of any other name.

    >>> outer_bias("cls.predictions.decoder.bias")
    'cls.predictions.bias'
    """
    module = name.removesuffix(".bias").rpartition(".")[0]
    return f"{module}.bias" if name.endswith(".bias") and module else ""


def is_embedding_or_head(name: str) -> bool:
    """Whether a name is that of an input embedding or of an output head, which have a row for each token."""
    return is_input_embedding(name) or is_output_head(name)


def tied_key(names: Iterable[str]) -> str:
    """Return the name a tied tensor is keyed by: the input embedding's, else the first.

    >>> tied_key(["lm_head.weight", "model.embed_tokens.weight"])
    'model.embed_tokens.weight'
    """
    ordered = sorted(names)
    return next((name for name in ordered if is_input_embedding(name)), ordered[0])


def only_in(one: Iterable[str], other: Iterable[str], one_label: str, other_label: str) -> str | None:
    """Say in one line which names `one` has and `other` lacks, by kinds, with the closest of the other's; or None."""
    others = set(other)
    surplus = set(one) - others
    if not surplus:
        return None
    kinds = by_kind(surplus)
    free = set(map(blanked, others)) | others if len(others) <= 20_000 else set()
    listed = []
    for kind, names in list(kinds.items())[:3]:
        known = names[0] if len(names) == 1 else kind
        there = kind in free and len(kinds) > 1  # of a layer more than the other has
        close = [
            each for each in get_close_matches(known, sorted(free), n=2, cutoff=0.8) if each != kind and not there
        ][:1]
        count = f" ({len(names)})" if len(names) > 1 else ""
        listed.append(f"'{shown(known)}'{count}" + (f" (closest there: '{shown(close[0])}')" if close else ""))
    more = f" and {len(kinds) - 3} more kinds" if len(kinds) > 3 else ""
    count_of = "1 tensor is" if len(surplus) == 1 else f"{len(surplus)} tensors are"
    return f"{count_of} in {one_label} only, not in {other_label}: {', '.join(listed)}{more}"


def matcher(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """Return a test: is a name found by one of the patterns?"""
    compiled = [re.compile(pattern) for pattern in patterns]
    return lambda name: any(pattern.search(name) for pattern in compiled)


def by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Return names by what they are without their numbers.

    >>> by_kind(["h.0.w", "h.1.w", "wte.weight"])
    {'h.*.w': ['h.0.w', 'h.1.w'], 'wte.weight': ['wte.weight']}
    """
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        found.setdefault(blanked(name), []).append(name)
    return found


def ready_option(option: str, *names: str, every: Iterable[str] = ()) -> str:
    r"""Return an option whose pattern matches exactly these of all names, as it can be pasted into a shell, or "".

    >>> print(ready_option("--keep", "lm_head.weight"))
    --keep '^lm_head\.weight$'
    >>> print(ready_option("--keep", "h.0.q_norm.weight", "h.1.q_norm.weight"))
    --keep '^h\.\d+\.q_norm\.weight$'
    """
    pattern = exact_pattern(names, every)
    return f"{option} {shlex.quote(pattern)}" if pattern else ""


def exact_pattern(names: Iterable[str], every: Iterable[str] = ()) -> str:
    r"""Return the most readable pattern that finds exactly these of all names; "" if none is short enough.

    Kinds of names joined by `|`, else the parts of the model that hold nothing else, else one common beginning.

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
    """A pattern of names that differ in their numbers only, and of none of the rest of that kind."""
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
    """Patterns of the parts of a model, layers or towers, that hold nothing but these names."""
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
