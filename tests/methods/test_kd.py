"""KD against the official codes' numbers, and its options."""
import pytest
import torch
import torch.nn.functional as F
from golden_data import GoldenCase, assert_golden, case_id, golden_cases

from timm_distill import UsageError, create_method
from timm_distill.features.spec import Features
from timm_distill.losses import kl_divergence
from timm_distill.methods.kd import hard_label_losses


def create_logits(batch_size: int = 4, num_classes: int = 6) -> tuple:
    return torch.randn(batch_size, num_classes), torch.randn(batch_size, num_classes), torch.arange(batch_size)


@pytest.mark.parametrize('case', golden_cases('kd'), ids=case_id)
def test_loss_and_gradient_equal_the_official_codes(case: GoldenCase) -> None:
    logits = case['logit_s'].clone().requires_grad_()
    hparams = case.hparams
    if 'kd_loss_factor' in hparams:
        loss = hparams['kd_loss_factor'] * hard_label_losses(logits, case['logit_t']).mean()
    else:
        temperature = hparams['T'] if 'T' in hparams else hparams['tau']
        loss = hparams.get('kl_loss_factor', 1.) * kl_divergence(
            logits, case['logit_t'], temperature, hparams.get('reduction', 'batchmean'))
    assert_golden(loss, case['loss'])
    assert_golden(torch.autograd.grad(loss, logits)[0], case['grad.logit_s'])


@pytest.mark.parametrize('case', golden_cases('kd'), ids=case_id)
def test_method_computes_the_functions_of_its_options(case: GoldenCase) -> None:
    student, teacher = Features(logits=case['logit_s']), Features(logits=case['logit_t'])
    temperature = float(case.hparams.get('T', case.hparams.get('tau', 1.)))
    soft = create_method('kd', temperature=temperature)(student, teacher, torch.zeros(1))
    hard = create_method('kd', hard=True)(student, teacher, torch.zeros(1))
    assert soft == {'kd_loss': kl_divergence(case['logit_s'], case['logit_t'], temperature)}
    assert hard == {'kd_loss': hard_label_losses(case['logit_s'], case['logit_t']).mean()}


def test_hard_loss_is_cross_entropy_with_the_teachers_decision() -> None:
    student, teacher, _ = create_logits()
    torch.testing.assert_close(hard_label_losses(student, teacher).mean(), F.cross_entropy(student, teacher.argmax(1)))


def test_targets_play_no_role_so_mixup_is_safe() -> None:
    student, teacher, hard = create_logits()
    soft = torch.rand(4, 6).softmax(1)
    method = create_method('kd')
    features = Features(logits=student), Features(logits=teacher)
    assert method(*features, hard)['kd_loss'] == method(*features, soft)['kd_loss']


@pytest.mark.parametrize('hard', [False, True])
def test_no_gradient_goes_to_the_teacher(hard: bool) -> None:
    student, teacher, target = create_logits()
    student.requires_grad_(), teacher.requires_grad_()
    create_method('kd', hard=hard)(Features(logits=student), Features(logits=teacher), target)['kd_loss'].backward()
    assert student.grad is not None and teacher.grad is None


def test_a_student_that_equals_its_teacher_has_no_loss() -> None:
    logits = torch.randn(4, 6)
    assert abs(kl_divergence(logits, logits, 4.).item()) < 1e-6


@pytest.mark.parametrize('temperature', [0., -1.])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(UsageError, match='kd.temperature'):
        create_method('kd', temperature=temperature)
