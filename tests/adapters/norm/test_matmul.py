"""Products of matrices of positions."""
import pytest
import torch

from timm_distill.adapters.norm import matmul as products
from timm_distill.adapters.norm.matmul import (
    channel_means,
    from_rows,
    gram,
    matmul_tn,
    row_products,
    split_exactly,
    to_rows,
)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


each_type = pytest.mark.parametrize('dtype', [torch.float32, torch.float64])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_products_over_positions_are_summed_in_single_precision_or_better(dtype: torch.dtype) -> None:
    a, b = draw(512, 7, dtype=dtype) + 1, draw(512, 3, dtype=dtype) + 1
    result = matmul_tn(a, b)
    assert result.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(result.double(), a.double().t() @ b.double(), rtol=1e-5, atol=0.)


@each_type
@pytest.mark.parametrize('part_size', [1, 10 ** 9])
def test_gram_matrix_of_many_rows_is_rounded_once(
        part_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, '_PART_SIZE', part_size)
    rows = draw(2000, 5, dtype=dtype) + 3
    eps = torch.finfo(torch.float32).eps if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(gram(rows).double(), rows.double().t() @ rows.double(), rtol=eps, atol=0.)


@each_type
@pytest.mark.parametrize('length', [1, 3, 64])
def test_dot_products_of_rows_in_steps_are_the_dot_products(
        length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, '_SUM_LENGTH', length)
    a, b = draw(16, 12, dtype=dtype), draw(5, 12, dtype=dtype)
    torch.testing.assert_close(row_products(a, b[:1]).to(dtype), (a * b[:1]).sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('part_size', [1, 10 ** 9])
def test_means_of_channels_are_exact_in_parts(part_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, '_PART_SIZE', part_size)
    x = draw(35, 3, 2, 5) + 1000
    means = channel_means(x)
    assert means.dtype == torch.float64
    torch.testing.assert_close(means, x.double().mean((0, 2, 3)), rtol=1e-15, atol=0)


@each_type
@pytest.mark.parametrize('scale', [1., 1e-20, 1e20])
def test_matrix_is_the_sum_of_its_high_and_low_part(scale: float, dtype: torch.dtype) -> None:
    rows = draw(64, 512, dtype=dtype) * scale
    rows[0] = 0
    high, low = split_exactly(rows)
    assert torch.equal(high + low, rows)
    assert torch.equal(high.double() + low.double(), rows.double())
    assert (low.abs() <= rows.abs().amax(1, keepdim=True) / 2 ** 9).all()


def test_product_of_high_parts_is_exact() -> None:
    a, b = draw(256, 2048), draw(64, 2048) * draw(64, 1).exp()
    high = [split_exactly(matrix)[0] for matrix in (a, b)]
    assert torch.equal((high[0] @ high[1].t()).double(), high[0].double() @ high[1].double().t())
    assert not torch.equal((a @ b.t()).double(), a.double() @ b.double().t())


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
