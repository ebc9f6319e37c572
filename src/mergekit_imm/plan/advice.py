"""Decide which option a message may offer: one that leads to a model that loads, or what to do instead.

Never offered: half of what belongs together (a tie, the tensors of an expert), layers that the result's config does
not count, or a pattern that keeps or takes most of the model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import is_stored
from ..common.messages import first_few, shown
from ..model.config import Config, differences, is_other_class, says_tied, setting
from ..model.tensor_names import is_input_embedding, layer_key, matcher, ready_option, stacks
from ..options.options import MergeOptions
from .plan import result_config

_EXPERTS = re.compile(r".*\bexperts\.(\d+\.)?")  # the prefix of one expert, or of all in a layer
_COUNTS_LAYERS = re.compile(r"layer|depth|block")
_COUNTS_MORE_LAYERS = re.compile(r"nextn|mtp")  # multi-token prediction layers, on top of the usual ones
_MOST = 0.5  # share of the elements

TRAINED_FROM = "give the base that this sft was trained from"
SAVE_ALIKE = "save both alike: load each with the same version of transformers and `save_pretrained`"


@dataclass(frozen=True)
class Offer:
    """An option ready to paste, or "" and what to do instead."""

    option: str
    instead: str = ""


@dataclass(frozen=True)
class Advice:
    """The options that messages about a merge's tensors may offer."""

    used: Mapping[str, Checkpoint]
    options: MergeOptions

    @cached_property
    def _every(self) -> set[str]:
        return {name for each in self.used.values() for name in each.tensors}

    @cached_property
    def _rows(self) -> set[int]:
        """Numbers of rows of the input embeddings."""
        return {
            tensor.shape[0]
            for each in self.used.values()
            for name, tensor in each.tensors.items()
            if is_input_embedding(name) and tensor.shape and layer_key(name) is None
        }

    def offer(self, option: str, names: Collection[str], extra: str = "") -> Offer:
        """Return `--keep` or `--take` for tensors and what belongs to them; `extra`: the role that has more tensors."""
        side = self.used["base" if option == "--keep" else "sft"]
        whole = self._whole(names)
        instead = (
            self._not_in(side, whole)
            or (extra and self._not_counted(option, whole, extra))
            or (extra and self._half_of_a_tie(whole, extra))
            or self._most(option, side, whole)
        )
        ready = "" if instead else ready_option(option, *sorted(whole), every=self._every)
        if not ready and not instead:
            instead = f"no short pattern matches exactly these tensors; write one for {option}"
        return Offer(ready, instead)

    def either(self, *options: str, names: Collection[str]) -> str:
        """Return the options of several that may be offered, joined by "or"; "" if none."""
        return " or ".join(offer.option for each in options if (offer := self.offer(each, names)).option)

    def of_other_config(self, *, shapes: bool) -> str:
        """Say how the result's config disagrees with the base's tensors in number or shape; "" if it does not."""
        base, sft = self.used["base"], self.used["sft"]
        found = [
            f"{shown(place)} {shown(here)} and {shown(there)}"
            for place, here, there in differences(base.config, result_config(base, sft, self.options))
            if shapes or "position" not in place  # the number of positions does not change that of tensors
        ]
        listed = first_few(found)
        return f"the configs of {base.label} and {sft.label} differ ({listed}): {TRAINED_FROM}" if found else ""

    def _whole(self, names: Iterable[str]) -> set[str]:
        """Add what belongs to tensors: the other names of a tie, the other tensors of an expert."""
        found = set(names)
        experts = {match[0] for name in found if (match := _EXPERTS.match(name))}
        if experts:
            found |= {n for n in self._every if (match := _EXPERTS.match(n)) and match[0] in experts}
        for name in names:
            found |= self._tied_to(name)
        return found

    def _tied_to(self, name: str) -> set[str]:
        """Names that a config may tie to this one: of the same shape, with a row for each token."""
        shapes = {each.tensors[name].shape for each in self.used.values() if name in each.tensors}
        if layer_key(name) is not None or not any(shape and shape[0] in self._rows for shape in shapes):
            return set()
        tying = [each for each in self.used.values() if says_tied(each.config)]
        return {
            other
            for each in (self.used.values() if tying else ())
            for other, tensor in each.tensors.items()
            if tensor.shape in shapes and layer_key(other) is None
        }

    def _not_in(self, side: Checkpoint, names: Collection[str]) -> str:
        if side.adapter is not None and not all(n in side.tensors and is_stored(side.tensors[n]) for n in names):
            return f"{side.label} is an adapter, so they cannot be taken from it"
        return ""

    def of_other_depth(self, option: str, names: Collection[str], extra: str, *, known: bool = False) -> str:
        """Say that tensors of one model only are layers that the result does not count; "" if they are not.

        With `known`, only if configs prove it: doubt is a reason not to advise, but not to refuse a request.
        """
        one = self.used[extra]
        result = result_config(self.used["base"], self.used["sft"], self.options)
        layers = {key for name in names if (key := layer_key(name))}
        here = stacks(one.tensors)
        for other in self.used.values():
            there = stacks(other.tensors)
            for stack in sorted({key.rpartition(".")[0] for key in layers} & set(there)):
                if not layers & here.get(stack, set()) - there[stack]:
                    continue
                if known and not _counts(one.config, result):
                    continue
                if not known and _counted_alike(option, one, other, result, len(there[stack])):
                    continue
                both = _counts(one.config, other.config)
                counts = f" (config.json: {shown(both[0])} {both[1]} and {both[2]})" if both else ""
                return (
                    f"models of different depth are not merged: {shown(stack) or 'the model'} has"
                    f" {len(here[stack])} layers in {one.label} and {len(there[stack])} in {other.label}{counts};"
                    f" {TRAINED_FROM}"
                )
        return ""

    def _not_counted(self, option: str, names: Collection[str], extra: str) -> str:
        """Say that the result's config does not count tensors of one model only; "" if it does."""
        base, sft = self.used["base"], self.used["sft"]
        deeper = self.of_other_depth(option, names, extra)
        if deeper or option == "--keep" or any(map(_EXPERTS.match, names)):
            return deeper or self.of_other_config(shapes=False)
        if sft.config is not None and differences(sft.config, result_config(base, sft, self.options)):
            return "the result has the base's config, which does not count them; remove them from the sft"
        return ""

    def _half_of_a_tie(self, names: Collection[str], extra: str) -> str:
        others = [each for role, each in self.used.items() if role != extra]
        for name in names:
            lacking = next((each for each in others if each.adapter is None and name not in each.tensors), None)
            half = next((n for n in self._tied_to(name) if lacking and n in lacking.tensors), None)
            if half is not None:
                return (
                    f"a config ties '{shown(name)}' and '{shown(half)}' (tie_word_embeddings), and half of a tie cannot"
                    f" be kept or taken: {SAVE_ALIKE}; or save both untied, each with its own head"
                )
        return ""

    def _most(self, option: str, side: Checkpoint, names: Collection[str]) -> str:
        named = matcher(self.options.keep if option == "--keep" else self.options.take)
        counts = {name: tensor.count for name, tensor in side.tensors.items()}
        share = sum(n for name, n in counts.items() if name in names or named(name)) / (sum(counts.values()) or 1)
        # The text part of a multimodal model may be the smaller one.
        if share > _MOST and not is_other_class(self.used["sft"].config, self.used["base"].config):
            return f"these are most of {side.label}, {share:.0%} of its elements: {TRAINED_FROM}"
        return ""


