"""The Triton kernels against their references, on the interpreter (TRITON_INTERPRET=1) or on a GPU."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 to run the kernel on the CPU", allow_module_level=True)

from diffcache import ops  # noqa: E402 (only where the kernels can run)
from diffcache.kernels import relative_change as change  # noqa: E402
from diffcache.kernels.extrapolate import BLOCK, MAX_HISTORY, extrapolate  # noqa: E402
from diffcache.kernels.quantize import quantize  # noqa: E402
from diffcache.kernels.starting import Start  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark: list[pytest.MarkDecorator] = [] if INTERPRETED else [pytest.mark.gpu]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}
RULE = [2.0, -1.5, 0.75, -0.25, 0.125, -0.125]
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is full of NaN (of 77 in integers), so that an element the kernel did not write is seen."""
    alike, plain = torch.empty_like, torch.empty

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(alike(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(plain(*args, **kwargs)))


def values(*shape: int, count: int = 1, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(count)]


def difference_form(count: int) -> torch.Tensor:
    return torch.tensor(ops.difference_form(RULE[:count]), device=DEVICE)


def compare(anchor: torch.Tensor | None, history: list[torch.Tensor], weights=None, gate=None, modulation=None) -> None:
    weights = difference_form(len(history)) if weights is None else weights
    done = extrapolate(Start(), anchor, history, (), weights, gate, None, modulation and (*modulation, True))
    assert done is not None
    expected = ops.extrapolate_reference(anchor, history, weights, gate)
    tolerance = TOLERANCE[expected.dtype]
    assert done[0].dtype == expected.dtype
    # what is rounded on the way may be larger than what comes out, and be rounded to the other side
    largest = 1.0 if gate is None else max(1.0, float((expected - (0 if anchor is None else anchor)).abs().amax()))
    torch.testing.assert_close(done[0], expected, rtol=tolerance, atol=tolerance * largest)
    if modulation is not None:
        _, modulated = ops.extrapolate_modulate_reference(anchor, history, weights, *modulation, gate)
        torch.testing.assert_close(done[1], modulated, rtol=2 * tolerance, atol=4 * tolerance * largest)
        nothing, alone = extrapolate(Start(), anchor, history, (), weights, gate, None, (*modulation, False))
        assert torch.equal(alone, done[1])
        assert nothing.numel() == 0


@dtypes
@pytest.mark.parametrize("count", range(1, MAX_HISTORY + 1))
@pytest.mark.parametrize("anchored", [False, True])
def test_every_history_length(count: int, anchored: bool, dtype: torch.dtype) -> None:
    anchor, *history = values(3, 7, 61, count=count + 1, dtype=dtype)
    compare(anchor if anchored else None, history)


@pytest.mark.parametrize("size", [0, 1, 63, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 500])
def test_odd_sizes(size: int) -> None:
    compare(*values(size), values(size, count=3))


@pytest.mark.parametrize("kind", ["transposed", "mixed", "strided", "expanded", "four dimensions", "scalar"])
def test_layouts(kind: str) -> None:
    a, b, c = values(33, 70, count=3)
    anchors = {"transposed": c.t().contiguous(), "strided": c[1::2, 1:].contiguous()[:17], "scalar": c[0, 0]}
    histories = {
        "transposed": [a.t(), b.t()],
        "mixed": [a, b.t().contiguous().t()],
        "strided": [a[::2, 1:], b[::2, 1:]],
        "expanded": [a[:1].expand(33, 70), b],
        "four dimensions": [x.permute(0, 2, 3, 1) for x in values(2, 5, 6, 7, count=2)],
        "scalar": [a[0, 0], b[0, 0]],
    }
    anchor = anchors.get(kind)
    compare(None if kind == "strided" else anchor, histories[kind])


def test_layouts_that_do_not_fit_three_loops_are_left_to_the_reference() -> None:
    (value,) = values(3, 4, 5, 6)
    assert (
        extrapolate(
            Start(), value.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), [value], (), difference_form(1)
        )
        is None
    )


