"""NST against the official code's numbers, and against its definition."""
import pytest
import torch
import torch.nn.functional as F
from golden_data import GoldenCase, assert_golden, case_id, golden_cases

from timm_distill.methods.nst import selectivity_loss


def discrepancy(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Kernel means over channel pairs, [B, C, H, W] each."""
    a, b = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))
    kernels = [(x @ y.mT).square().mean((1, 2)) for x, y in ((a, a), (b, b), (a, b))]
    return (kernels[0] + kernels[1] - 2 * kernels[2]).mean()


@pytest.mark.parametrize('case', golden_cases('nst'), ids=case_id)
def test_loss_and_gradients_equal_the_official_codes(case: GoldenCase) -> None:
    students = [x.clone().requires_grad_() for x in case.stages('feat_s')]
    teachers = case.stages('feat_t')
    loss = selectivity_loss(students, teachers)
    assert_golden(loss, case['loss'])
    for expected, s, t in zip(case['loss_per_stage'], students, teachers):
        assert_golden(selectivity_loss([s], [t]), expected)
    for actual, expected in zip(torch.autograd.grad(loss, students), case.stages('grad.feat_s')):
        assert_golden(actual, expected)


@pytest.mark.parametrize('channels, grid', [(3, 8), (40, 2)], ids=['few_channels', 'few_positions'])
def test_both_forms_are_the_kernel_means(channels: int, grid: int) -> None:
    student, teacher = torch.randn(2, 4, channels, grid, grid, dtype=torch.float64)
    torch.testing.assert_close(selectivity_loss([student], [teacher]), discrepancy(student, teacher))


def test_permuted_channels_have_the_same_distribution() -> None:
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    assert selectivity_loss([x[:, torch.randperm(6)]], [x]).abs() < 1e-12
