"""VkD against the official code's numbers, and a projector that stays orthogonal."""
from typing import Any, Dict

import pytest
import timm
import torch
import torch.nn.functional as F
from golden_data import GoldenCase, assert_golden, case_id, golden_cases
from timm.optim import create_optimizer_v2

from timm_distill import DistillTask, create_distill_task
from timm_distill.losses import kl_divergence
from timm_distill.methods.vkd import (
    OrthogonalProjector,
    normalize_teacher,
    orthonormal_factor,
    project,
    representation_loss,
)

CASES = golden_cases('vkd')


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_terms_and_gradients_equal_the_official_codes(case: GoldenCase) -> None:
    hparams = case.hparams
    tokens, weight = (case[name].clone().requires_grad_() for name in ('tokens_s', 'projector.weight'))
    projected, teacher = project(tokens.mean(1), weight), case['feat_t'].mean((2, 3))
    assert_golden(projected, case['projected_s'])
    assert_golden(normalize_teacher(teacher), case['normed_t'])
    loss = hparams['alpha'] * representation_loss(projected, teacher)
    assert_golden(loss, case['loss_repr'])
    loss.backward()
    assert_golden(tokens.grad, case['grad_repr.tokens_s'])
    assert_golden(weight.grad, case['grad_repr.projector.weight'])
    logits, token_logits = (
        F.linear(case[f'z_{token}_s'], case[f'{head}.weight'], case[f'{head}.bias'])
        for token, head in (('cls', 'head'), ('dist', 'head_dist')))
    divergence = hparams['gamma'] * kl_divergence(token_logits, case['logit_t'], hparams['temperature'])
    assert_golden(divergence, case['loss_kl'])
    assert_golden(F.cross_entropy(logits, case['target']) + divergence + loss, case['loss'])


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_projector_holds_the_official_matrix_and_maps_as_it_does(case: GoldenCase) -> None:
    weight = case['projector.weight']
    projector = OrthogonalProjector(weight.shape[1], weight.shape[0]).double()
    projector.load_state_dict({'free': 7 * weight})
    assert_golden(projector.weight, weight)
    assert_golden(projector(case['tokens_s'].mean(1)), case['projected_s'])


def orthogonality_error(weight: torch.Tensor) -> float:
    small = weight if weight.shape[0] <= weight.shape[1] else weight.mT
    return (small @ small.mT - torch.eye(len(small), dtype=weight.dtype)).abs().max().item()


@pytest.mark.parametrize('shape', [(9, 4), (4, 9), (6, 6), (5, 1), (1, 1)])
def test_orthonormal_factor_is_orthogonal_unique_and_smooth(shape: tuple) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    factor = orthonormal_factor(x)
    assert orthogonality_error(factor) < 1e-12
    torch.testing.assert_close(orthonormal_factor(3 * x), factor)
    torch.testing.assert_close(orthonormal_factor(factor), factor)
    assert torch.autograd.gradcheck(orthonormal_factor, (x,))


def create_task(student: str = 'test_efficientnet', kd: str = 'vkd', **options: Any) -> DistillTask:
    torch.manual_seed(0)
    return create_distill_task(
        timm.create_model(student, num_classes=5), timm.create_model('test_resnet', num_classes=5), kd=kd,
        input_size=(3, 32, 32), verbose=False, **options).train()


OPTIMIZERS: Dict[str, Dict[str, Any]] = {
    'adamw': {}, 'layer decay': {'layer_decay': 0.7}, 'all decay': {'filter_bias_and_bn': False},
    'all decay by layer': {'filter_bias_and_bn': False, 'layer_decay': 0.7}, 'sgd': {'opt': 'sgd'},
    'lamb': {'opt': 'lamb'}, 'muon': {'opt': 'muon'},
}


@pytest.mark.parametrize('kind', OPTIMIZERS)
def test_a_step_with_weight_decay_leaves_the_projector_orthogonal_and_undecayed(kind: str) -> None:
    task = create_task()
    options = {'opt': 'adamw', 'lr': 0.1, 'weight_decay': 0.5, **OPTIMIZERS[kind]}
    optimizer = create_optimizer_v2(task.trainable_module, **options)
    projector = task.module.methods['vkd'].projector
    groups = [g for g in optimizer.param_groups if any(p is projector.free for p in g['params'])]
    assert [g['weight_decay'] for g in groups] == [0.]
    before = projector.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        task(torch.randn(4, 3, 32, 32), torch.arange(4))['loss'].backward()
        optimizer.step()
    assert orthogonality_error(projector.weight) < 1e-5
    assert (projector.weight - before).abs().max() > 1e-4 and projector.weight.abs().max() > 0.01


def test_decay_of_the_free_matrix_alone_does_not_move_the_projector() -> None:
    projector = OrthogonalProjector(4, 9)
    before = projector.weight.detach().clone()
    with torch.no_grad():
        projector.free.mul_(1e-3)
    torch.testing.assert_close(projector.weight, before)


def test_the_distillation_token_adds_the_published_divergence() -> None:
    task = create_distill_task(
        timm.create_model(
            'deit_tiny_distilled_patch16_224', num_classes=5, img_size=32, embed_dim=32, depth=2, num_heads=2),
        timm.create_model('test_resnet', num_classes=5), kd='vkd+token', input_size=(3, 32, 32), verbose=False,
        kd_kwargs={'token': {'hard': False, 'temperature': 1.}})
    result = task(torch.randn(2, 3, 32, 32), torch.arange(2))
    assert {'vkd_loss', 'token_loss'} <= set(result) and task.weights['vkd'] == 1.


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_a_projector_of_low_precision_is_orthogonal_in_float32(dtype: torch.dtype) -> None:
    projector = OrthogonalProjector(8, 16).to(dtype)
    assert projector.weight.dtype == torch.float32 and orthogonality_error(projector.weight) < 1e-5
    assert projector(torch.randn(2, 8).to(dtype)).dtype == torch.float32
