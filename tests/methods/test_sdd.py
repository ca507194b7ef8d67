"""SDD against the official code's numbers, what it takes, and where regions make no sense."""
import logging
from typing import Any, Callable, Dict, Tuple

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from golden_data import GoldenCase, assert_golden, case_id, golden_cases
from timm.models.mlp_mixer import MlpMixer

from timm_distill import DistillTask, UsageError, create_distill_task, create_method, merge_student
from timm_distill.features.spec import Features
from timm_distill.methods import METHODS, DistillMethod
from timm_distill.methods._composition import Recipe, create_composition, methods_taken_by
from timm_distill.methods._schedules import WarmupSchedule
from timm_distill.methods.sdd import region_weights

CASES = golden_cases('sdd')
SIZE = (3, 64, 64)
CLASSES = 5
TAKEN = methods_taken_by(METHODS.get('sdd').cls)


def create_golden(case: GoldenCase) -> DistillMethod:
    """Return the method with a case's options; its nkd keeps the target class in the second term."""
    variant, hparams = case.hparams['variant'], case.hparams
    options = {
        'kd': {'temperature': hparams.get('temperature')},
        'dkd': {name: hparams.get(name) for name in ('alpha', 'beta', 'temperature')},
        'nkd': {'temperature': hparams.get('temp'), 'gamma': hparams.get('gamma'), 'mask_target': False},
    }
    return create_method(f'sdd:{variant}', scales=hparams['M'], **{variant: options[variant]})


def golden_features(case: GoldenCase, side: str) -> Tuple[Features, Dict[str, torch.Tensor]]:
    tensors = {name: case[name].clone().requires_grad_(side == 's') for name in (
        f'feat_{side}', f'fc_{side}.weight', f'fc_{side}.bias')}
    feature, weight, bias = tensors.values()
    return Features(feature=feature, head=lambda x: F.linear(x.flatten(1), weight, bias)), tensors


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_loss_regions_and_gradients_equal_the_official_codes(case: GoldenCase) -> None:
    method = create_golden(case)
    (student, tensors), (teacher, _) = golden_features(case, 's'), golden_features(case, 't')
    for side, features in (('s', student), ('t', teacher)):
        assert_golden(method.region_logits(features).permute(1, 2, 0), case[f'patch_{side}'])
    weights = region_weights(method.region_logits(teacher), case['target'])
    assert_golden(weights.double(), case['region_weight'].double())
    hparams = case.hparams
    scale = hparams['kd_weight'] if 'kd_weight' in hparams else WarmupSchedule(hparams['warmup'])(hparams['epoch'] - 1)
    loss = scale * sum(method(student, teacher, case['target']).values())
    assert_golden(loss, case['loss_kd'])
    for name, gradient in zip(tensors, torch.autograd.grad(loss, list(tensors.values()))):
        assert_golden(gradient, case[f'grad_kd.{name}'])


def create_model(name: str, **kwargs: Any) -> nn.Module:
    return timm.create_model(name, num_classes=CLASSES, **kwargs)


# all with maps of 4 x 4 at that size
SWIN: Dict[str, Any] = dict(img_size=64, window_size=4, embed_dim=8, depths=(1, 1, 1), num_heads=(1, 2, 4))
MIXER: Dict[str, Any] = dict(img_size=64, patch_size=16, embed_dim=16, num_blocks=2, num_classes=CLASSES)
VIT: Dict[str, Any] = dict(img_size=64, class_token=False, global_pool='avg', fc_norm=False)
KINDS: Dict[str, Callable[[], nn.Module]] = {
    'cnn': lambda: create_model('test_efficientnet', output_stride=16),
    'vit': lambda: create_model('test_vit', **VIT),
    'swin': lambda: create_model('swin_tiny_patch4_window7_224', **SWIN),
    'mlp': lambda: MlpMixer(**MIXER),
    'hybrid': lambda: create_model('mobilevit_xxs', output_stride=16),
}


def create_task(
        student: str = 'cnn',
        teacher: str = 'cnn',
        kd: str = 'sdd:kd',
        size: Tuple[int, int, int] = SIZE,
        **options: Any,
) -> DistillTask:
    torch.manual_seed(0)
    return create_distill_task(
        KINDS[student](), KINDS[teacher](), kd=kd, input_size=size, verbose=False, **options).train()


def create_batch(soft: bool = False, size: int = 2) -> Tuple[torch.Tensor, torch.Tensor]:
    target = torch.arange(size) % CLASSES
    return torch.randn(size, *SIZE), (0.7 * torch.eye(CLASSES)[target] + 0.3 / CLASSES if soft else target)


