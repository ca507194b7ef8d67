"""Pooled-feature distillation against timm's own task."""
from typing import Any, Dict

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import FeatureDistillationTask

from timm_distill import UsageError, create_distill_task, create_method
from timm_distill.features.spec import Features
from timm_distill.methods.feature import cosine_distance

TEACHERS: Dict[str, Dict[str, Any]] = {'test_vit': {'img_size': 32}, 'test_resnet': {}}
SIZE = (3, 32, 32)


def create_model(name: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=5, **TEACHERS.get(name, {})).double()


COMPLEMENTS = {0.3: {'distill_loss_weight': 0.7}}  # timm's tasks take 1 minus the weight of the task loss by themselves


@pytest.mark.parametrize('weights', [{}, {'task_loss_weight': 0.3}, {'distill_loss_weight': 5.}])
@pytest.mark.parametrize('teacher', TEACHERS)
def test_losses_and_gradients_equal_timms_own_task(teacher: str, weights: Dict[str, float]) -> None:
    theirs = FeatureDistillationTask(
        create_model('test_vit', 1), create_model(teacher, 2), torch.nn.CrossEntropyLoss(), dtype=torch.float64,
        verbose=False, **weights).train()
    ours = create_distill_task(
        create_model('test_vit', 1), create_model(teacher, 2), kd='feature', input_size=SIZE, dtype=torch.float64,
        verbose=False, **{**weights, **COMPLEMENTS.get(weights.get('task_loss_weight', 1.), {})}).train()
    projection = theirs.trainable_module.projection
    assert (projection is None) == (teacher == 'test_vit') == (ours.module.methods['feature'].projection is None)
    if projection is not None:
        ours.module.methods['feature'].projection.load_state_dict(projection.state_dict())
    images, target = torch.randn(4, *SIZE, dtype=torch.float64), torch.arange(4)
    expected, actual = theirs(images, target), ours(images, target)
    for name, own in (('loss', 'loss'), ('task_loss', 'task_loss'), ('kd_loss', 'feature_loss'), ('output', 'output')):
        torch.testing.assert_close(actual[own], expected[name], rtol=1e-10, atol=1e-12)
    expected['loss'].backward(), actual['loss'].backward()
    gradients = dict(theirs.trainable_module.student.named_parameters())
    for name, parameter in ours.module.student.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-8, atol=1e-12)


def test_cosine_compares_directions_alone() -> None:
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    torch.testing.assert_close(cosine_distance(student, teacher), 1 - F.cosine_similarity(student, teacher).mean())
    torch.testing.assert_close(cosine_distance(3 * student, teacher), cosine_distance(student, teacher))
    features = Features(pre_logits=student), Features(pre_logits=teacher)
    loss = create_method('feature', loss='cosine')(*features, torch.zeros(4))
    torch.testing.assert_close(loss['feature_loss'], cosine_distance(student, teacher))


def test_zero_features_have_finite_gradients() -> None:
    student = torch.zeros(1, 6, requires_grad=True)
    cosine_distance(student, torch.randn(1, 6)).backward()
    assert torch.isfinite(student.grad).all()


def test_wrong_loss_is_named() -> None:
    with pytest.raises(UsageError, match='mse, cosine'):
        create_method('feature', loss='l1')
