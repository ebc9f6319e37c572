"""The loop of an audit, compiled by numba: the sums over a span of elements of one tensor.

It computes in float64, and needs no bits to be the same everywhere: what it says is compared with tolerances.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"
from __future__ import annotations

import numpy as np

from ..numerics.numba_jit import inline, jit

_EXPONENT = np.uint64(0x7FF0000000000000)
_TO_WHOLE = np.float64(6755399441055744.0)  # 1.5 * 2^52: added and subtracted, it rounds to whole numbers, to even
_F16, _BF16 = (np.float64(2.0**-10), np.float64(2.0**-24)), (np.float64(2.0**-7), np.float64(2.0**-133))
_LARGEST16 = np.float64(65504.0)


@inline
def _step(value, relative, least):
    """Return the distance of a value to the next in a dtype with so many bits."""
    bits = np.float64(value).view(np.uint64)
    power = np.uint64(bits & _EXPONENT).view(np.float64) * relative
    return power if power > least else least


@inline
def _rounded(value, relative, least):
    """Return a value rounded to nearest even."""
    magic = _step(value, relative, least) * _TO_WHOLE
    return (value + magic) - magic


@inline
def _is_held(value, narrow):
    """Whether 16 bits hold a value: float16 if narrow is 0, bfloat16 if it is 1."""
    if narrow == 0:
        return _rounded(value, _F16[0], _F16[1]) == value and abs(value) <= _LARGEST16
    return _rounded(value, _BF16[0], _BF16[1]) == value


@jit
def measure(b, d, m, changed, p, q, relative, least, exact, limits, sampled, counts, sums):
    """Add up one span: `counts` and `sums` in the order of the fields of Sums.

    changed: whether `d` counts; else the tensor is claimed to be p b. exact: no rounding is simulated (float64).
    limits: steps allowed, share of the delta allowed, share allowed to rough arithmetic, steps of a clear delta.
    sampled: elements that are asked whether 16 bits hold them; 0: the small and the large.
    """
    count = len(m)
    rms = np.float64(0)
    if changed:
        for i in range(count):
            x = q * np.float64(d[i])
            if x - x == 0:
                rms += x * x
        rms = np.sqrt(rms / max(1, count))
    not_finite = as_base = visible = beyond = far = clear = narrow0 = narrowed0 = narrow1 = narrowed1 = 0
    worst = steps = bb = bd = dd = mb = md = mm = rest = cd = clear_dd = clear_md = moved_dd = np.float64(0)
    for i in range(count):
        base, merged = np.float64(b[i]), np.float64(m[i])
        delta = np.float64(d[i]) if changed else np.float64(0)
        kept = p * base
        claim = kept + q * delta
        if claim - claim != 0:
            same = merged == base or merged != merged
            as_base += same
            beyond += not same
            far += not same
            continue
        if merged - merged != 0:
            not_finite += 1
            continue
        base_there = base if exact else _rounded(base, relative, least)
        there = claim if exact else _rounded(claim, relative, least)
        size = max(abs(base), abs(claim))
        step = _step(size, relative, least)
        move, left = merged - kept, merged - claim
        off = abs(left)
        is_base = merged == base_there
        as_base += is_base
        visible += there != base_there
        allowed = limits[0] * step
        share = abs(q * delta)
        share = (share if share > rms else rms) if changed else np.float64(0)
        beyond += off > allowed + share * limits[1]
        far += off > allowed + share * limits[2]
        worst = max(worst, off / step)
        steps += step * step
        rest += left * left
        mm += move * move
        if changed:
            bb += base * base
            bd += base * delta
            dd += delta * delta
            mb += move * base
            md += move * delta
            cd += (there - kept) * delta
            if abs(delta) >= limits[3] * step:
                clear += 1
                clear_dd += delta * delta
                clear_md += move * delta
            if not is_base:
                moved_dd += delta * delta
        if i < sampled or (sampled == 0 and ((abs(there) < 2.0**-14 and there != 0) or abs(there) > _LARGEST16)):
            if not _is_held(there, 0):
                narrow0 += 1
                narrowed0 += _is_held(merged, 0)
            if not _is_held(there, 1):
                narrow1 += 1
                narrowed1 += _is_held(merged, 1)
    counts[0], counts[1], counts[2], counts[3], counts[4], counts[5] = count, not_finite, as_base, visible, beyond, far
    counts[6], counts[7], counts[8], counts[9], counts[10] = clear, narrow0, narrowed0, narrow1, narrowed1
    sums[0], sums[1], sums[2], sums[3], sums[4], sums[5] = worst, steps, bb, bd, dd, mb
    sums[6], sums[7], sums[8], sums[9], sums[10], sums[11], sums[12] = md, mm, rest, cd, clear_dd, clear_md, moved_dd
