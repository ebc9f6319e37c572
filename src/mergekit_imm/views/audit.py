"""An audit as text: one line that answers, a table by kinds of modules, what else was found."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from ..analysis.audit_tensors import TensorAudit
from ..analysis.auditing import AuditReport
from ..common.messages import shown
from .change_terminal import percent
from .tables import aligned

_ORDER = ("as claimed", "unchanged")  # last in the table
_WORDS = {
    "as claimed": "as claimed",
    "unchanged": "BASE's, as claimed",
    "hidden": "too small a change to be seen",
    "base": "BASE's: not merged",
    "scaled": "scaled",
    "dropped": "partly dropped",
    "other": "not as claimed",
    "foreign": "changed, though SFT does not",
    "not finite": "NaN or infinity",
    "shape": "of another shape",
    "missing": "missing",
}


def render(report: AuditReport) -> str:
    """Return the answer in a line, the other findings, and the table."""
    verdict = report.verdict
    lines = [f"{shown(report.merged)}: {verdict.line}"]
    lines += [f"  {verdict.findings[0].cure}"] if verdict.findings else []
    for each in verdict.findings[1:]:
        lines += [each.line, f"  {each.cure}"]
    return "\n".join([*lines, "", *table(report)])


def table(report: AuditReport) -> list[str]:
    """Return a line for each kind of module and how it ended."""
    groups: dict[tuple[str, str, str], list[TensorAudit]] = {}
    for each in report.tensors:
        kind = "(all others)" if each.state == "unchanged" else shown(each.kind, 40)
        groups.setdefault((kind, each.state, each.why), []).append(each)
    rows = [["module", "tensors", "coefficient", "claimed", "explained", "off", "what it is"]]
    ordered = sorted(groups, key=lambda key: _ORDER.index(key[1]) if key[1] in _ORDER else -1)
    rows += [_row(kind, state, groups[kind, state, why]) for kind, state, why in ordered]
    return aligned(rows, right=range(1, 6))


def _row(kind: str, state: str, tensors: Sequence[TensorAudit]) -> list[str]:
    ks = [each.coefficient for each in tensors if each.coefficient is not None]
    shares = [each.explained for each in tensors if each.explained is not None]
    expected = [each.expected for each in tensors if each.expected is not None]
    off = sum(each.beyond for each in tensors)
    total = sum(each.elements for each in tensors)
    return [
        kind,
        str(len(tensors)),
        _spread(ks),
        f"{expected[0]:.4g}" if expected else "-",
        percent(median(shares)) if shares else "-",
        percent(off / total) if off and total and state != "missing" else "0" if state != "missing" else "-",
        _WORDS.get(state) or f"as claimed, but {tensors[0].why}",
    ]


def _spread(values: Sequence[float]) -> str:
    """Return one number, or the smallest and the largest where they differ.

    >>> _spread([1.0, 1.00001]), _spread([0.5, 2.0]), _spread([])
    ('1.000', '0.500 to 2.000', '-')
    """
    if not values:
        return "-"
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high or max(values) - min(values) <= 0.01 * abs(median(values)) else f"{low} to {high}"
