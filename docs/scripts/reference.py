"""The arithmetic and the mask, written for reading."""

from hashlib import blake2b

import numpy as np


def philox4x32_10(counter, key):
    """Return four random words of 32 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF
        c2, c3 = (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def mask_key(name, seed=0, iteration=0):
    """Return (k0, k1) of a tensor."""
    digest = blake2b(f"{seed}\0{iteration}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def u(element, key):
    """Return the sixteen random bits of an element."""
    block, r = divmod(element, 1024)
    half, word, lane = r // 512, r % 512 // 128, r % 128
    c = 128 * block + lane
    return philox4x32_10((c & 0xFFFFFFFF, c >> 32, 0, 0), key)[word] >> 16 * half & 0xFFFF


def keep16(drop):
    """Return the threshold below which an element is kept."""
    return max(1, round((1 - drop) * 65536))


def merged(base, start, sft, *, name, alpha, drop, seed=0, iteration=0, factor=1.0):
    """Merge flat float32 arrays that begin with element 0; round the result to the output dtype."""
    if drop == 0 and factor == 1:
        tuned = sft
    else:
        threshold, key = keep16(drop), mask_key(name, seed, iteration)
        moved = start + (sft - start) * np.float32(factor * 65536 / threshold)
        kept = np.array([threshold == 65536 or u(e, key) < threshold for e in range(base.size)])
        tuned = np.where(kept, moved, start)
    weight = np.float32(1 - alpha)
    if weight == 0:
        return base
    if alpha == 0:
        return tuned
    if weight < 0.5:
        return base + weight * (tuned - base)
    return tuned - np.float32(alpha) * (tuned - base)


def bfloat16_bits(x):
    """Round float32 to the bits of bfloat16, to nearest even; NaN becomes the quiet one."""
    bits = x.view(np.uint32)
    rounded = bits + 0x7FFF + (bits >> 16 & 1) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)
