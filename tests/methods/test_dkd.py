"""DKD against the official codes' numbers, and where these are not defined."""
import pytest
import torch
from golden_data import GoldenCase, assert_golden, case_id, golden_cases

from timm_distill import UsageError, create_method
from timm_distill.features.spec import Features
from timm_distill.losses import kl_divergence
from timm_distill.methods.dkd import decoupled_divergences, dkd_losses, label_mixture

CASES = golden_cases('dkd')


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_loss_parts_and_gradient_equal_the_official_codes(case: GoldenCase) -> None:
    logits, hparams = case['logit_s'].clone().requires_grad_(), case.hparams
    loss = dkd_losses(logits, case['logit_t'], case['target'], hparams['alpha'], hparams['beta'], hparams['T']).mean()
    parts = decoupled_divergences(logits, case['logit_t'], case['target'], hparams['T'])
    assert_golden(loss, case['loss'])
    assert_golden(torch.autograd.grad(loss, logits)[0], case['grad.logit_s'])
    for part, name in zip(parts, ('loss_tckd', 'loss_nckd')):
        assert_golden(part.mean(), case[name])


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_method_computes_the_function_of_its_options(case: GoldenCase) -> None:
    options = {'alpha': case.hparams['alpha'], 'beta': case.hparams['beta'], 'temperature': case.hparams['T']}
    terms = create_method('dkd', **options)(
        Features(logits=case['logit_s']), Features(logits=case['logit_t']), case['target'])
    assert terms == {'dkd_loss': dkd_losses(case['logit_s'], case['logit_t'], case['target'], **options).mean()}


def test_parts_add_up_to_hintons_divergence_weighted_by_the_teachers_doubt() -> None:
    student, teacher, target = torch.randn(4, 6).double(), torch.randn(4, 6).double(), torch.arange(4)
    target_part, other_part = decoupled_divergences(student, teacher, target, 2.)
    doubt = 1 - (teacher / 2).softmax(1)[torch.arange(4), target]
    torch.testing.assert_close((target_part + doubt * other_part).mean(), kl_divergence(student, teacher, 2.))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_confident_logits_have_a_finite_loss_and_gradient(dtype: torch.dtype) -> None:
    student = (1e4 * torch.eye(3, 5)).to(dtype).requires_grad_()
    teacher = (1e4 * torch.eye(5)[2:]).to(dtype)
    loss = dkd_losses(student, teacher, torch.arange(3)).mean()
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(student.grad).all()
    assert student.grad.any()


def test_with_two_classes_only_the_target_part_remains() -> None:
    student, teacher = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2)
    target_part, other_part = decoupled_divergences(student, teacher, torch.tensor([0, 1, 0]), 1.)
    assert not other_part.any()
    torch.testing.assert_close(target_part.mean(), kl_divergence(student, teacher, 1.))


def test_one_hot_labels_are_hard_labels() -> None:
    student, teacher, target = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([0, 5, 2, 2])
    for smoothing in (0., 0.1):
        soft = torch.eye(6)[target] * (1 - smoothing) + smoothing / 6
        torch.testing.assert_close(dkd_losses(student, teacher, soft), dkd_losses(student, teacher, target))


def test_mixed_labels_mix_the_losses_of_both_classes() -> None:
    student, teacher = torch.randn(3, 6), torch.randn(3, 6)
    first, second = torch.tensor([0, 1, 2]), torch.tensor([3, 3, 0])
    soft = 0.9 * (0.3 * torch.eye(6)[first] + 0.7 * torch.eye(6)[second]) + 0.1 / 6
    expected = 0.3 * dkd_losses(student, teacher, first).mean() + 0.7 * dkd_losses(student, teacher, second).mean()
    torch.testing.assert_close(dkd_losses(student, teacher, soft).mean(), expected)


def test_labels_without_a_class_have_no_loss() -> None:
    student = torch.randn(2, 4, requires_grad=True)
    loss = dkd_losses(student, torch.randn(2, 4), torch.full((2, 4), 0.25)).mean()
    loss.backward()
    assert loss == 0 and not student.grad.any()
    assert not label_mixture(torch.zeros(2, 4))[1].any()


def test_no_gradient_goes_to_the_teacher() -> None:
    student, teacher = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    dkd_losses(student, teacher, torch.arange(2)).mean().backward()
    assert student.grad is not None and teacher.grad is None


@pytest.mark.parametrize('option', [{'alpha': -1.}, {'beta': -1.}, {'temperature': 0.}])
def test_impossible_options_are_named(option: dict) -> None:
    with pytest.raises(UsageError, match=f'dkd.{next(iter(option))}'):
        create_method('dkd', **option)
