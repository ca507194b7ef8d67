"""Products of matrices of positions, and the flags of their precision."""
from contextlib import contextmanager
from typing import Iterator, Tuple

import pytest
import torch

from timm_distill import create_adapter, products
from timm_distill.adapters import Match
from timm_distill.precision import full_float32
from timm_distill.products import (
    add_matmul_nt_,
    channel_means,
    from_rows,
    matmul_nn,
    matmul_nt,
    matmul_tn,
    row_products,
    to_rows,
)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


each_type = pytest.mark.parametrize('dtype', [torch.float32, torch.float64])


@each_type
@pytest.mark.parametrize('rows', [1, 15, 16, 48])
def test_products_are_those_of_matrices(rows: int, dtype: torch.dtype) -> None:
    a, b, c = draw(rows, 7, dtype=dtype), draw(5, 7, dtype=dtype), draw(rows, 3, dtype=dtype)
    d = draw(7, 4, dtype=dtype)
    torch.testing.assert_close(matmul_nt(a, b), a @ b.t())
    torch.testing.assert_close(matmul_tn(a, c), a.t() @ c)
    torch.testing.assert_close(matmul_nn(a, d), a @ d)
    assert matmul_nt(a, b).is_contiguous() and matmul_tn(a, c).is_contiguous()


@each_type
@pytest.mark.parametrize('length', [1, 3, 64])
def test_products_in_steps_are_the_products(length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, '_SUM_LENGTH', length)
    a, b, out = draw(16, 12, dtype=dtype), draw(5, 12, dtype=dtype), draw(16, 5, dtype=dtype)
    expected = out + a @ b.t()
    add_matmul_nt_(out, a, b)
    torch.testing.assert_close(out, expected)
    buffer = torch.empty_like(a)
    torch.testing.assert_close(row_products(a, b[:1], buffer).to(dtype), (a * b[:1]).sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('part_size', [1, 10 ** 9])
def test_means_of_channels_are_exact_in_parts(part_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, '_PART_SIZE', part_size)
    x = draw(35, 3, 2, 5) + 1000
    means = channel_means(x)
    assert means.dtype == torch.float64
    torch.testing.assert_close(means, x.double().mean((0, 2, 3)), rtol=1e-15, atol=0)


def test_products_in_steps_round_less_where_they_cancel() -> None:
    a, b = draw(256, 1024), draw(64, 1024)
    exact = a.double() @ b.double().t()
    out = -exact.float()
    expected = exact + out.double()
    add_matmul_nt_(out, a, b)
    plain = matmul_nt(a, b) - exact.float()
    assert (out - expected).norm() < 0.8 * (plain - expected).norm()


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_rows_are_the_positions_of_a_map_and_back(memory_format: torch.memory_format) -> None:
    x = draw(2, 3, 4, 5).contiguous(memory_format=memory_format)
    rows = to_rows(x)
    assert rows.shape == (40, 3) and rows.is_contiguous()
    assert torch.equal(rows[5 * 2 + 1], x[0, :, 2, 1])
    assert torch.equal(from_rows(rows, x), x)
    assert (rows.data_ptr() == x.data_ptr()) == (memory_format == torch.channels_last)


def test_rows_of_tokens_are_a_view() -> None:
    tokens = draw(2, 6, 3)  # [B, L, C]
    assert to_rows(tokens.transpose(1, 2).unsqueeze(-1)).data_ptr() == tokens.data_ptr()


# Flags

@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = enabled
    try:
        yield
    finally:
        for backend, value in zip(backends, before):
            backend.allow_tf32 = value


def tf32_flags() -> Tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize('enabled', [True, False])
def test_tf32_is_off_inside_and_as_before_behind(enabled: bool) -> None:
    with tf32(enabled):
        with full_float32():
            assert tf32_flags() == (False, False)
        assert tf32_flags() == (enabled, enabled)
        with pytest.raises(ZeroDivisionError), full_float32():
            raise ZeroDivisionError
        assert tf32_flags() == (enabled, enabled)


@pytest.mark.parametrize('enabled', [True, False])
def test_tf32_is_as_before_behind_a_step(enabled: bool) -> None:
    with tf32(enabled):
        adapter = create_adapter('norm', 3, 2, segments=2, form='moments')
        result = adapter(draw(4, 3, 3, 3), Match(draw(4, 2, 3, 3), lambda positions: positions))
        assert tf32_flags() == (enabled, enabled)
        (result.loss + result.output.sum()).backward()
        assert tf32_flags() == (enabled, enabled)
