"""DIST against the official codes' numbers, and its edges."""
import pytest
import torch
from golden_data import GoldenCase, assert_golden, case_id, golden_cases

from timm_distill import UsageError, create_method
from timm_distill.features.spec import Features
from timm_distill.methods.dist import EPS, dist_losses

CASES = golden_cases('dist')


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_losses_and_gradient_equal_the_official_codes(case: GoldenCase) -> None:
    logits, hparams = case['logit_s'].clone().requires_grad_(), case.hparams
    method = create_method(
        'dist', beta=hparams['beta'], gamma=hparams['gamma'], temperature=hparams['tau'])
    loss = sum(method(Features(logits=logits), Features(logits=case['logit_t']), torch.zeros(1)).values())
    inter, intra = dist_losses(logits, case['logit_t'], hparams['tau'])
    assert hparams['eps'] == EPS
    assert_golden(loss, case['loss'])
    assert_golden(inter, case['loss_inter'])
    assert_golden(intra, case['loss_intra'])
    assert_golden(torch.autograd.grad(loss, logits)[0], case['grad.logit_s'])


def test_weights_scale_their_own_terms() -> None:
    student, teacher = Features(logits=torch.randn(4, 6)), Features(logits=torch.randn(4, 6))
    plain = create_method('dist')(student, teacher, torch.zeros(4))
    weighted = create_method('dist', beta=2., gamma=0.5)(student, teacher, torch.zeros(4))
    assert set(plain) == {'dist_inter_loss', 'dist_intra_loss'}
    torch.testing.assert_close(weighted['dist_inter_loss'], 2 * plain['dist_inter_loss'])
    torch.testing.assert_close(weighted['dist_intra_loss'], plain['dist_intra_loss'] / 2)


def test_a_student_that_equals_its_teacher_has_no_loss() -> None:
    logits = 3 * torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).double()
    assert all(abs(loss) < 1e-5 for loss in dist_losses(logits, logits))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_confident_logits_have_a_finite_loss_and_gradient(dtype: torch.dtype) -> None:
    student = (1e4 * torch.eye(3, 5)).to(dtype).requires_grad_()
    loss = sum(dist_losses(student, (1e4 * torch.eye(5)[2:]).to(dtype)))
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(student.grad).all()


def test_equal_samples_and_uniform_predictions_have_finite_gradients() -> None:
    for student in (torch.zeros(3, 4), torch.randn(1, 4).repeat(3, 1)):
        student.requires_grad_()
        sum(dist_losses(student, torch.randn(3, 4))).backward()
        assert torch.isfinite(student.grad).all()


def test_no_gradient_goes_to_the_teacher() -> None:
    student, teacher = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    sum(dist_losses(student, teacher)).backward()
    assert student.grad is not None and teacher.grad is None


@pytest.mark.parametrize('option', [{'beta': -1.}, {'gamma': -1.}, {'temperature': 0.}])
def test_impossible_options_are_named(option: dict) -> None:
    with pytest.raises(UsageError, match=f'dist.{next(iter(option))}'):
        create_method('dist', **option)
