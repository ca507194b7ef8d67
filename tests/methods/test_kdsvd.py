"""KDSVD against the official code's numbers, and its decomposition where an SVD's gradient is not finite."""
from typing import List, Tuple

import pytest
import torch
from feature_pairs import create_features, create_pair
from golden_data import GoldenCase, assert_golden, case_id, golden_cases

from timm_distill import UsageError, create_method
from timm_distill.methods.kdsvd import (
    align_vectors,
    compare_stages,
    fix_signs,
    singular_vector_loss,
    singular_vectors,
)

CASES = golden_cases('kdsvd')
RTOL = 1e-7


def to_matrix(feature: torch.Tensor) -> torch.Tensor:
    return feature.flatten(2).mT


def align_to_golden(case: GoldenCase, students: List[torch.Tensor]) -> List[torch.Tensor]:
    """Return the student's vectors aligned with the stored teacher vectors, whose signs are those of one library."""
    count = case.hparams['k'] + case.hparams['extra_student_vectors']
    return [
        align_vectors(singular_vectors(to_matrix(x), count)[0], v)
        for x, v in zip(students, case.stages('teacher_v'))]


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_loss_and_gradients_equal_the_official_codes(case: GoldenCase) -> None:
    students = [x.clone().requires_grad_() for x in case.stages('feat_s')]
    teacher, values = case.stages('teacher_v'), case.stages('teacher_sv')
    aligned = align_to_golden(case, students)
    for actual, expected in zip(aligned, case.stages('student_v_aligned')):
        assert_golden(actual, expected, RTOL)
    loss = singular_vector_loss(aligned, teacher, values)
    assert_golden(loss, case['loss'], RTOL)
    for i, expected in enumerate(case['loss_per_stage']):
        part = slice(i, i + 2)
        assert_golden(singular_vector_loss(aligned[part], teacher[part], values[part]), expected, RTOL)
    for actual, expected in zip(torch.autograd.grad(loss, students), case.stages('grad.feat_s')):
        assert_golden(actual, expected, RTOL)


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_singular_vectors_equal_the_official_codes_up_to_sign(case: GoldenCase) -> None:
    k = case.hparams['k']
    for side, count in (('student', k + case.hparams['extra_student_vectors']), ('teacher', k)):
        for feature, expected in zip(case.stages(f'feat_{side[0]}'), case.stages(f'{side}_v')):
            vectors, values = singular_vectors(to_matrix(feature), count)
            signs = (vectors * expected).sum(1, keepdim=True).sign()
            torch.testing.assert_close(vectors * signs, expected, rtol=RTOL, atol=RTOL)
            assert (values.diff() <= 0).all()
    for feature, expected in zip(case.stages('feat_t'), case.stages('teacher_sv')):
        values = singular_vectors(to_matrix(feature), k)[1]
        assert_golden(values / values.norm(dim=1, keepdim=True), expected, RTOL)


@pytest.mark.parametrize('shape', [(9, 4), (4, 9)], ids=['tall', 'wide'])
def test_gradient_of_the_vectors_is_that_of_torchs_decomposition(shape: Tuple[int, int]) -> None:
    matrix = torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, shape[1], 2, dtype=torch.float64)
    expected = torch.linalg.svd(matrix, full_matrices=False).Vh.mT[..., :2]
    actual = singular_vectors(matrix, 2)[0]
    signs = (actual * expected).sum(1, keepdim=True).sign().detach()
    gradients = [torch.autograd.grad((v * weight).sum(), matrix)[0] for v in (actual * signs, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    'matrix', [torch.zeros(6, 4), torch.ones(6, 4), torch.eye(6, 4), 1e4 * torch.eye(4, 6)],
    ids=['zero', 'rank_one', 'equal_values', 'equal_values_wide'])
def test_gradient_is_finite_where_singular_values_coincide_or_vanish(matrix: torch.Tensor) -> None:
    matrix = matrix[None].clone().requires_grad_()
    (singular_vectors(matrix, 3)[0] * torch.randn(matrix.shape[2], 3)).sum().backward()
    assert matrix.grad is not None and torch.isfinite(matrix.grad).all()


def test_signs_do_not_depend_on_those_of_the_decomposition() -> None:
    matrix = torch.randn(3, 9, 5)
    vectors = singular_vectors(matrix, 3)[0]
    flipped = vectors * torch.tensor([1., -1., -1.])
    torch.testing.assert_close(fix_signs(vectors, matrix), fix_signs(flipped, matrix))


def test_kernel_from_its_series_is_the_gaussian() -> None:
    s, t = torch.randn(2, 2, 40, 1, dtype=torch.float64), torch.randn(2, 2, 30, 1, dtype=torch.float64)
    s, t = s / s.norm(dim=2, keepdim=True), t / t.norm(dim=2, keepdim=True)
    kernels = [(-(bottom[:, :, None] - top[:, None]).square() / 8).exp() for bottom, top in zip(s, t)]
    expected = (kernels[0] - kernels[1]).square().sum() / 2
    values = [torch.ones(2, 1, dtype=torch.float64)] * 2
    actual = singular_vector_loss([s[0], t[0]], [s[1], t[1]], values)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0.)


def test_a_student_that_equals_its_teacher_has_no_loss() -> None:
    stages = [torch.randn(2, 6, 4, 4), torch.randn(2, 8, 2, 2)]
    assert compare_stages(stages, stages, 1) < 1e-9


def test_grid_bounds_the_positions_that_are_decomposed() -> None:
    student, teacher = create_features('student'), create_features('teacher')
    losses = []
    for grid in (0, 8, 2):
        torch.manual_seed(0)
        method = create_method('kdsvd', grid=grid)
        method.build(create_pair(student, teacher))
        losses.append(method(student, teacher, torch.zeros(1))['kdsvd_loss'].item())
    assert losses[0] == losses[1] != losses[2]


def test_more_vectors_than_the_smallest_stage_has_are_refused() -> None:
    student, teacher = create_features('student'), create_features('teacher')
    with pytest.raises(UsageError, match='kdsvd.k=2 is more than the 1'):
        create_method('kdsvd', k=2).build(create_pair(student, teacher))
    create_method('kdsvd', k=2, stages=(0, 1)).build(create_pair(student, teacher))


@pytest.mark.parametrize('options', [dict(k=0), dict(grid=-1), dict(stages='first')])
def test_impossible_options_are_refused(options: dict) -> None:
    with pytest.raises(UsageError, match=f'kdsvd.{next(iter(options))}'):
        create_method('kdsvd', **options)
