"""Logit standardisation against the reference code's numbers."""
import pytest
import torch
import torch.nn.functional as F
from golden_data import GoldenCase, assert_golden, case_id, golden_cases

from timm_distill import UsageError, create_method
from timm_distill.features.spec import Features
from timm_distill.methods.logitstd import standardize

CASES = golden_cases('logitstd')


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_standardised_logits_equal_the_official_codes(case: GoldenCase) -> None:
    for side in ('s', 't'):
        assert_golden(standardize(case[f'logit_{side}'], case.hparams['eps']), case[f'std_logit_{side}'])


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_loss_and_gradient_equal_the_official_codes(case: GoldenCase) -> None:
    hparams, logits = case.hparams, case['logit_s'].clone().requires_grad_()
    method = create_method(
        'logitstd', temperature=hparams['temperature'], eps=hparams['eps'], reduction=hparams['reduction'])
    term = method(Features(logits=logits), Features(logits=case['logit_t']), case['target'])['logitstd_loss']
    soft = term / hparams['temperature'] ** 2  # the reference's soft part has no such factor
    assert_golden(soft, case['loss_soft'])
    loss = soft
    if hparams['alpha']:
        beta = 1 - hparams['alpha'] if hparams['beta'] is None else hparams['beta']
        loss = hparams['alpha'] * F.cross_entropy(logits, case['target']) + beta * term
    assert_golden(loss, case['loss'])
    assert_golden(torch.autograd.grad(loss, logits)[0], case['grad.logit_s'])


def test_shift_and_scale_of_the_students_logits_are_free() -> None:
    method, teacher = create_method('logitstd'), torch.randn(4, 6).double()
    student = 5 * teacher - 3
    assert method(Features(logits=student), Features(logits=teacher), torch.zeros(4))['logitstd_loss'] < 1e-6


@pytest.mark.parametrize('student', [torch.zeros(2, 3), 1e4 * torch.eye(2, 3), torch.tensor([[1., 2.]])])
def test_constant_confident_and_two_class_logits_have_finite_gradients(student: torch.Tensor) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        logits = student.detach().clone().to(dtype).requires_grad_()
        teacher = torch.randn(logits.shape).to(dtype)
        loss = create_method('logitstd')(Features(logits=logits), Features(logits=teacher), torch.zeros(2))
        loss['logitstd_loss'].backward()
        assert loss['logitstd_loss'].dtype == torch.float32
        assert torch.isfinite(loss['logitstd_loss']) and torch.isfinite(logits.grad).all()


def test_reductions_are_those_of_torch() -> None:
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    for reduction in ('batchmean', 'mean', 'sum'):
        method = create_method('logitstd', reduction=reduction, temperature=2.)
        term = method(Features(logits=student), Features(logits=teacher), torch.zeros(4))['logitstd_loss']
        logs = [(standardize(logits) / 2).log_softmax(1) for logits in (student, teacher)]
        torch.testing.assert_close(term, 4 * F.kl_div(*logs, reduction=reduction, log_target=True))


@pytest.mark.parametrize('option', ['temperature', 'eps'])
def test_impossible_options_are_named(option: str) -> None:
    with pytest.raises(UsageError, match=f'logitstd.{option}'):
        create_method('logitstd', **{option: 0.})
