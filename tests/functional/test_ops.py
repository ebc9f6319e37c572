"""The pure functions against the naive reference, bit for bit."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
import warnings
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from checkpoints import same_bits
from mergekit_imm import dare, dare_merge, interpolate, keep_mask, task_vector
from mergekit_imm.errors import ArgumentError, MismatchError
from mergekit_imm.numerics.mask import arithmetic, mask_key
from mergekit_imm.numerics.reference import CHUNK, merge_flat
from strategies import DTYPES, WIDER, alphas, drops, factors, kinds, seeds, tensor
from thorough import others

NAME = "model.layers.0.mlp.up_proj.weight"


# The first quarter holds every combination of any three of the four dtypes.
COMBINATIONS = sorted(product(WIDER, repeat=4), key=lambda dtypes: sum(map(WIDER.index, dtypes)) % 4)


@pytest.mark.parametrize(
    "dtypes",
    [*COMBINATIONS[:64], *others(*((each,) for each in COMBINATIONS[64:]))],
    ids=lambda d: "-".join(str(x)[6:] for x in d),
)
def test_every_combination_of_dtypes_has_the_bits_of_the_reference(dtypes: tuple[torch.dtype, ...]) -> None:
    base_dtype, start_dtype, sft_dtype, out = dtypes
    for seed, kind in enumerate(("gauss", "bits", "edges")):
        base, start, sft = (
            tensor(1500, dtype, seed=10 * seed + i, kind=kind, specials=True)
            for i, dtype in enumerate((base_dtype, start_dtype, sft_dtype))
        )
        for alpha, drop, factor in ((0.5, 0.9, 1.0), (0.3, 0.0, 1.0), (0.7, 0.2, 1.5)):
            parameters = {"alpha": alpha, "drop": drop, "factor": factor, "name": NAME}
            merged = dare_merge(base, sft, start=start, dtype=out, **parameters)  # type: ignore[call-overload]
            assert same_bits(merged, reference.merge_tensors(base, sft, start, out, **parameters))


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(*[st.sampled_from(WIDER)] * 3),
    st.sampled_from(DTYPES),
    st.integers(0, 2600),
    kinds,
    st.integers(0, 99),
    alphas,
    drops,
    factors,
    seeds,
    st.integers(0, 2**60),
    st.booleans(),
)
def test_any_parameters_give_the_bits_of_the_reference(
    dtypes: tuple[torch.dtype, ...],
    out: torch.dtype,
    count: int,
    kind: str,
    data: int,
    alpha: float,
    drop: float,
    factor: float,
    seed: int,
    iteration: int,
    with_start: bool,
) -> None:
    base, sft, start = (
        tensor(count, dtype, seed=3 * data + i, kind=kind, specials=True) for i, dtype in enumerate(dtypes)
    )
    parameters = {"alpha": alpha, "drop": drop, "factor": factor, "seed": seed, "iteration": iteration, "name": "n"}
    begin = start if with_start else None
    merged = dare_merge(base, sft, start=begin, dtype=out, **parameters)  # type: ignore[call-overload]
    assert same_bits(merged, reference.merge_tensors(base, sft, begin, out, **parameters))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (CHUNK + 3,), (3, CHUNK // 2 + 1), (2, 2, 5, 7)], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    count = int(torch.Size(shape).numel())
    base, sft = (tensor(count, torch.float32, seed=i, kind="gauss", specials=False).view(shape) for i in (0, 1))
    merged = dare_merge(base, sft, drop=0.0, alpha=0.5)
    assert same_bits(merged, reference.merge_tensors(base, sft, None, torch.float32, alpha=0.5, drop=0.0))
    masked = keep_mask(NAME, shape, drop=0.5)
    assert masked.shape == shape
    some = min(count, 300)
    assert masked.reshape(-1)[count - some :].tolist() == reference.mask(NAME, count - some, some, 0.5).tolist()


def strided(view: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same tensor with strides, and contiguous."""
    whole = tensor(2 * 40 * 50 * 60, torch.bfloat16, seed=5, kind="gauss", specials=False).view(2, 40, 50, 60)
    views = {
        "transposed": whole.permute(2, 0, 3, 1),
        "stepped": whole[:, ::3, 1:, ::7],
        "expanded": whole[:1, :1].expand(2, 40, 50, 60),
        "large": tensor(2 * (CHUNK + 9), torch.bfloat16, seed=6, kind="gauss", specials=False).view(-1, 2).t(),
    }
    return views[view], views[view].contiguous()


