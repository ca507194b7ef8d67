"""Standardised targets: the official codes' numbers, which methods get them, and what stays as it is."""
import copy
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest
import timm
import torch
import torch.nn as nn
from golden_data import GoldenCase, assert_golden, case_id, golden_cases
from ranks import run_ranks

from timm_distill import DistillTask, UsageError, create_distill_task, create_teacher, list_methods
from timm_distill.features.spec import Features
from timm_distill.methods import METHODS
from timm_distill.methods._wrapper import WrapperMethod
from timm_distill.teacher.standardize import (
    Standardizer,
    channel_deviations,
    choose_standardized,
    phi_s_matrix,
    rotate_channels,
    standardize_channels,
)

SIZE = (3, 32, 32)
CLASSES = 5
MODES = ('channel', 'phi-s')
PRE_LOGITS = frozenset({'pre_logits'})
FEATURE = frozenset({'feature'})


def as_map(x: torch.Tensor) -> torch.Tensor:
    """Tokens [B, N, C] as a map of one row; class tokens [B, C] as they are."""
    return x if x.ndim == 2 else x.mT[:, :, None]


def measure(x: torch.Tensor, mode: str = 'channel') -> Standardizer:
    standardizer = Standardizer(mode)
    standardizer.add(Features(feature=x), FEATURE)
    standardizer.finish()
    return standardizer


def apply(standardizer: Standardizer, x: torch.Tensor) -> torch.Tensor:
    features = standardizer(Features(feature=x), FEATURE)
    assert features is not None and features.feature is not None
    return features.feature


@pytest.mark.parametrize('case', golden_cases('teacher_norm'), ids=case_id)
def test_statistics_of_a_batch_are_those_that_unic_and_dune_average(case: GoldenCase) -> None:
    # UNIC adds eps to the deviation; the average over batches, which starts at 0 and 1, is theirs alone
    is_unic = case.name.startswith('unic')
    eps = case.hparams['eps'] if is_unic else 0.
    mean, std = torch.zeros(()), torch.ones(())
    for call, momentum in zip(('call1', 'call2'), case.hparams['ema_momentum']):
        own_mean, own_std = measure(as_map(case[f'{call}.x'])).statistics['feature']
        mean = (1 - momentum) * mean + momentum * own_mean
        std = (1 - momentum) * std + momentum * (own_std + eps)
        assert_golden(mean, case[f'{call}.mean'])
        assert_golden(std, case[f'{call}.std'])


@pytest.mark.parametrize('case', golden_cases('teacher_norm'), ids=case_id)
def test_channels_are_standardised_as_unic_and_dune_do_with_given_statistics(case: GoldenCase) -> None:
    if case.name.startswith('unic'):  # by those from before the call
        channels = case['call1.mean'].shape[0]
        previous = torch.zeros(channels).double(), torch.ones(channels).double()
        for call in ('call1', 'call2'):
            mean, std = previous
            out = standardize_channels(as_map(case[f'{call}.x']), mean, std + case.hparams['eps'])
            assert_golden(out, as_map(case[f'{call}.out']))
            previous = case[f'{call}.mean'], case[f'{call}.std']
    else:
        for call in ('call1', 'call2'):  # by those of the batch
            x = as_map(case[f'{call}.x'])
            assert_golden(apply(measure(x), x), as_map(case[f'{call}.out']))
        out = standardize_channels(as_map(case['eval.x']), case['call2.mean'], case['call2.std'])
        assert_golden(out, as_map(case['eval.out']))


def measured_phi_s(case: GoldenCase) -> Standardizer:
    """Return the statistics of a case's features in two batches."""
    x = case['x']
    standardizer = Standardizer('phi-s')
    standardizer.add(Features(pre_logits=x[:4]), PRE_LOGITS)
    standardizer.add(Features(pre_logits=torch.cat([x[4:], x])), PRE_LOGITS, len(x) - 4)
    standardizer.finish()
    return standardizer


