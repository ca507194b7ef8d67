"""Losses that methods share, on tensors alone."""
from typing import Tuple

import pytest
import torch
import torch.nn.functional as F

from timm_distill.losses import (
    kl_divergence,
    l2_normalize,
    match_grids,
    pool_to_grid,
    squared_norm_of_product,
    standardize_logits,
    to_full_precision,
)

LOW = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize('temperature', [1., 4.])
def test_kl_divergence_is_its_definition(temperature: float) -> None:
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    p_s, p_t = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    expected = temperature ** 2 * (p_t * (p_t / p_s).log()).sum(1).mean()
    torch.testing.assert_close(kl_divergence(student, teacher, temperature), expected, rtol=1e-12, atol=0.)


def test_kl_divergence_of_extreme_logits_is_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.]])
    assert torch.isfinite(kl_divergence(logits, -logits))


@pytest.mark.parametrize('dtype', LOW)
def test_kl_divergence_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = torch.randn(2, 5, 7).to(dtype)
    loss = kl_divergence(student, teacher, 4.)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, kl_divergence(student.float(), teacher.float(), 4.))


def test_standardised_logits_have_zero_mean_and_the_given_spread() -> None:
    z = standardize_logits(100. + 30. * torch.randn(5, 50, dtype=torch.float64), 2.5)
    torch.testing.assert_close(z.mean(1), torch.zeros(5, dtype=torch.float64), atol=1e-10, rtol=0.)
    torch.testing.assert_close(z.std(1, correction=0), torch.full((5,), 2.5, dtype=torch.float64))


def test_standardised_equal_logits_are_zero_and_not_nan() -> None:
    assert (standardize_logits(torch.full((2, 4), 3.), 2.5) == 0).all()


@pytest.mark.parametrize('dtype', [*LOW, torch.float32, torch.float64])
def test_full_precision_is_float32_or_better(dtype: torch.dtype) -> None:
    expected = torch.float32 if dtype in LOW else dtype
    assert to_full_precision(torch.ones(2, dtype=dtype)).dtype == expected
    assert standardize_logits(torch.randn(2, 3).to(dtype), 1.).dtype == expected


@pytest.mark.parametrize('pool', ['avg', 'max'])
@pytest.mark.parametrize('student,teacher', [
    ((8, 8), (4, 4)), ((4, 4), (8, 8)), ((7, 7), (3, 3)), ((8, 2), (4, 6)), ((5, 5), (5, 5)), ((7, 7), (4, 4)),
])
def test_both_maps_end_on_the_smaller_grid(pool: str, student: Tuple[int, int], teacher: Tuple[int, int]) -> None:
    s, t = match_grids(torch.randn(2, 3, *student), torch.randn(2, 5, *teacher), pool)
    grid = (min(student[0], teacher[0]), min(student[1], teacher[1]))
    assert (s.shape, t.shape) == ((2, 3, *grid), (2, 5, *grid))


def test_smaller_map_is_not_touched() -> None:
    small, large = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8)
    assert match_grids(small, large)[0] is small and match_grids(large, small)[1] is small


def test_default_pooling_averages() -> None:
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(match_grids(x, x[..., :4, :4])[0], F.avg_pool2d(x, 2))


@pytest.mark.parametrize('size,grid', [(14, 7), (16, 8), (15, 7), (9, 3)])
def test_max_pooling_has_the_official_windows(size: int, grid: int) -> None:
    x = torch.randn(2, 3, size, size)
    assert torch.equal(pool_to_grid(x, (grid, grid), 'max'), F.max_pool2d(x, size // grid))


def test_max_pooling_adapts_where_the_official_windows_do_not_fit() -> None:
    x = torch.randn(2, 3, 7, 7)
    assert torch.equal(pool_to_grid(x, (4, 4), 'max'), F.adaptive_max_pool2d(x, (4, 4)))


def test_normalised_vectors_have_unit_length_along_the_dimension() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    for dim in (0, 1, -1):
        torch.testing.assert_close(l2_normalize(x, dim), F.normalize(x, dim=dim))


def test_a_vector_without_length_becomes_zero_with_zero_gradient() -> None:
    x = torch.tensor([[0., 0.], [3., 4.]], requires_grad=True)
    unit = l2_normalize(x)
    unit.sum().backward()
    assert unit.tolist() == [[0., 0.], [pytest.approx(0.6), pytest.approx(0.8)]]
    assert x.grad is not None and torch.isfinite(x.grad).all() and not x.grad[0].any()


@pytest.mark.parametrize('m, n, rank', [(40, 50, 3), (4, 5, 30), (1, 1, 1)], ids=['low_rank', 'small', 'scalar'])
def test_squared_norm_of_a_product_is_that_of_the_matrix_with_its_gradient(m: int, n: int, rank: int) -> None:
    x = torch.randn(2, m, rank, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, n, rank, dtype=torch.float64, requires_grad=True)
    expected = (x @ y.mT).square().sum((1, 2))
    actual = squared_norm_of_product(x, y)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(value.sum(), (x, y)) for value in (actual, expected)]
    torch.testing.assert_close(*gradients)