@pytest.mark.parametrize("view", ["transposed", "stepped", "expanded", "large"])
def test_strides_do_not_matter(view: str) -> None:
    odd, plain = strided(view)
    sft = torch.zeros_like(plain)
    assert same_bits(dare_merge(odd, sft, drop=0.5, name=NAME), dare_merge(plain, sft, drop=0.5, name=NAME))
    assert same_bits(dare(odd, name=NAME, drop=0.5), dare(plain, name=NAME, drop=0.5))
    assert same_bits(task_vector(odd, sft), task_vector(plain, sft))
    assert dare_merge(odd, sft, drop=0.0).is_contiguous()


def test_inputs_are_unchanged_and_results_have_no_gradient() -> None:
    base, sft = (torch.randn(50, requires_grad=True) for _ in range(2))
    before = base.detach().clone(), sft.detach().clone()
    for result in (
        dare_merge(base, sft, drop=0.5, name=NAME),
        dare(base, name=NAME, drop=0.5),
        task_vector(sft, base),
        interpolate(base, sft, alpha=1.0),
        dare(base, name=NAME, drop=0.0),
    ):
        assert not result.requires_grad
        assert type(result) is torch.Tensor
        result.fill_(7.0)
    assert torch.equal(base, before[0])
    assert torch.equal(sft, before[1])
    assert type(dare_merge(torch.nn.Parameter(base), sft, drop=0.0)) is torch.Tensor


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(WIDER), st.sampled_from(WIDER), kinds, st.integers(0, 99))
def test_alpha_0_and_1_are_exact(one: torch.dtype, two: torch.dtype, kind: str, seed: int) -> None:
    base = tensor(700, one, seed=seed, kind=kind, specials=False)
    sft = tensor(700, two, seed=seed + 1, kind=kind, specials=False)
    assert same_bits(interpolate(base, sft, alpha=1.0), base)
    assert same_bits(dare_merge(base, sft, alpha=0.0, drop=0.0, dtype=two), sft)
    assert same_bits(dare_merge(base, base, start=base, alpha=0.3, drop=0.0), interpolate(base, base, alpha=0.3))


@pytest.mark.parametrize(("drop", "expected"), [(0.0, 1.75), (0.5, None)])
def test_formula_by_hand(drop: float, expected: float | None) -> None:
    base, start, sft = (torch.full((4000,), x) for x in (1.0, 1.5, 2.5))
    merged = dare_merge(base, sft, start=start, alpha=0.5, drop=drop, name=NAME)
    kept = keep_mask(NAME, (4000,), drop=drop)
    assert torch.equal(merged, torch.where(kept, expected or 0.5 + 0.5 * 3.5, expected or 0.5 + 0.5 * 1.5))
    from_base = dare_merge(base, sft, start=start, alpha=0.5, drop=drop, name=NAME, reference="base")
    assert same_bits(from_base, dare_merge(base, sft, alpha=0.5, drop=drop, name=NAME))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(WIDER), drops, st.integers(0, 2**50), kinds)
def test_dare_matches_the_reference(dtype: torch.dtype, drop: float, offset: int, kind: str) -> None:
    delta = tensor(900, dtype, seed=1, kind=kind, specials=False)
    wide = delta.double() if dtype == torch.float64 else delta.float()
    scale = torch.tensor(65536 / reference.keep16_of(drop), dtype=wide.dtype)
    kept = torch.from_numpy(reference.mask(NAME, offset, 900, drop))
    expected = reference.narrow(torch.where(kept, wide * scale, 0.0).numpy(), dtype)
    assert same_bits(dare(delta, name=NAME, drop=drop, offset=offset), reference.to_tensor(expected, dtype, (900,)))


def test_task_vector_is_a_difference() -> None:
    sft, start = (tensor(99, torch.bfloat16, seed=i, kind="gauss", specials=False) for i in (0, 1))
    assert same_bits(task_vector(sft, start), sft.float() - start.float())
    assert task_vector(sft.double(), start).dtype == torch.float64