@pytest.mark.parametrize('case', golden_cases('phi_s'), ids=case_id)
def test_phi_s_is_the_official_codes_up_to_the_signs_of_eigenvectors(case: GoldenCase) -> None:
    standardizer = measured_phi_s(case)
    mean, matrix = standardizer.statistics['pre_logits']
    assert_golden(mean, case['mean'])
    identity = torch.eye(len(mean), dtype=torch.float64)
    assert_golden(matrix.T @ matrix, identity / case['scale'] ** 2)
    out = standardizer(Features(pre_logits=case['x']), PRE_LOGITS).pre_logits
    assert_golden(out @ out.T, case['out'] @ case['out'].T)  # what no rotation changes
    assert_golden(out.var(0), torch.ones_like(mean))
    eigenvalues = case['eigenvalues']
    if (eigenvalues.diff() > 1e-6 * eigenvalues[-1]).all():
        assert_golden((matrix @ case['eigenvectors']).abs(), (case['hadamard'] / case['scale']).abs())
        signs = ((matrix @ case['eigenvectors'])[0] * case['hadamard'][0]).sign()
        assert_golden(matrix @ (case['eigenvectors'] * signs), case['hadamard'] / case['scale'])


@pytest.mark.parametrize('case', golden_cases('phi_s'), ids=case_id)
def test_official_matrix_applied_to_vectors_and_to_maps_gives_the_official_features(case: GoldenCase) -> None:
    assert_golden(rotate_channels(case['x'], case['mean'], case['matrix']), case['out'])
    maps = case['x'].unflatten(0, (2, -1)).mT[..., None]  # [2, C, N, 1]
    expected = case['out'].unflatten(0, (2, -1)).mT[..., None]
    assert_golden(rotate_channels(maps, case['mean'], case['matrix']), expected)


@pytest.mark.parametrize('size', [6, 7, 12, 52])
def test_phi_s_gives_unit_variances_for_every_width(size: int) -> None:
    x = torch.randn(200, size, dtype=torch.float64) @ torch.randn(size, size, dtype=torch.float64) + 3
    matrix = phi_s_matrix(x.T.cov())
    torch.testing.assert_close(((x - x.mean(0)) @ matrix.T).var(0), torch.ones(size, dtype=torch.float64))


