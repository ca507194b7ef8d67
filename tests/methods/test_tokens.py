"""Tokens against the official code's numbers, on models of all kinds, and which targets they get."""
import logging
from typing import Any, Dict

import pytest
import timm
import torch
from feature_pairs import create_features, create_pair
from golden_data import GoldenCase, assert_golden, case_id, golden_cases
from timm.models.mlp_mixer import MlpMixer

from timm_distill import DistillTask, UsageError, create_distill_task, create_method
from timm_distill.features.spec import Features
from timm_distill.methods.tokens import TokenHead, squared_error, token_distance

SIZE = (3, 32, 32)
SWIN: Dict[str, Any] = dict(img_size=32, window_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 2))


@pytest.mark.parametrize('case', golden_cases('unic'), ids=case_id)
def test_loss_of_each_teacher_equals_unics(case: GoldenCase) -> None:
    weights = case.hparams['lam_lcos'], case.hparams['lam_lsl1']
    for name in case.hparams['teachers']:
        kinds = [[case[f'{name}.{kind}_{model}'] for model in 'st'] for kind in ('cls', 'patch')]
        for kind, pair in zip(('cls', 'patch'), kinds):
            assert_golden(token_distance(*pair, 1., 0.), case[f'{name}.loss_{kind}_cos'])
            assert_golden(token_distance(*pair, 0., 1.), case[f'{name}.loss_{kind}_sl1'])
        for i, expected in enumerate(case[f'{name}.loss_per_sample']):
            terms = [token_distance(s[i:i + 1], t[i:i + 1], *weights) for s, t in kinds]
            assert_golden((terms[0] + terms[1]) / 2, expected)


