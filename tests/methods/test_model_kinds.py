"""Methods of 2023 and later between models of five kinds: convolutions, ViT, Swin (NHWC), MLP and a hybrid."""
from typing import Any, Callable, Dict, Tuple

import pytest
import timm
import torch
import torch.nn as nn
from timm.models.mlp_mixer import MlpMixer

from timm_distill import DistillTask, create_distill_task
from timm_distill.methods._composition import published_weight

SIZE = (3, 32, 32)
CLASSES = 5
GROUPS = {  # methods that are trained together, and terms that fall within a few steps
    ('nkd', 'srd', 'ttm', 'vkd', 'wkd_f', 'wkd_l', 'wttm'): ('srd_loss', 'vkd_loss'),
    ('scalekd', 'vitkd'): ('scalekd_s4_direct_loss',),
}
METHODS = tuple(name for group in GROUPS for name in group)
SWIN: Dict[str, Any] = dict(img_size=32, window_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 2))
KINDS: Dict[str, Callable[[], nn.Module]] = {
    'cnn': lambda: timm.create_model('test_efficientnet', num_classes=CLASSES, output_stride=8),
    'vit': lambda: timm.create_model('test_vit', num_classes=CLASSES, img_size=32),
    'swin': lambda: timm.create_model('swin_tiny_patch4_window7_224', num_classes=CLASSES, **SWIN),
    'mlp': lambda: MlpMixer(num_classes=CLASSES, img_size=32, patch_size=8, embed_dim=16, num_blocks=2),
    'hybrid': lambda: timm.create_model('mobilevit_xxs', num_classes=CLASSES, output_stride=16),
}
FOLLOWING = dict(zip(KINDS, [*KINDS][1:] + [*KINDS][:1]))  # each kind teaches once and learns once


def create_task(teacher: str, kd: str) -> DistillTask:
    torch.manual_seed(0)
    return create_distill_task(
        KINDS[FOLLOWING[teacher]](), KINDS[teacher](), kd=kd, input_size=SIZE, verbose=False).train()


def create_batch(soft: bool) -> Tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    target = torch.arange(4)
    mixed = 0.6 * torch.eye(CLASSES)[target] + 0.3 * torch.eye(CLASSES)[target.flip(0)] + 0.1 / CLASSES
    return torch.randn(4, *SIZE, generator=generator), mixed if soft else target


@pytest.mark.parametrize('teacher', KINDS)
@pytest.mark.parametrize('methods', GROUPS, ids='+'.join)
def test_all_together_train_at_their_default_weights_with_mixed_labels_too(
        methods: Tuple[str, ...], teacher: str) -> None:
    task = create_task(teacher, '+'.join(methods))
    assert task.weights == {name: published_weight(name) for name in methods}
    optimizer = torch.optim.Adam(task.module.parameters(), lr=2e-3)
    losses, terms = [], []
    for step in range(9):
        result = task(*create_batch(soft=step == 5))
        assert all(torch.isfinite(value).all() for value in result.values())
        optimizer.zero_grad()
        result['loss'].backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in task.module.parameters())
        optimizer.step()
        losses.append(result['loss'].item())
        terms.append({name: value.item() for name, value in result.items() if name.endswith('_loss')})
    assert losses[-1] < losses[0]
    assert all(terms[-1][name] < terms[0][name] for name in GROUPS[methods])


@pytest.mark.parametrize('method', METHODS)
def test_the_loss_falls_over_thirty_steps_at_the_default_weight(method: str) -> None:
    torch.manual_seed(0)
    models = [timm.create_model(name, num_classes=CLASSES) for name in ('test_efficientnet', 'test_resnet')]
    task = create_distill_task(*models, kd=method, input_size=SIZE, verbose=False).train()
    batch = create_batch(soft=False)
    optimizer = torch.optim.Adam(task.module.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = task(*batch)['loss']
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize('method', METHODS)
def test_a_student_that_is_its_own_teacher_has_a_finite_gradient(method: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model('test_efficientnet', num_classes=CLASSES)
    task = create_distill_task(model, model, kd=method, input_size=SIZE, verbose=False).eval()
    result = task(*create_batch(soft=False))
    result['loss'].backward()
    assert all(torch.isfinite(value).all() for value in result.values())
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in task.module.parameters())


@pytest.mark.parametrize('method', METHODS)
def test_two_classes_are_enough(method: str) -> None:
    torch.manual_seed(0)
    student, teacher = (timm.create_model('test_efficientnet', num_classes=2) for _ in range(2))
    task = create_distill_task(student, teacher, kd=method, input_size=SIZE, verbose=False).train()
    result = task(torch.randn(4, *SIZE), torch.tensor([0, 1, 1, 0]))
    result['loss'].backward()
    assert all(torch.isfinite(value).all() for value in result.values())
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in task.module.parameters())