def test_phi_s_is_there_where_the_eigenvalues_do_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 12, dtype=torch.float64)  # of low rank
    expected = phi_s_matrix(x.T.cov())

    def fail(matrix: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError('no convergence')
    monkeypatch.setattr(torch.linalg, 'eigh', fail)
    matrix = phi_s_matrix(x.T.cov())
    for one in (matrix, expected):
        torch.testing.assert_close(((x - x.mean(0)) @ one.T).var(0), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(matrix.T @ matrix, expected.T @ expected)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_standardised_maps_have_mean_0_and_variance_1_and_keep_their_dtype(mode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scale = torch.logspace(-3, 3, 8)[:, None, None]
    x = (scale * torch.randn(40, 8, 5, 5) + 2 * scale).to(dtype)
    with torch.autocast('cpu', dtype=torch.bfloat16):  # of the run
        out = apply(measure(x, mode), x)
    assert out.dtype == dtype and out.shape == x.shape
    rows = out.double().movedim(1, -1).flatten(0, 2)
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-4
    kept = slice(None) if mode == 'phi-s' else slice(-3, None)  # the others are below the floor
    torch.testing.assert_close(rows.mean(0)[kept], torch.zeros(8).double()[kept], rtol=0, atol=tolerance)
    torch.testing.assert_close(rows.var(0)[kept], torch.ones(8).double()[kept], rtol=0, atol=2 * tolerance)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('value', [0., 1e-30, 1., 1e4])
def test_dead_channels_become_zeros_and_stay_small_when_they_wake(mode: str, value: float) -> None:
    x = torch.randn(50, 6, 3, 3)
    x[:, :4] = value
    standardizer = measure(x, mode)
    out = apply(standardizer, x)
    assert out.isfinite().all()
    if mode == 'channel':
        assert out[:, :4].abs().max() < 1e-2
        x[0, 0, 0, 0] += 1.
        assert apply(standardizer, x)[0, 0, 0, 0].abs() < 250


def test_deviations_have_a_floor_in_parts_of_all() -> None:
    deviations = channel_deviations(torch.tensor([0., 1e-12, 4., 4.]).double())
    floor = 1e-2 * 2 ** 0.5
    torch.testing.assert_close(deviations, torch.tensor([floor, floor, 2., 2.]).double())


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('x, words', [
    (torch.full((4, 3, 2, 2), float('nan')), 'last-stage feature has values .* not finite.*--teacher-dtype'),
    (torch.full((4, 3, 2, 2), float('inf')), 'not finite'),
    (torch.full((4, 3, 2, 2), 0.1), 'the same for all of 16 values'),
    (torch.ones(1, 3, 1, 1), 'the same for all of 1 values.*more images'),
], ids=['nan', 'inf', 'constant', 'one image'])
def test_what_has_no_statistics_is_one_message(mode: str, x: torch.Tensor, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        measure(x, mode)


@pytest.mark.parametrize('create', [
    lambda mode: Standardizer(mode),
    lambda mode: create_teacher('test_resnet', SIZE, CLASSES, pretrained=False, standardize=mode),
    lambda mode: create_distill_task('test_resnet', nn.Identity(), teacher_standardize=mode)])
def test_another_mode_is_refused_with_those_that_there_are(create: Any) -> None:
    with pytest.raises(UsageError, match="'phis' must be one of none, channel, phi-s"):
        create('phis')


def create_task(kd: str, mode: Any = 'channel', teacher: str = 'test_resnet', **options: Any) -> DistillTask:
    torch.manual_seed(0)
    models = [timm.create_model(name, num_classes=CLASSES) for name in ('test_efficientnet', teacher)]
    means = {'class_means': torch.randn(CLASSES, models[1].num_features)} if 'nd' in kd.split('+') else {}
    return create_distill_task(
        *models, kd=kd, input_size=SIZE, teacher_standardize=mode, verbose=False, sample_labels=torch.arange(12) % 5,
        **means, **options).train()


def batches(count: int = 3) -> List[Tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, *SIZE, generator=generator), torch.arange(8) % CLASSES) for _ in range(count)]


def received(task: DistillTask, images: torch.Tensor) -> Dict[str, Features]:
    """Run a step and return the teacher's features that each method got."""
    got: Dict[str, Features] = {}
    for name, method in task.module.methods.items():
        def hook(module: nn.Module, inputs: Any, name: str = name) -> None:
            got[name] = inputs[1]
        method.register_forward_pre_hook(hook)
    task(images, torch.arange(len(images)) % CLASSES)
    return got


@pytest.mark.parametrize('mode', MODES)
def test_logits_and_what_goes_with_the_teachers_own_layers_stay_as_they_are(mode: str) -> None:
    task = create_task('norm+kd+fm+srrl+nd+srd', mode)
    assert task.module.standardized == {'norm', 'fm', 'srd'}
    images = batches(1)[0][0]
    raw = task.teacher(images, frozenset({'logits', 'feature', 'pre_logits'}))
    task.standardize_targets(batches())
    got = received(task, images)
    for name in ('kd', 'srrl', 'nd'):
        assert torch.equal(got[name].pre_logits, raw.pre_logits) and torch.equal(got[name].feature, raw.feature)
    for features in got.values():
        assert torch.equal(features.logits, raw.logits)
    standardized = task.teacher.standardizer(raw, frozenset({'feature', 'pre_logits'}))
    for name in ('norm', 'fm', 'srd'):
        assert torch.equal(got[name].feature, standardized.feature)
    assert torch.equal(got['fm'].pre_logits, standardized.pre_logits)
    assert torch.equal(got['norm'].tap, standardized.feature)


def test_stages_and_blocks_are_standardised_each_by_itself() -> None:
    task = create_task('at+vitkd')
    task.standardize_targets(batches())
    assert {'feature', 'block0', 'block1', 'stage0'} <= task.teacher.standardizer.statistics.keys()
    features = task.teacher_features(torch.cat([images for images, _ in batches()])).standardized
    for x in (*features.stages, *features.blocks, features.feature):
        rows = x.movedim(1, -1).flatten(0, 2)
        torch.testing.assert_close(rows.mean(0), torch.zeros(rows.shape[1]), rtol=0, atol=1e-4)
        assert rows.var(0).max() < 1 + 1e-3


TIED = {'srrl', 'nd', 'sdd', 'scalekd'}  # run the teacher's own layers, or meet its class means
ALONE = [name for name in list_methods() if not issubclass(METHODS.get(name).cls, WrapperMethod)]


def test_every_method_that_reads_features_alone_takes_standardised_ones() -> None:
    features = {'feature', 'pre_logits', 'stages', 'blocks', 'tap'}
    for name in ALONE:
        method = METHODS.get(name).create()
        assert method.takes_standardized == (bool(features & method.teacher_outputs) and name not in TIED), name


@pytest.mark.parametrize('kd', ['kd', 'srrl', 'nd+kd', 'sdd:kd', 'scalekd', 'wkd_l'])
@pytest.mark.parametrize('mode', MODES)
def test_a_mode_that_no_method_takes_is_refused(kd: str, mode: str) -> None:
    methods = {name: METHODS.get(name).create() for name in kd.split('+') if ':' not in name}
    if ':' in kd:
        from timm_distill import create_method
        methods = {kd: create_method(kd)}
    with pytest.raises(UsageError, match=f'--teacher-standardize {mode} has nothing to standardise: --kd .*--list-kd'):
        choose_standardized(methods, {'': Standardizer(mode)})
    for other in (Standardizer(), Standardizer('none')):
        assert not choose_standardized(methods, {'': other})


def test_without_the_flag_only_methods_that_ask_for_it_get_standardised_targets() -> None:
    task = create_task('norm+tokens', None)
    assert task.module.standardized == {'tokens'}
    task.standardize_targets(batches())
    images = batches(1)[0][0]
    raw = task.teacher(images, FEATURE).feature
    got = received(task, images)
    assert torch.equal(got['norm'].tap, raw) and not torch.equal(got['tokens'].feature, raw)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('kd', ['fm', 'wkd_f', 'fitnet'])
def test_a_projector_ends_in_no_relu_where_its_target_may_be_negative(kd: str, mode: str) -> None:
    options = {'fitnet': {'fitnet.stages': 'last'}}.get(kd, {})
    raw, standardized = (create_task(kd, m, kd_kwargs=options) for m in ('none', mode))
    images = batches(1)
    standardized.standardize_targets(images)

    def relus(task: DistillTask) -> List[bool]:
        return [m.relu for m in task.module.methods.modules() if isinstance(getattr(m, 'relu', None), bool)]
    assert relus(raw) and all(relus(raw)) and not any(relus(standardized))
    assert (standardized.teacher_features(images[0][0]).standardized.tap < 0).any() if kd != 'fitnet' else True


@pytest.mark.parametrize('mode', MODES)
def test_both_forms_of_norm_match_the_standardised_target(mode: str) -> None:
    tasks = [
        create_task('norm', mode, kd_kwargs={'norm.form': form}, dtype=torch.float64) for form in ('direct', 'moments')]
    double = [(images.double(), target) for images, target in batches()]
    losses = []
    for task in tasks:
        task.standardize_targets(double)
        losses.append(task(*double[0])['norm_loss'])
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)
    teacher = tasks[0].teacher
    standardized = teacher.standardizer(teacher(double[0][0], FEATURE), FEATURE).feature
    raw = create_task('norm', 'none', kd_kwargs={'norm.form': 'direct'}, dtype=torch.float64)
    raw.teacher.forward = lambda images, outputs: Features(feature=standardized)  # a teacher that gives just that
    torch.testing.assert_close(raw(*double[0])['norm_loss'], losses[0], rtol=1e-9, atol=0)


def test_without_statistics_a_step_and_a_measurement_say_what_to_do() -> None:
    task = create_task('norm')
    assert task.needs_target_statistics
    for run in (lambda: task(*batches(1)[0]), lambda: task.distill_terms(batches(1)[0][0])):
        with pytest.raises(UsageError, match=r'--kd norm .*task\.standardize_targets\(loader\)'):
            run()
    task.teacher_features(batches(1)[0][0])  # as checks of the pair do
    task.standardize_targets(batches())
    assert not task.needs_target_statistics
    assert torch.isfinite(task(*batches(1)[0])['loss'])
    assert torch.isfinite(task.distill_terms(batches(1)[0][0])['norm_loss'])


def test_statistics_are_of_the_first_images_and_do_not_depend_on_the_batches() -> None:
    tasks = [create_task('norm+feature') for _ in range(2)]
    images = torch.cat([images for images, _ in batches()])
    tasks[0].standardize_targets(batches(), num_images=20)

    def endless() -> Iterator[Any]:
        yield from ((part, torch.zeros(len(part))) for part in images.split(5))
        raise AssertionError('read on')
    tasks[1].standardize_targets(endless(), num_images=20)
    first, second = (task.teacher.standardizer.statistics for task in tasks)
    assert first.keys() == {'feature', 'pre_logits'}
    for name, tensors in first.items():
        for one, other in zip(tensors, second[name]):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_statistics_of_one_teacher_hold_for_every_task_of_it() -> None:
    torch.manual_seed(0)
    teacher = create_teacher('test_resnet', SIZE, CLASSES, pretrained=False, standardize='channel', verbose=False)
    students = [timm.create_model('test_efficientnet', num_classes=CLASSES) for _ in range(3)]
    tasks = [
        create_distill_task(s, teacher, kd=kd, input_size=SIZE, verbose=False)
        for s, kd in zip(students, ('norm', 'fitnet', 'vkd'))]
    tasks[0].standardize_targets(batches())
    assert tasks[1].needs_target_statistics and not tasks[2].needs_target_statistics


@pytest.mark.parametrize('mode', MODES)
def test_checkpoint_holds_the_statistics_and_a_task_that_loads_it_goes_on_bit_identical(
        mode: str, tmp_path: Path) -> None:
    def step(task: DistillTask) -> Dict[str, torch.Tensor]:
        torch.manual_seed(2)
        result = task(*batches(1)[0])
        result['loss'].backward()
        return {name: p.grad for name, p in task.module.named_parameters()}

    task, other = (create_task('norm+tokens', mode) for _ in range(2))
    task.standardize_targets(batches())
    task.setup_ema(decay=0.5)
    torch.save({**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}, tmp_path / 'state.pt')
    saved = torch.load(tmp_path / 'state.pt', weights_only=True)
    assert saved['task_state']['standardized']['']['mode'] == mode and 'standardized' not in saved['task_state_ema']
    other.setup_ema(decay=0.5)
    other.load_checkpoint_state(saved['state_dict'], saved['task_state'])
    other.load_checkpoint_state(saved['state_dict_ema'], saved['task_state_ema'], ema=True)
    assert not other.needs_target_statistics
    expected, actual = step(task), step(other)
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize('saved, now, words', [
    ('channel', 'phi-s', 'standardised channel for norm, here phi-s for norm'),
    ('channel', 'none', 'standardised channel for norm, here none'),
    (None, 'channel', 'standardised none, here channel for norm'),
])
def test_a_checkpoint_of_other_targets_is_refused(saved: Any, now: Any, words: str) -> None:
    task, other = create_task('norm', saved), create_task('norm', now)
    task.standardize_targets(batches())
    with pytest.raises(UsageError, match=f'{words}.*--teacher-standardize'):
        other.load_checkpoint_state(**task.get_checkpoint_state())


def test_a_checkpoint_from_before_there_were_standardised_targets_is_resumed() -> None:
    task, other = create_task('norm', None), create_task('norm', None)
    state = task.get_checkpoint_state()
    assert 'standardized' not in state['task_state']
    other.load_checkpoint_state(**state)
    assert not other.needs_target_statistics


@pytest.mark.parametrize('mode', MODES)
def test_teachers_of_low_precision_and_amp_give_finite_losses(mode: str) -> None:
    for options in (dict(teacher_dtype=torch.bfloat16), dict(dtype=torch.bfloat16), {}):
        task = create_task('norm+tokens', mode, **options)
        images, target = batches(1)[0]
        images = images.to(options.get('dtype', torch.float32))
        task.standardize_targets([(images, target)])
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=not options):
            result = task(images, target)
        assert all(torch.isfinite(value).all() for value in result.values())
        assert 0.1 < result['tokens_patch_loss'] < 2