@pytest.mark.parametrize('teacher', KINDS)
def test_every_kind_of_model_teaches_and_learns(teacher: str, caplog: pytest.LogCaptureFixture) -> None:
    student = [*KINDS, *KINDS][list(KINDS).index(teacher) + 1]
    task = create_task(student, teacher)
    assert 'not linear' not in caplog.text
    for soft in (False, True):
        result = task(*create_batch(soft))
        result['loss'].backward()
        assert torch.isfinite(result['sdd:kd_loss'])
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in task.module.parameters())
    assert all(p.grad is None for p in task.teacher.parameters())


@pytest.mark.parametrize('inner', TAKEN)
def test_it_takes_every_logit_method_with_its_weight(inner: str) -> None:
    task = create_task(kd=f'sdd:{inner}')
    assert task.weights == {f'sdd:{inner}': METHODS.get(inner).cls.published_weight}
    result = task(*create_batch())
    terms = {name for name in result if name.endswith('_loss')} - {'task_loss'}
    assert terms and all(name.startswith(f'sdd:{inner}_') and torch.isfinite(result[name]) for name in terms)
    result['loss'].backward()
    assert all(torch.isfinite(p.grad).all() for p in task.module.parameters())


def test_of_equal_regions_it_is_the_inner_method_by_itself() -> None:
    student, teacher = torch.randn(3, 4), torch.randn(3, 4)

    def repeat(x: torch.Tensor) -> Features:
        return Features(logits=x, feature=x[:, :, None, None].expand(-1, -1, 8, 8), head=lambda x: x.flatten(1))

    for inner in ('kd', 'dkd', 'nkd', 'ttm', 'wttm', 'logitstd', 'bce_kd'):
        plain = create_method(inner)(repeat(student), repeat(teacher), torch.arange(3))
        regions = create_method(f'sdd:{inner}')(repeat(student), repeat(teacher), torch.arange(3))
        assert list(regions) == [f'sdd:{name}' for name in plain]
        torch.testing.assert_close(list(regions.values()), list(plain.values()))


def test_regions_that_the_teacher_knows_better_or_worse_than_the_image_count_double() -> None:
    right, wrong = torch.tensor([1., 0.]), torch.tensor([0., 1.])
    regions = torch.stack([torch.stack([right, wrong]), torch.stack([wrong, right]), torch.stack([right, right])])
    classes = torch.zeros(2, dtype=torch.long)
    torch.testing.assert_close(region_weights(regions, classes), torch.tensor([[1., 1.], [2., 2.], [1., 2.]]))
    assert region_weights(regions, classes, 1.).eq(1).all()


def test_a_schedule_of_an_inner_term_is_that_of_the_whole() -> None:
    task = create_task(kd='sdd:wkd_l', kd_schedule={'sdd': 'decay:0'}, num_epochs=1)
    result = task(*create_batch())
    weights = task.term_weights()
    assert weights['sdd:wkd_l'] == 0. and weights['sdd:wkd_l_target'] == 1.
    torch.testing.assert_close(result['loss'], result['task_loss'] + result['sdd:wkd_l_target_loss'])


def test_it_is_finite_in_bfloat16_with_one_image_and_for_a_student_in_eval_mode() -> None:
    task = create_task()
    task.student.eval()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = task(*create_batch(size=1))
    result['loss'].backward()
    assert result['sdd:kd_loss'].dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in task.module.parameters())


def test_the_loss_falls_over_thirty_steps_at_the_default_weight() -> None:
    for inner in ('kd', 'nkd'):
        task, batch = create_task(kd=f'sdd:{inner}'), create_batch()
        optimizer = torch.optim.Adam(task.module.parameters(), lr=2e-3)
        losses = []
        for _ in range(30):
            loss = task(*batch)['loss']
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < 0.9 * losses[0]


# What it cannot do

def test_a_map_without_the_regions_is_refused() -> None:
    coarse = create_model('test_efficientnet')
    for side in ('student', 'teacher'):
        models = {'student': KINDS['cnn'](), 'teacher': KINDS['cnn'](), side: coarse}
        with pytest.raises(UsageError, match=f'sdd.scales=1,2,4: the last map of the {side} is 2x2') as error:
            create_distill_task(**models, kd='sdd:kd', input_size=SIZE, verbose=False)
        assert 'kd_kwargs sdd.scales=1,2' in str(error.value)
        create_distill_task(
            **models, kd='sdd:kd', kd_kwargs={'sdd.scales': '1,2'}, input_size=SIZE, verbose=False)
    with pytest.raises(UsageError, match='is 1x1 and has no 2x2 regions. Use a larger input_size[.]'):
        create_distill_task(
            coarse, coarse, kd='sdd:kd', kd_kwargs={'sdd.scales': '1,2'}, input_size=(3, 32, 32), verbose=False)


