"""NKD against the official code's numbers, and its labels."""
import pytest
import torch
from golden_data import GoldenCase, assert_golden, case_id, golden_cases

from timm_distill import UsageError, create_method
from timm_distill.features.spec import Features


@pytest.mark.parametrize('case', golden_cases('nkd'), ids=case_id)
def test_terms_and_gradient_equal_the_official_codes(case: GoldenCase) -> None:
    hparams, logits = case.hparams, case['logit_s'].clone().requires_grad_()
    method = create_method('nkd', gamma=hparams['gamma'], temperature=hparams['temp'])
    target = case['target_soft'] if 'target_soft' in case else case['target']
    terms = method(Features(logits=logits), Features(logits=case['logit_t']), target)
    assert_golden(terms['nkd_target_loss'], case['loss_target'])
    assert_golden(terms['nkd_others_loss'], case['loss_non_target'])
    loss = sum(terms.values())
    assert_golden(loss, case['loss'])
    assert_golden(torch.autograd.grad(loss, logits)[0], case['grad.logit_s'])


def compute(logits: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, **options: object) -> torch.Tensor:
    return sum(create_method('nkd', **options)(Features(logits=logits), Features(logits=teacher), target).values())


def test_the_largest_class_of_a_soft_label_is_the_target_the_first_of_equals() -> None:
    student, teacher, target = torch.randn(3, 6), torch.randn(3, 6), torch.tensor([1, 0, 4])
    smoothed = 0.9 * torch.eye(6)[target] + 0.1 / 6
    mixed = 0.7 * torch.eye(6)[target] + 0.3 * torch.eye(6)[[5, 5, 5]]
    for soft in (smoothed, mixed):
        torch.testing.assert_close(compute(student, teacher, soft), compute(student, teacher, target))
    no_class = torch.full((3, 6), 1 / 6)
    torch.testing.assert_close(compute(student, teacher, no_class), compute(student, teacher, torch.zeros(3).long()))


def test_without_its_mask_the_second_term_is_over_all_classes() -> None:
    student, teacher, target = torch.randn(3, 6), torch.randn(3, 6), torch.arange(3)
    term = create_method('nkd', gamma=1., temperature=2., mask_target=False)(
        Features(logits=student), Features(logits=teacher), target)['nkd_others_loss']
    expected = -4 * ((teacher / 2).softmax(1) * (student / 2).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(term, expected)


@pytest.mark.parametrize('classes', [1, 2, 5])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_confident_logits_of_few_classes_have_a_finite_loss_and_gradient(classes: int, dtype: torch.dtype) -> None:
    student = (1e4 * torch.eye(3, classes)).to(dtype).requires_grad_()
    teacher = (1e4 * torch.eye(classes)[[-1, 0, 0]]).to(dtype)
    loss = compute(student, teacher, torch.zeros(3).long())
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(student.grad).all()


def test_a_weight_of_zero_leaves_the_second_term_out_and_a_negative_one_is_refused() -> None:
    logits = Features(logits=torch.randn(2, 3))
    assert list(create_method('nkd', gamma=0.)(logits, logits, torch.arange(2))) == ['nkd_target_loss']
    with pytest.raises(UsageError, match='nkd.gamma'):
        create_method('nkd', gamma=-1.)