def _counts(one: Config | None, other: Config | None) -> tuple[str, int, int] | None:
    """Return the first layer count in which two configs differ: its key and both values."""
    for key in _layer_keys(one):
        here, there = setting(one, key), setting(other, key)
        if isinstance(there, int) and here != there:
            return key, here, there
    return None


def _layer_keys(config: Config | None) -> list[str]:
    """Return the keys of a config that may count layers, the usual one first."""
    keys = [
        key
        for level in (config, (config or {}).get("text_config"))
        if isinstance(level, Mapping)
        for key, value in level.items()
        if type(value) is int and _COUNTS_LAYERS.search(key) and not _COUNTS_MORE_LAYERS.search(key)
    ]
    return sorted(dict.fromkeys(keys), key=lambda key: key != "num_hidden_layers")


def _counted_alike(option: str, extra: Checkpoint, other: Checkpoint, result: Config | None, there: int) -> bool:
    """Whether extra layers of one model are right in the result, as both configs count the same number.

    Extra layers of the base may exceed its count, as multi-token prediction layers do; the sft's must be counted.
    """
    if result is None or extra.config is None:
        return False
    if _counts(extra.config, result) or (other.config is not None and _counts(extra.config, other.config)):
        return False
    if option == "--keep":
        return True
    return any(_COUNTS_MORE_LAYERS.search(key) and bool(value) for key, value in result.items()) or not any(
        setting(result, key) == there for key in _layer_keys(result)
    )