class Heads(torch.nn.Module):
    """A head that gives what it gets."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize('case', golden_cases('unic', lacking='b.cls_s'), ids=case_id)
def test_method_and_gradients_equal_unics_with_one_teacher(case: GoldenCase) -> None:
    weights = dict(cosine_weight=case.hparams['lam_lcos'], smooth_l1_weight=case.hparams['lam_lsl1'])
    method = create_method('tokens', **weights)
    method.class_head = method.patch_head = Heads()
    tokens, patches = (case[f'a.{kind}_s'].clone().requires_grad_() for kind in ('cls', 'patch'))

    def features(tokens: torch.Tensor, patches: torch.Tensor) -> Features:  # patches in one row
        return Features(pre_logits=tokens, feature=patches.mT[:, :, None])

    terms = method(features(tokens, patches), features(case['a.cls_t'], case['a.patch_t']), torch.zeros(1))
    loss = sum(terms.values())
    assert_golden(loss, case['loss'])
    loss.backward()
    assert_golden(tokens.grad, case['grad.a.cls_s'])
    assert_golden(patches.grad, case['grad.a.patch_s'])


def proteus_features(case: GoldenCase, model: str) -> Features:
    tokens, patches = (case[f'{kind}_{model}'].clone().requires_grad_(model == 's') for kind in ('cls', 'patch'))
    return Features(pre_logits=tokens, feature=patches.mT[:, :, None])


@pytest.mark.parametrize('case', golden_cases('proteus'), ids=case_id)
def test_token_and_feature_objective_equal_proteus(case: GoldenCase) -> None:
    hparams = case.hparams
    method = create_method(
        'tokens', loss='proteus', class_weight=hparams['lambda_token'], patch_weight=hparams['lambda_fea'])
    width, teacher_width = case['cls_s'].shape[1], case['cls_t'].shape[1]
    for name, head in (('class_head', 'token_head'), ('patch_head', 'fea_head')):
        layers = TokenHead(width, teacher_width).double()
        assert layers.norm.eps == hparams['layer_norm_eps']
        layers.load_state_dict(case.under(f'{head}.'))
        setattr(method, name, layers)
    terms = method(proteus_features(case, 's'), proteus_features(case, 't'), torch.zeros(1))
    assert_golden(terms['tokens_class_loss'], case['loss_token'])
    assert_golden(terms['tokens_patch_loss'], case['loss_fea'])
    sum(terms.values()).backward()
    for name in ('linear.weight', 'linear.bias', 'norm.weight', 'norm.bias'):
        assert_golden(method.class_head.get_parameter(name).grad, case[f'grad.token_head.{name}'])
        assert_golden(method.patch_head.get_parameter(name).grad, case[f'grad.fea_head.{name}'])


@pytest.mark.parametrize('case', golden_cases('proteus'), ids=case_id)
def test_masked_objective_of_proteus_is_a_squared_error_of_the_masked_patches(case: GoldenCase) -> None:
    head = TokenHead(case['cls_s'].shape[1], case['cls_t'].shape[1]).double()
    head.load_state_dict(case.under('patch_head.'))
    chosen = case['mask'].bool()
    error = squared_error(head(case['patch_s_masked'][chosen]), case['patch_t'][chosen])
    assert_golden(case.hparams['lambda_patch'] * error, case['loss_patch'])


@pytest.mark.parametrize('options, terms', [
    (dict(class_weight=0.), {'tokens_patch_loss'}), (dict(patch_weight=0.), {'tokens_class_loss'}),
    (dict(class_weight=0., loss='proteus'), {'tokens_patch_loss'}),
    (dict(patch_weight=0., loss='proteus'), {'tokens_class_loss'})])
def test_a_term_of_weight_0_is_left_out_with_its_head(options: Dict[str, Any], terms: set) -> None:
    method = create_method('tokens', **options)
    student, teacher = create_features('student'), create_features('teacher')
    method.build(create_pair(student, teacher))
    result = method(student, teacher, torch.zeros(4))
    assert set(result) == terms
    sum(result.values()).backward()
    assert all(p.grad is not None for p in method.parameters())


@pytest.mark.parametrize('options', [
    dict(class_weight=0., patch_weight=0.), dict(cosine_weight=0., smooth_l1_weight=0.)])
def test_a_loss_without_terms_is_refused(options: Dict[str, float]) -> None:
    with pytest.raises(UsageError, match='are both 0'):
        create_method('tokens', **options)


def test_grids_that_differ_are_pooled_to_the_smaller_whichever_is_larger() -> None:
    for grids in ((8, 4), (4, 8), (7, 5), (1, 4)):
        torch.manual_seed(0)
        student, teacher = (create_features(m, grids=(g,)) for m, g in zip(('student', 'teacher'), grids))
        method = create_method('tokens')
        method.build(create_pair(student, teacher))
        pool = torch.nn.functional.adaptive_avg_pool2d
        own, other = (pool(f.feature, min(grids)).flatten(2).mT for f in (student, teacher))
        expected = 0.5 * token_distance(method.patch_head(own), other)
        torch.testing.assert_close(method(student, teacher, torch.zeros(4))['tokens_patch_loss'], expected)


MODELS: Dict[str, Any] = {
    'cnn': ('test_efficientnet', {}),
    'vit': ('test_vit', dict(img_size=32, reg_tokens=2)),
    'swin': ('swin_tiny_patch4_window7_224', SWIN),
    'hybrid': ('mobilevit_xxs', dict(output_stride=16)),
    'mlp': (MlpMixer, dict(img_size=32, patch_size=8, embed_dim=16, num_blocks=2)),
}


def create_task(student: str, teacher: str, classes: int = 5, **options: Any) -> DistillTask:
    torch.manual_seed(0)
    models = [
        timm.create_model(model, num_classes=classes, **kwargs) if isinstance(model, str) else model(
            num_classes=classes, **kwargs) for model, kwargs in (MODELS[student], MODELS[teacher])]
    return create_distill_task(
        *models, kd='tokens', input_size=SIZE, has_labels=bool(classes), **{'verbose': False, **options}).train()


@pytest.mark.parametrize('teacher, student', [
    ('cnn', 'vit'), ('vit', 'swin'), ('swin', 'hybrid'), ('hybrid', 'mlp'), ('mlp', 'cnn'), ('vit', 'cnn')])
@pytest.mark.parametrize('classes', [5, 0], ids=['labels', 'headless'])
def test_models_of_all_kinds_teach_and_learn_with_and_without_classes(
        teacher: str, student: str, classes: int) -> None:
    task = create_task(student, teacher, classes)
    batch = torch.randn(6, *SIZE), torch.arange(6) % 5
    task.standardize_targets([batch])
    optimizer = torch.optim.Adam(task.module.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        result = task(*batch)
        losses.append((result['tokens_class_loss'] + result['tokens_patch_loss']).item())
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_loss_falls_over_thirty_steps_at_the_default_weight() -> None:
    task = create_task('cnn', 'vit')
    batch = torch.randn(4, *SIZE), torch.arange(4)
    task.standardize_targets([batch])
    optimizer = torch.optim.Adam(task.module.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        result = task(*batch)
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
        losses.append((result['loss'] - result['task_loss']).item())
    assert losses[-1] < 0.9 * losses[0]


def test_targets_are_standardised_by_channel_unless_the_flag_says_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        task = create_task('cnn', 'vit', verbose=True)
    assert task.module.standardized == {'tokens'} and task.teacher.standardizer.mode == 'channel'
    assert len([m for m in caplog.messages if 'standardised (--teacher-standardize channel) for tokens' in m]) == 1
    task = create_task('cnn', 'vit', teacher_standardize='none')
    assert not task.module.standardized and not task.needs_target_statistics


@pytest.mark.parametrize('name', ['tokenz', 'tokns'])
def test_a_mistyped_name_is_answered_with_it(name: str) -> None:
    with pytest.raises(UsageError, match='tokens'):
        create_method(name)