@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_a_head_that_reads_a_class_token_is_refused(side: str) -> None:
    models = {'student': KINDS['cnn'](), 'teacher': KINDS['cnn']()}
    models[side] = create_model('test_vit', img_size=64)
    with pytest.raises(UsageError, match=f'head of the {side} cannot be run on a region'):
        create_distill_task(**models, kd='sdd:kd', input_size=SIZE, verbose=False)


def test_a_head_with_batch_norm_is_refused_for_the_student_whose_statistics_it_would_move() -> None:
    student = KINDS['cnn']()
    student.classifier = nn.Sequential(nn.BatchNorm1d(student.num_features), nn.Linear(student.num_features, CLASSES))
    with pytest.raises(UsageError, match='head of the student cannot be run on a region'):
        create_distill_task(student, KINDS['cnn'](), kd='sdd:kd', input_size=SIZE, verbose=False)
    create_distill_task(KINDS['cnn'](), student.eval(), kd='sdd:kd', input_size=SIZE, verbose=False)


def test_a_head_that_is_not_linear_is_said_in_one_message(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        task = create_distill_task(
            create_model('test_convnext', output_stride=16), create_model('test_convnext', output_stride=16),
            kd='sdd:kd', input_size=SIZE, verbose=False)
    assert caplog.text.count('the head of the student and of the teacher is not linear') == 1
    assert torch.isfinite(task(*create_batch())['loss'])


def test_other_classes_are_refused() -> None:
    with pytest.raises(UsageError, match='kd sdd:kd compares logits, but the teacher has 7 classes'):
        create_distill_task(
            KINDS['cnn'](), timm.create_model('test_resnet', num_classes=7), 'sdd:kd', input_size=SIZE, verbose=False)


@pytest.mark.parametrize(('kd', 'message'), [
    ('sdd', 'sdd takes a method, sdd:METHOD with one of bce_kd, dkd, kd'), ('sdd:', 'sdd takes a method'),
    ('sdd:rkd', 'sdd takes a method, sdd:METHOD'), ('sdd:sdd:kd', 'sdd takes a method, sdd:METHOD'),
    ('kd:nkd', 'kd takes no method; sdd does'), ('sdd:kdd', "Unknown method 'kdd', did you mean 'kd'"),
    ('sdd:kd+sdd:kd', 'different names'), ('srd:kd', 'srd takes no method'), ('sdd:kd++', 'Unknown method|different'),
])
def test_what_it_does_not_take_is_one_message(kd: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        create_composition(Recipe(kd))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(('kd_kwargs', 'message'), [
    ({'sdd.kd.temperature': 0.}, r'sdd[.]kd[.]temperature=0.0 must be .* \(--kd-kwargs sdd[.]kd[.]temperature=4.0\)'),
    ({'sdd.kd.beta': 1.}, "Unknown option 'sdd.kd.beta'.*takes for sdd.kd: sdd.kd.temperature, sdd.kd.hard"),
    ({'sdd.scale': 1}, "Unknown option 'sdd.scale', did you mean 'scales'"), ({'sdd.scales': '1,3'}, 'sdd.scales'),
    ({'sdd.kd': 4}, 'sdd.kd=4 must be sdd.kd.OPTION=VALUE'),
    ({'sdd.scales': 4}, 'sdd.scales'), ({'sdd.nkd.gamma': 1.}, "Unknown option 'sdd.nkd.gamma'"),
    ({'kd.temperature': 2.}, "the method 'kd' is not in --kd sdd:kd; it takes: sdd:kd"),
])
def test_an_option_that_it_has_not_is_one_message(kd_kwargs: Dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_composition(Recipe('sdd:kd', kd_kwargs=kd_kwargs))


# How it is spelt

@pytest.mark.parametrize('kd_kwargs', [
    {'sdd.kd.temperature': 2., 'sdd.scales': (1, 2)}, {'sdd:kd.kd.temperature': 2., 'sdd:kd.scales': [1, 2]},
    {'sdd': {'kd': {'temperature': 2.}, 'scales': '1,2'}}, {'sdd': {'kd.temperature': 2., 'scales': '1,2'}},
])
def test_options_reach_wrapper_and_inner_method_in_every_spelling(kd_kwargs: Dict[str, Any]) -> None:
    method = create_composition(Recipe('sdd:kd', kd_kwargs=kd_kwargs)).methods['sdd:kd']
    assert method.inner.temperature == 2. and method.scales == (1, 2)


@pytest.mark.parametrize('name', ['sdd', 'sdd:dkd'])
def test_weights_and_schedules_take_its_name_or_the_wrappers(name: str) -> None:
    composition = create_composition(Recipe(
        'norm+sdd:dkd+kd', kd_weight={name: 0.5}, kd_schedule={name: 'warmup:20'}))
    assert list(composition.weights) == ['norm', 'sdd:dkd', 'kd'] and composition.weights['sdd:dkd'] == 0.5
    assert composition.schedules['sdd:dkd'](0) == 1 / 20


@pytest.mark.parametrize('flag', ['kd_weight', 'kd_schedule'])
def test_a_method_that_is_named_twice_is_refused(flag: str) -> None:
    with pytest.raises(UsageError, match=f'--{flag.replace("_", "-")} gives sdd:kd two values'):
        create_composition(Recipe('sdd:kd', **{flag: {'sdd': 1., 'sdd:kd': 2.}}))


def test_two_of_it_are_told_apart_by_their_names() -> None:
    composition = create_composition(Recipe(
        'sdd:kd+sdd:dkd', kd_weight={'sdd:dkd': 3.}, kd_kwargs={'sdd:kd.scales': '1,2', 'sdd:dkd.dkd.beta': 2.}))
    assert composition.weights == {'sdd:kd': 1., 'sdd:dkd': 3.}
    assert composition.methods['sdd:kd'].scales == (1, 2) and composition.methods['sdd:dkd'].inner.beta == 2.
    with pytest.raises(UsageError, match='has sdd:kd and sdd:dkd; write which'):
        create_composition(Recipe('sdd:kd+sdd:dkd', kd_weight={'sdd': 3.}))


def test_beside_norm_it_reads_the_adapted_student_and_merges_exactly() -> None:
    task = create_task(kd='norm+sdd:kd', kd_kwargs={'norm.segments': 2})
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01)
    result = task(*create_batch())
    result['loss'].backward()
    optimizer.step()
    images = create_batch()[0]
    with torch.no_grad():
        expected, actual = task.module.eval()(images), merge_student(task)(images)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_inside_of_the_head_is_refused_and_beside_it_works() -> None:
    student = create_model('test_convnext', output_stride=16)
    models = dict(student=student, teacher=KINDS['cnn'](), kd='norm+sdd:kd', input_size=SIZE)
    with pytest.raises(UsageError, match='sits inside of that head .*kd_tap side'):
        create_distill_task(**models, verbose=False)
    task = create_distill_task(**models, kd_tap='side', kd_kwargs={'norm.segments': 2}, verbose=False)
    assert torch.isfinite(task(*create_batch())['loss'])


def test_logit_maps_of_other_methods_hold_for_the_regions() -> None:
    task = create_task(kd='norm+sdd:kd', kd_kwargs={'norm.segments': 2, 'norm.logit_scale': 2.5, 'sdd.scales': '1,2'})
    seen = []
    task.module.methods['sdd:kd'].inner.register_forward_pre_hook(lambda *args: None)
    original = task.module.methods['sdd:kd'].inner.sample_losses
    task.module.methods['sdd:kd'].inner.sample_losses = lambda s, t, y: seen.extend([s, t]) or original(s, t, y)
    task(*create_batch())
    for logits in seen:
        torch.testing.assert_close(logits.std(1, correction=0), torch.full((len(logits),), 2.5), rtol=1e-2, atol=1e-2)


def test_state_saved_and_loaded_goes_on_bit_identical_under_its_own_name() -> None:
    task, other = create_task(kd='sdd:kd'), create_task(kd='sdd:kd')
    task(*create_batch())['loss'].backward()
    torch.optim.SGD(task.module.parameters(), lr=0.1).step()
    state = task.get_checkpoint_state()
    assert state['task_state']['kd'] == ['sdd:kd']
    other.load_checkpoint_state(**state)
    batch = create_batch()
    assert torch.equal(task(*batch)['loss'], other(*batch)['loss'])
    with pytest.raises(UsageError, match='written with --kd sdd:kd, this run has --kd sdd:dkd'):
        create_task(kd='sdd:dkd').load_checkpoint_state(**state)


def test_the_list_says_what_it_takes() -> None:
    from timm_distill.methods import describe_methods
    block = next(block for block in describe_methods().split('\n\n') if block.startswith('sdd: '))
    assert f'takes     one of {", ".join(TAKEN)}: --kd sdd:bce_kd' in block
    assert TAKEN == sorted({'bce_kd', 'dkd', 'kd', 'logitstd', 'nkd', 'ttm', 'wttm', 'wkd_l'})