def test_restricted_logits_stand_beside_standardised_features() -> None:
    task = create_task('norm+srd', teacher_classes={0: [2], 1: [0, 1]}, class_names=[''] * CLASSES)
    task.standardize_targets(batches())
    result = task(*batches(1)[0])
    assert all(torch.isfinite(value).all() for name, value in result.items() if name.endswith('loss'))
    assert task.teacher_features(batches(1)[0][0]).logits.isinf().any()


def test_a_copied_task_is_standardised_alike() -> None:
    task = create_task('norm')
    task.standardize_targets(batches())
    copied = copy.deepcopy(task)
    assert torch.equal(task(*batches(1)[0])['norm_loss'], copied(*batches(1)[0])['norm_loss'])


def _run_rank(rank: int, world_size: int) -> Dict[str, Dict[str, Any]]:
    statistics = {}
    for mode in MODES:
        task = create_task('norm+feature', mode)
        images = torch.cat([images for images, _ in batches()])[rank::world_size]
        parts = images.split(5 if rank else 4)
        task.standardize_targets([(part, torch.zeros(len(part))) for part in parts], 12 - rank, distributed=True)
        statistics[mode] = task.teacher.standardizer.statistics
    return statistics


@pytest.mark.dist
def test_processes_put_their_images_together_and_have_equal_statistics(tmp_path: Path) -> None:
    first, second = run_ranks(_run_rank, tmp_path)
    images = torch.cat([images for images, _ in batches()])
    kept = torch.cat([images[0::2][:12], images[1::2][:11]])
    for mode in MODES:
        task = create_task('norm+feature', mode)
        task.standardize_targets([(kept, torch.zeros(len(kept)))], len(kept))
        for name, (mean, scale) in task.teacher.standardizer.statistics.items():
            assert all(torch.equal(a, b) for a, b in zip(first[mode][name], second[mode][name]))
            torch.testing.assert_close(first[mode][name][0], mean, rtol=1e-6, atol=1e-6)
            gram = [m if m.ndim == 1 else m.T @ m for m in (first[mode][name][1], scale)]
            torch.testing.assert_close(*gram, rtol=1e-5, atol=1e-5)


