"""RKD against the official code's numbers, and against its definition."""
import pytest
import torch
import torch.nn.functional as F
from golden_data import GoldenCase, case_id, golden_cases

from timm_distill import UsageError, create_method
from timm_distill.features.spec import Features
from timm_distill.methods.rkd import angle_cosines, angle_loss, distance_loss


@pytest.mark.parametrize('case', golden_cases('rkd'), ids=case_id)
def test_loss_and_gradient_equal_the_official_codes(case: GoldenCase) -> None:
    student = case['feat_s'].clone().requires_grad_()
    method = create_method('rkd', distance_weight=case.hparams['w_d'], angle_weight=case.hparams['w_a'])
    terms = method(Features(pre_logits=student), Features(pre_logits=case['feat_t']), torch.zeros(1))
    loss = sum(terms.values())
    gradient, = torch.autograd.grad(loss, student)
    for actual, expected in (
            (distance_loss(student, case['feat_t']), case['loss_distance']),
            (angle_loss(student, case['feat_t']), case['loss_angle']),
            (loss, case['loss']),
            (gradient, case['grad.feat_s']),
    ):
        # of two samples both parts vanish up to rounding
        torch.testing.assert_close(actual.detach(), expected, rtol=1e-9, atol=1e-12)


def test_angles_from_the_gram_matrix_are_those_of_difference_vectors() -> None:
    x = 100 + torch.randn(6, 7, dtype=torch.float64)
    centred = x - x.mean(0)
    unit = F.normalize(x[None] - x[:, None], dim=2)  # [i, j]: from i to j
    expected = torch.einsum('ijd,ikd->ijk', unit, unit)
    torch.testing.assert_close(angle_cosines(centred @ centred.T), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('offset', [0., 1e3])
def test_float32_has_the_float64_value(offset: float) -> None:
    student, teacher = offset + torch.randn(2, 8, 32, dtype=torch.float64)
    for loss in (distance_loss, angle_loss):
        torch.testing.assert_close(
            loss(student.float(), teacher.float()).double(), loss(student, teacher), rtol=1e-3, atol=1e-6)


def test_samples_that_coincide_have_no_angle_and_finite_gradients() -> None:
    student = torch.randn(1, 16).expand(4, -1).contiguous().requires_grad_()
    loss = angle_loss(student, torch.randn(4, 16)) + distance_loss(student, torch.randn(4, 16))
    loss.backward()
    assert torch.isfinite(loss) and student.grad is not None and torch.isfinite(student.grad).all()


def test_a_weight_of_zero_leaves_the_term_out() -> None:
    features = Features(pre_logits=torch.randn(4, 6)), Features(pre_logits=torch.randn(4, 5))
    assert set(create_method('rkd', angle_weight=0.)(*features, torch.zeros(1))) == {'rkd_distance_loss'}
    assert set(create_method('rkd', distance_weight=0.)(*features, torch.zeros(1))) == {'rkd_angle_loss'}


def test_negative_or_no_weights_are_refused() -> None:
    with pytest.raises(UsageError, match='rkd.angle_weight'):
        create_method('rkd', angle_weight=-1.)
    with pytest.raises(UsageError, match='both 0'):
        create_method('rkd', distance_weight=0., angle_weight=0.)
