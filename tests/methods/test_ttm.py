"""Transformed teacher matching against the official code's numbers, and where its powers could fail."""
import pytest
import torch
import torch.nn.functional as F
from golden_data import GoldenCase, assert_golden, golden_cases

from timm_distill import UsageError, create_method
from timm_distill.features.spec import Features
from timm_distill.losses import kl_divergence
from timm_distill.methods.ttm import power_sums

NAMES = ('ttm', 'wttm')
CASES = [pytest.param(name, case, id=f'{name}-{case.name}') for name in NAMES for case in golden_cases(name)]


@pytest.mark.parametrize(('name', 'case'), CASES)
def test_loss_of_each_sample_and_gradient_equal_the_official_codes(name: str, case: GoldenCase) -> None:
    hparams, logits = case.hparams, case['logit_s'].clone().requires_grad_()
    method = create_method(name, power=hparams['l'])
    losses = method.sample_losses(logits, case['logit_t'], torch.zeros(1))[f'{name}_loss']
    if 'loss_per_sample' in case:
        assert_golden(losses, case['loss_per_sample'])
    loss = losses.mean()
    if 'loss_kd' in case:
        assert_golden(loss, case['loss_kd'])
        loss = hparams['gamma'] * F.cross_entropy(logits, case['target']) + hparams['beta'] * loss
    assert_golden(loss, case['loss'])
    assert_golden(torch.autograd.grad(loss, logits)[0], case['grad.logit_s'])


def test_weights_go_from_one_for_a_certain_teacher_to_a_power_of_the_classes_for_one_without_an_idea() -> None:
    logits = torch.stack([1e4 * torch.eye(8)[0], torch.zeros(8)])
    torch.testing.assert_close(power_sums(logits, 0.25), torch.tensor([1., 8 ** 0.75]))


def test_power_one_is_hintons_divergence_with_equal_weights() -> None:
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    for name in NAMES:
        method = create_method(name, power=1.)
        term, = method(Features(logits=student), Features(logits=teacher), torch.zeros(4)).values()
        torch.testing.assert_close(term, kl_divergence(student, teacher))


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('power', [1e-3, 0.2, 3.])
def test_certain_teachers_have_a_finite_loss_and_gradient(name: str, dtype: torch.dtype, power: float) -> None:
    student = (1e4 * torch.eye(3, 5)).to(dtype).requires_grad_()
    teacher = Features(logits=(6e4 * torch.eye(5)[2:]).to(dtype))
    loss, = create_method(name, power=power)(Features(logits=student), teacher, torch.zeros(3)).values()
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(student.grad).all()


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('power', [0., -1.])
def test_the_power_must_be_positive(name: str, power: float) -> None:
    with pytest.raises(UsageError, match=f'{name}.power'):
        create_method(name, power=power)