def create_pair_task(kd: str, modes: Any, **options: Any) -> DistillTask:
    torch.manual_seed(0)
    student, a, b = (
        timm.create_model(name, num_classes=CLASSES) for name in ('test_efficientnet', 'test_resnet', 'test_convnext'))
    return create_distill_task(
        student, {'a': a, 'b': b}, kd=kd, input_size=SIZE, teacher_standardize=modes, verbose=False, **options).train()


@pytest.mark.parametrize('kd, modes, standardized', [
    ('norm+tokens@b', None, {'tokens@b'}),
    ('norm+tokens@b', 'phi-s', {'norm@a', 'norm@b', 'tokens@b'}),
    ('norm+tokens@b', {'a': 'channel'}, {'norm@a', 'tokens@b'}),
    ('norm+tokens@b', {'a': 'phi-s', 'b': 'none'}, {'norm@a'}),
    ('fm@a+kd@b', 'channel', {'fm@a'}),
])
def test_each_of_several_teachers_is_standardised_by_itself(kd: str, modes: Any, standardized: set) -> None:
    task = create_pair_task(kd, modes)
    assert task.module.standardized == standardized
    assert task.needs_target_statistics
    with pytest.raises(UsageError, match='standardize_targets'):
        task(*batches(1)[0])
    task.standardize_targets(batches())
    images, target = batches(1)[0]
    features = task.teacher_features(images)
    for name, own in features.items():
        units = {unit for unit in standardized if unit.endswith(f'@{name}')}
        assert (own.standardized is not None) == bool(units)
        for unit in units & {'norm@a', 'norm@b'}:
            assert torch.equal(task.module._source(unit, own).tap, own.standardized.feature)
    result = task(images, target)
    assert torch.isfinite(result['loss'])
    state, other = task.get_checkpoint_state(), create_pair_task(kd, modes)
    assert set(state['task_state']['standardized']) == {unit.partition('@')[2] for unit in standardized}
    other.load_checkpoint_state(**state)
    assert not other.needs_target_statistics
    assert torch.equal(other(images, target)['loss'], task(images, target)['loss'])


def test_a_shared_transform_meets_the_standardised_target_of_one_teacher_and_the_raw_one_of_the_other() -> None:
    task, raw = create_pair_task('norm', {'a': 'channel'}), create_pair_task('norm', 'none')
    task.standardize_targets(batches())
    raw.module.load_state_dict(task.module.state_dict())
    losses = [t(*batches(1)[0]) for t in (task, raw)]
    torch.testing.assert_close(losses[0]['norm@b_loss'], losses[1]['norm@b_loss'])
    assert not torch.isclose(losses[0]['norm@a_loss'], losses[1]['norm@a_loss'], rtol=1e-2)


def test_statistics_that_cannot_be_measured_name_the_teacher() -> None:
    task = create_pair_task('fm', 'channel')
    torch.nn.init.constant_(next(task.teachers['b'].parameters()), float('nan'))
    with pytest.raises(UsageError, match="^Teacher 'b': .*not finite"):
        task.standardize_targets(batches())


def test_several_teachers_without_anything_to_standardise_are_refused() -> None:
    with pytest.raises(UsageError, match='teacher_standardize channel has nothing to standardise: kd kd@a'):
        create_pair_task('kd', 'channel')
