"""SP against the official code's numbers."""
import pytest
import torch
from golden_data import GoldenCase, assert_golden, case_id, golden_cases

from timm_distill.methods.sp import similarity_matrix, similarity_preserving_loss


@pytest.mark.parametrize('case', golden_cases('sp'), ids=case_id)
def test_loss_and_gradients_equal_the_official_codes(case: GoldenCase) -> None:
    students = [x.clone().requires_grad_() for x in case.stages('feat_s')]
    teachers = case.stages('feat_t')
    loss = similarity_preserving_loss(students, teachers)
    assert_golden(loss, case['loss'])
    for expected, s, t in zip(case['loss_per_stage'], students, teachers):
        assert_golden(similarity_preserving_loss([s], [t]), expected)
    for actual, expected in zip(torch.autograd.grad(loss, students), case.stages('grad.feat_s')):
        assert_golden(actual, expected)


def test_rotated_and_scaled_features_have_the_same_similarities() -> None:
    x = torch.randn(5, 8, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    torch.testing.assert_close(similarity_matrix(3 * x @ rotation), similarity_matrix(x))


def test_a_sample_without_activation_gets_no_gradient_that_bursts() -> None:
    student = torch.cat([torch.zeros(1, 4), torch.randn(3, 4)]).requires_grad_()
    similarity_preserving_loss([student], [torch.randn(4, 6)]).backward()
    assert student.grad is not None and student.grad.abs().max() < 100
