"""Binary distillation against the formula written out, and its edges."""
import pytest
import torch

from timm_distill import UsageError, create_method
from timm_distill.features.spec import Features
from timm_distill.methods.bce_kd import binary_kd_losses


@pytest.mark.parametrize('target', ['softmax', 'sigmoid'])
@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_loss_is_the_binary_cross_entropy_of_every_class(target: str, reduction: str) -> None:
    student, teacher, temperature = torch.randn(4, 6).double(), torch.randn(4, 6).double(), 2.
    p = (teacher / temperature).softmax(1) if target == 'softmax' else (teacher / temperature).sigmoid()
    q = (student / temperature).sigmoid()
    entropies = -(p * q.log() + (1 - p) * (1 - q).log()) * temperature ** 2
    expected = entropies.mean() if reduction == 'mean' else entropies.sum(1).mean()
    torch.testing.assert_close(binary_kd_losses(student, teacher, target, temperature, reduction).mean(), expected)


def test_with_sigmoid_targets_the_teachers_logits_are_the_minimum() -> None:
    logits = torch.randn(3, 5).double().requires_grad_()
    binary_kd_losses(logits, logits.detach(), 'sigmoid').mean().backward()
    assert logits.grad.abs().max() < 1e-12


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('target', ['softmax', 'sigmoid'])
def test_confident_logits_have_a_finite_loss_and_gradient(target: str, dtype: torch.dtype) -> None:
    student = (1e4 * (2 * torch.eye(3, 5) - 1)).to(dtype).requires_grad_()
    loss = binary_kd_losses(student, (1e4 * torch.eye(5)[2:]).to(dtype), target).mean()
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(student.grad).all()


def test_method_passes_its_options_and_gives_the_teacher_no_gradient() -> None:
    student, teacher = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    options = dict(target='sigmoid', temperature=2., reduction='sum')
    loss = create_method('bce_kd', **options)(Features(logits=student), Features(logits=teacher), torch.zeros(2))
    assert loss == {'bce_kd_loss': binary_kd_losses(student, teacher, **options).mean()}
    loss['bce_kd_loss'].backward()
    assert student.grad is not None and teacher.grad is None


@pytest.mark.parametrize('option', [{'target': 'tanh'}, {'reduction': 'max'}, {'temperature': 0.}])
def test_impossible_options_are_named(option: dict) -> None:
    with pytest.raises(UsageError, match=f'bce_kd.{next(iter(option))}'):
        create_method('bce_kd', **option)