@dtypes
@pytest.mark.parametrize("table", [(61,), (7, 1), (3, 1, 1), (7, 61), (3, 7, 61), (1, 1, 1)], ids=str)
def test_weights_by_group(table: tuple[int, ...], dtype: torch.dtype) -> None:
    anchor, *history = values(3, 7, 61, count=4, dtype=dtype)
    compare(anchor, history, weights=torch.rand(3, *table, device=DEVICE))


@dtypes
@pytest.mark.parametrize("gate", [(61,), (3, 1, 61), (1, 7, 1), (3, 7, 61), ()], ids=str)
def test_gated_residual(gate: tuple[int, ...], dtype: torch.dtype) -> None:
    anchor, *history = values(3, 7, 61, count=3, dtype=dtype)
    (factors,) = values(*gate, dtype=dtype)
    compare(anchor, history, gate=factors)
    compare(None, history, gate=factors)


@dtypes
@pytest.mark.parametrize("shape", [(3, 7, 61), (2, 5), (1, 1, 300), (2, 3, 4, 16)], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_modulated_norm(shape: tuple[int, ...], gated: bool, dtype: torch.dtype) -> None:
    anchor, *history = values(*shape, count=3, dtype=dtype)
    factor, shift, gate = values(shape[0], *[1] * (len(shape) - 2), shape[-1], count=3, dtype=dtype)
    compare(anchor, history, gate=gate if gated else None, modulation=(factor, shift, 1e-6))


@dtypes
def test_still_history_is_reproduced_bitwise(dtype: torch.dtype) -> None:
    value = (torch.randn(777, device=DEVICE) * 50).to(dtype)
    form = torch.tensor(ops.difference_form([3.1, -2.9, 0.8]), device=DEVICE)
    assert torch.equal(extrapolate(Start(), None, [value, value.clone(), value.clone()], (), form)[0], value)


@pytest.mark.parametrize("small", ops.SMALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("anchored", [False, True])
def test_small_history(anchored: bool, dtype: torch.dtype, small: torch.dtype) -> None:
    anchor, first, second = values(3, 7, 61, count=3, dtype=dtype)
    pairs = [
        quantize(Start(), value, anchor if anchored else None, small, ops.SMALL[small]) for value in (first, second)
    ]
    for value, (kept, scale) in zip((first, second), pairs, strict=True):
        expected, expected_scale = ops.quantize_reference(value, anchor if anchored else None, small)
        # the interpreter cuts what hardware rounds to bfloat16, and loses the carry of 1.97 to 2.00 in float8
        rough = anchored and dtype == torch.bfloat16
        torch.testing.assert_close(scale, expected_scale, rtol=2**-7 if rough else 1e-6, atol=0)
        differs = (kept.float() - expected.float()).abs() > (1 if rough and small == torch.int8 else 0)
        assert differs.float().mean() < (0.3 if rough else 0.05)
    history, scales = zip(*pairs, strict=True)
    done = extrapolate(Start(), anchor, history, scales, difference_form(2), None, dtype)
    expected = ops.extrapolate_reference(anchor, [*history, *scales], difference_form(2), None, dtype)
    assert done is not None
    torch.testing.assert_close(done[0], expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_rows_of_zeros_can_be_quantized() -> None:
    kept, scale = quantize(Start(), torch.zeros(2, 5, device=DEVICE), None, torch.int8, 127.0)
    assert not kept.any()
    assert torch.equal(scale, torch.ones(2, 1, device=DEVICE))


@dtypes
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 7, 61), (1, change.BLOCK * 3 + 5)], ids=str)
def test_relative_change(shape: tuple[int, ...], norm: int, dtype: torch.dtype) -> None:
    new, old = values(*shape, count=2, dtype=dtype)
    result = change.relative_change(Start(), new, old, norm)
    torch.testing.assert_close(result, ops.relative_change_reference(new, old, norm), rtol=1e-4, atol=1e-5)


def test_relative_change_of_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(change, "MAX_PARTS", 3)  # so that one program takes several blocks
    new, old = values(2, 10 * change.BLOCK + 77, count=2)
    result = change.relative_change(Start(), new.t().contiguous().t(), old, 1)
    torch.testing.assert_close(result, ops.relative_change_reference(new, old, 1), rtol=1e-4, atol=1e-5)
