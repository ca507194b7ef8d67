"""Hadamard matrices against the official code's, and rotations for the sizes that have none."""
import pytest
import torch
from golden_data import GoldenCase, assert_golden, case_id, golden_cases

from timm_distill.teacher.hadamard import equalize, hadamard_matrix


@pytest.mark.parametrize('case', golden_cases('phi_s'), ids=case_id)
def test_matrix_is_the_official_codes(case: GoldenCase) -> None:
    matrix = hadamard_matrix(case.hparams['dim'])
    assert matrix is not None
    assert_golden(matrix, case['hadamard'])


# of timm's models; 36 and 576 have Paley's second construction
@pytest.mark.parametrize('size', [1, 2, 4, 12, 20, 36, 60, 192, 320, 384, 576, 672, 768, 960, 1024, 1280])
def test_rows_are_orthogonal_and_all_entries_of_one_size(size: int) -> None:
    matrix = hadamard_matrix(size)
    assert matrix is not None
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size ** -0.5))


@pytest.mark.parametrize('size', [3, 6, 7, 30, 52, 92, 100, 998])
def test_there_is_none_of_other_sizes(size: int) -> None:
    assert hadamard_matrix(size) is None


@pytest.mark.parametrize('values', [
    torch.rand(30, dtype=torch.float64) ** 8, torch.eye(7, dtype=torch.float64)[0], torch.ones(5, dtype=torch.float64),
    torch.zeros(3, dtype=torch.float64), torch.tensor([2.], dtype=torch.float64)],
    ids=['steep', 'one', 'equal', 'zero', 'single'])
def test_a_rotation_makes_the_variances_equal_where_there_is_none(values: torch.Tensor) -> None:
    rotation = equalize(values)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(len(values), dtype=torch.float64))
    rotated = rotation @ torch.diag(values) @ rotation.T
    torch.testing.assert_close(rotated.diagonal(), values.mean().expand(len(values)))