def test_equal_integers_are_copied_and_others_refused() -> None:
    whole = torch.arange(5)
    copied = dare_merge(whole, whole.clone(), drop=0.5, name=NAME)
    assert torch.equal(copied, whole)
    assert copied.data_ptr() != whole.data_ptr()
    with pytest.raises(MismatchError, match="must be equal, but base and sft differ"):
        dare_merge(whole, whole + 1, drop=0.5, name=NAME)
    with pytest.raises(MismatchError, match=r"int64 \[5\].*float32 \[5\]"):
        dare_merge(whole, whole.float(), drop=0.5, name=NAME)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: dare_merge(x, x[:2], drop=0.0), MismatchError, r"float32 \[3\] .*float32 \[2\]"),
        (lambda x: dare_merge(x, x[:1], drop=0.0), MismatchError, "nothing is broadcast"),
        (lambda x: task_vector(x, x[:, None]), MismatchError, r"\[3\].*\[3, 1\]"),
        (lambda x: dare_merge(x, x, drop=0.5), ArgumentError, "name is None with drop=0.5"),
        (lambda x: dare_merge(x, x, alpha=1.5, drop=0.0), ArgumentError, "alpha is 1.5"),
        (lambda x: dare_merge(x, x, drop=1.0, name="n"), ArgumentError, "drop is 1.0"),
        (lambda x: dare_merge(x, x, drop=float("nan"), name="n"), ArgumentError, "drop is nan"),
        (lambda x: dare_merge(x, x, factor=-1.0, name="n"), ArgumentError, "factor is -1.0"),
        (lambda x: dare_merge(x, x, seed=0.5, name="n"), ArgumentError, "seed is 0.5"),  # type: ignore[call-overload]
        (lambda x: dare_merge(x, x, iteration=-1, name="n"), ArgumentError, "iteration is -1"),
        (lambda x: dare_merge(x, x, reference="sft", name="n"), ArgumentError, "reference is 'sft'"),  # type: ignore[call-overload]
        (lambda x: dare_merge(x, {"a": x}, drop=0.0), ArgumentError, "base is a Tensor, sft is a dict"),
        (lambda x: dare_merge(x, x, drop=0.0, dtype=torch.int8), ArgumentError, "dtype is torch.int8"),
        (lambda x: dare_merge(x.to(torch.float8_e4m3fn), x, drop=0.0), MismatchError, "float8_e4m3fn cannot be merged"),
        (lambda x: dare_merge(x.to(torch.complex64), x, drop=0.0), MismatchError, "complex64"),
        (lambda x: dare_merge(x.to_sparse(), x, drop=0.0), MismatchError, "sparse"),
        (lambda x: dare(x, name="n", drop=0.5, offset=-1), ArgumentError, "offset is -1"),
        (lambda x: keep_mask("n", x.shape, drop=0.5, offset=-1), ArgumentError, "offset is -1"),
    ],
)
def test_refusals(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call(torch.ones(3))


@pytest.mark.parametrize("backend", ["aot_eager", *others("inductor")])
def test_formula_compiles_without_graph_breaks_to_the_same_bits(backend: str) -> None:
    if backend == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    compiled = torch.compile(merge_flat, fullgraph=True, backend=backend)
    constants, key = arithmetic(alpha=0.3, drop=0.9), mask_key(NAME)
    base, start, sft = (tensor(5000, torch.bfloat16, seed=i, kind="bits", specials=True) for i in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the compiler's own imports
        for out in (torch.bfloat16, torch.float32):
            merged = compiled(base, start, sft, out, constants, *key, 1 << 40)
            assert same_bits(merged, merge_flat(base, start, sft, out, constants, *key, 1 << 40))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's")
def test_temporaries_stay_within_64_mib() -> None:
    script = """
        import torch
        from mergekit_imm import dare, dare_merge, keep_mask, task_vector
        def peak(field="VmHWM"):
            return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(field)) * 1024
        small = torch.zeros(4096)
        dare_merge(small, small, drop=.5, name="n")
        base = torch.ones(3000, 4000, dtype=torch.bfloat16).t()
        sft = torch.ones(4000, 3000, dtype=torch.float32)
        for call, width in (
            (lambda: dare_merge(base, sft, start=base, drop=.5, name="n"), 2),
            (lambda: dare(sft, name="n", drop=.5), 4),
            (lambda: task_vector(sft, base), 4),
            (lambda: keep_mask("n", sft.shape, drop=.5), 1),
        ):
            open("/proc/self/clear_refs", "w").write("5")
            before = peak("VmRSS")
            call()
            above = peak() - before - width * sft.numel()
            assert above <= 32 << 20, above  # constant; a copy of base would make it 40
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
