"""Match the names of a stream to the base's one by one, as they come.

A name that the base has is taken at once. For another, the rules for whole models (`transforms.match_names`) look at it
together with those of its layer that wait. Parts of a tensor that the base stores fused wait until it is whole. When
all names are known, the caller matches them together, and compares.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Tensor
from ..errors import MismatchError
from ..model.layout_names import canonical
from ..model.rename_rules import apply_rules, by_rule, carried, rule_of
from ..model.tensor_names import is_output_head, unwrapped
from ..transforms.experts import fused_path, is_fused, is_single
from ..transforms.fused_projections import waits_for_others
from ..transforms.match_names import with_base_names
from .given import Given, givens
from .inputs import placer

Named = dict[str, Tensor]  # tensors made of those of the stream, by the base's names
_NOTHING: Mapping[str, Given] = {}


class StreamNames:
    """The names that came so far: what they are in the base, and which tensors wait for others."""

    def __init__(self, base: Checkpoint, rules: Sequence[str]) -> None:
        self._base, self._rules = base, rules
        self.placed = placer(base)
        self._layers: dict[str, dict[str, Tensor]] = defaultdict(dict)  # of the base, by number
        for name, tensor in base.tensors.items():
            self._layers[_layer(name)][name] = tensor
        self._learned: dict[tuple[str, str], tuple[str, str]] = {}  # rule -> a pair of names that it is from
        self._seen: dict[str, dict[str, Given]] = defaultdict(dict)  # fused ones of a layer: one settles the other
        self._waiting: dict[str, dict[str, Given]] = defaultdict(dict)  # by layer, and name

    @property
    def waiting(self) -> set[str]:
        """The names, in the stream, of tensors that wait for others."""
        return {given.given for each in self._waiting.values() for given in each.values()}

    def spelt(self, name: str) -> str:
        """Return a name after the user's rules, without wrappers, if the base lacks it."""
        (name,) = apply_rules([self.placed(name)], self._rules)
        return name if name in self._base.tensors else unwrapped(name)

    def match(self, tensor: Given) -> Named:
        """Return what a tensor completes, under the base's names; its own name, if the base has nothing like it.

        Empty if it waits. Raises MismatchError if two tensors get one name.
        """
        name = self.spelt(tensor.name)
        tensor = replace(tensor, name=name)
        there = self._base.tensors.get(name)
        stacked = len(tensor.shape) == 3 and fused_path(name) is not None
        if there is not None and not stacked:
            return {name: tensor}
        known = self._known(name, tensor.shape)
        if known is not None:
            return {known: replace(tensor, name=known)}
        return self._together(name, tensor)

    def _known(self, name: str, shape: tuple[int, ...]) -> str | None:
        """Return the base's name by the rules learned so far, if they agree on one."""
        new = {by_rule(name, rule) for rule in self._learned}
        there = {each for each in new if each is not None and each in self._base.tensors}
        fits = [each for each in there if self._base.tensors[each].shape == shape and fused_path(each) is None]
        return fits[0] if len(there) == len(fits) == 1 else None

    def _together(self, name: str, tensor: Given) -> Named:
        layer = _layer(name)
        base, waiting, seen = self._layers.get(layer, {}), self._waiting[layer], self._seen[layer]
        stacks = [each.count for name, each in base.items() if len(each.shape) == 3 and ".experts." in canonical(name)]
        single = bool(stacks) and is_single(name)
        if single:
            waiting[name] = tensor
            if sum(each.count for name, each in waiting.items() if is_single(name)) != sum(stacks):
                return {}  # not yet all experts of the layer
        own = {**seen, **waiting, name: tensor}
        is_stack = is_fused(canonical(name)) and len(tensor.shape) == 3
        if is_stack:
            seen[name] = tensor
        try:
            found = with_base_names(Checkpoint("sft", "stream", None, {}, dict(own)), replace(self._base, tensors=base))
        except MismatchError:
            if not (is_stack or single):
                raise
            waiting[name] = tensor  # perhaps the other tensor of these experts tells its orientation
            return {}
        waiting[name] = tensor
        made: Named = {}
        for new, side in found.tensors.items():
            parts = {part.given for part in givens(side)}
            if new in base and parts <= {each.given for each in waiting.values()}:
                made[new] = side
        used = {part.given for side in made.values() for part in givens(side)}
        for old, each in [*waiting.items()]:
            if each.given in used:
                del waiting[old]
        if name not in waiting:
            self._learn(name, tensor, made)
            return made
        if single or waits_for_others(name, base):
            return made
        del waiting[name]
        pairs = dict(self._learned.values())
        new_name = (carried(name, pairs) if is_output_head(name) else None) or name
        return {**made, new_name: replace(tensor, name=new_name)}

    def _learn(self, name: str, tensor: Given, made: Named) -> None:
        new = next(
            (each for each, side in made.items() if isinstance(side, Given) and side.given == tensor.given), name
        )
        if new != name:
            self._learned.setdefault(rule_of(name, new), (name, new))


def _layer(name: str) -> str:
    """Return the first number in a name, which every match keeps; "" if there is none."""
    return next((part for part in name.split(".") if part.isdigit()), "")
