"""ScaleKD against the official code's numbers, and with teachers of every kind."""
import copy
from functools import partial
from typing import Any, Callable, Dict, Tuple

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from golden_data import GoldenCase, assert_golden, case_id, golden_cases
from timm.models.mlp_mixer import MlpMixer
from tiny_models import Plain

from timm_distill import DistillTask, UsageError, create_distill_task, create_method
from timm_distill.features.spec import Features, FeatureSpec, PairSpec, Stage
from timm_distill.methods.scalekd import AttentionProjector, default_heads, direction_loss

SIZE, CLASSES = (3, 64, 64), 5
CASES, STAGES = golden_cases('scalekd'), golden_cases('scalekd_stages')
KINDS = {'0': 'direct', '1': 'mean_free'}
NAMES = (
    ('pos_attention.', 'attention.'), ('query.weight', 'query'), ('ffn.layers.0.0.', 'ffn.0.'),
    ('ffn.layers.1.', 'ffn.2.'))
NOISE = 1e-12  # of what vanishes analytically


def own_name(name: str) -> str:
    for official, own in NAMES:
        name = name.replace(official, own)
    return name


def projector_state(case: GoldenCase, prefix: str) -> Dict[str, torch.Tensor]:
    return {own_name(name): value for name, value in case.under(prefix).items()}


def create_projector(case: GoldenCase, index: int) -> AttentionProjector:
    """Create one of a case's projectors, with its stored weights."""
    hparams, state = case.hparams, projector_state(case, f'projector_{index}.')
    out_shape = (case['feat_t'].shape[1], *hparams['query_hw'])
    projector = AttentionProjector(
        tuple(case['feat_s'].shape[1:]), out_shape, hparams['num_heads'], hparams['softmax_scale'][index],
        'query' in state, hparams['ffn_ratio'], hparams['window_shapes'][0]).double()
    projector.load_state_dict(state, strict=False)  # batch counters start at 0
    return projector


def window_order(grid: Tuple[int, int], windows: int) -> torch.Tensor:
    """Return the raster position of each token in the order in which the official code leaves windows."""
    raster = torch.arange(grid[0] * grid[1]).view(windows, grid[0] // windows, windows, grid[1] // windows)
    return raster.transpose(1, 2).flatten()


def project(
        case: GoldenCase, index: int, projector: AttentionProjector, feature: torch.Tensor, query: Any) -> torch.Tensor:
    """Return a projector's map with its tokens where the official code has them: it leaves windows in their order."""
    grid = projector.grid
    queries = None if query is None else query.transpose(1, 2).unflatten(2, grid)
    order = window_order(grid, case.hparams['window_shapes'][index])
    return projector(feature, queries).flatten(2)[:, :, order].unflatten(2, grid)


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_projectors_losses_gradients_and_statistics_equal_the_official_codes(case: GoldenCase) -> None:
    feature = case['feat_s'].clone().requires_grad_()
    queries = {name: case[name].clone().requires_grad_() for name in ('query_s', 'query_f') if name in case}
    projectors = [create_projector(case, index) for index in (0, 1)]
    losses = []
    for index, (kind, query) in enumerate((('spat', 'query_s'), ('freq', 'query_f'))):
        projected = project(case, index, projectors[index], feature, queries.get(query))
        assert_golden(projected.flatten(2).transpose(1, 2), case[f'projected_{kind}'])
        losses.append(case.hparams['alpha'][index] * direction_loss(projected, case['feat_t'], mean_free=bool(index)))
        assert_golden(losses[-1], case[f'loss_{kind}'])
    assert_golden(sum(losses), case['loss'])
    inputs = {'feat_s': feature, **queries}
    for index, projector in enumerate(projectors):
        inputs.update({f'projector_{index}.{name}': p for name, p in projector.named_parameters()})
    assert_gradients(case, sum(losses), inputs)
    for index, projector in enumerate(projectors):
        assert_statistics(case, projector, f'after.projector_{index}.')


def assert_gradients(case: GoldenCase, loss: torch.Tensor, inputs: Dict[str, torch.Tensor]) -> None:
    expected = {own_name(name): value for name, value in case.under('grad.').items()}
    assert expected.keys() == inputs.keys()
    for name, gradient in zip(expected, torch.autograd.grad(loss, [inputs[name] for name in expected])):
        vanishes = expected[name].abs().max() < NOISE
        if vanishes:
            assert gradient.abs().max() < NOISE, name
        else:
            assert_golden(gradient, expected[name])


def assert_statistics(case: GoldenCase, projector: nn.Module, prefix: str) -> None:
    state = projector.state_dict()
    for name, value in case.under(prefix).items():
        assert_golden(state[own_name(name)], value)


def official_stage(case: GoldenCase) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the stand-in for the teacher's last stage."""
    def _run(x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(F.conv2d(x, case['stage4_t.merge.weight'], case['stage4_t.merge.bias'], stride=2))
        x = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], case['stage4_t.norm.weight'], case['stage4_t.norm.bias'])
        return x.permute(0, 3, 1, 2)
    return _run


def create_golden_method(case: GoldenCase) -> nn.Module:
    """Create the method for a case's shapes, with its stored projectors."""
    def _spec(s3: torch.Tensor, s4: torch.Tensor, **kwargs: Any) -> FeatureSpec:
        stages = tuple(Stage(i, tuple(x.shape[1:])) for i, x in enumerate((s3, s4)))
        return FeatureSpec(5, stages[1].shape, stages[1].shape[0], stages, (3, 32, 32), **kwargs)

    hparams = case.hparams
    method = create_method(
        'scalekd', alpha_s3=hparams['alpha_s3'], alpha_s4=hparams['alpha_s4'], heads_s3=hparams['num_heads_s3'],
        heads_s4=hparams['num_heads_s4'], softmax_scale=hparams['softmax_scale_s3'][0], ffn_ratio=hparams['ffn_ratio'])
    teacher = _spec(case['feat_t3'], case['feat_t4'], tail=Stage(0, tuple(case['feat_t3'].shape[1:])))
    method.build(PairSpec(_spec(case['feat_s3'], case['feat_s4']), teacher))
    state = {
        f'{level}.{kind}.{name}': value for level in ('s3', 's4') for index, kind in KINDS.items()
        for name, value in projector_state(case, f'{level}.projector_{index}.').items()}
    method.double().load_state_dict(state, strict=False)
    return method.train()


@pytest.mark.parametrize('case', STAGES, ids=case_id)
def test_both_stages_and_the_teachers_last_one_equal_the_official_codes(case: GoldenCase) -> None:
    method = create_golden_method(case)
    s3, s4, head = (case[name].clone().requires_grad_() for name in ('feat_s3', 'feat_s4', 'fc_s.weight'))
    logits = {
        's': s4.mean((2, 3)) @ head.T, 't': case['feat_t4'].mean((2, 3)) @ case['fc_t.weight'].T}
    alpha, temperature = case.hparams['kd_alpha'], case.hparams['kd_temp']
    teacher = Features(feature=case['feat_t4'], tail=official_stage(case))
    terms = method(Features(feature=s4, stages=(s3, s4)), teacher, case['target'])
    for name, official in (
            ('s3_direct', 's3'), ('s3_mean_free', 's3_alt'), ('s4_direct', 's4'), ('s4_mean_free', 's4_alt')):
        assert_golden(terms[f'scalekd_{name}_loss'], case[f'loss_{official}'])
    label = (1 - alpha) * F.cross_entropy(logits['s'], case['target'])
    soft = alpha * temperature ** 2 * F.cross_entropy(logits['s'] / temperature, (logits['t'] / temperature).softmax(1))
    assert_golden(label, case['loss_ce'])
    assert_golden(soft, case['loss_kd'])
    loss = sum(terms.values()) + label + soft
    assert_golden(loss, case['loss'])
    inputs = {'feat_s3': s3, 'feat_s4': s4, 'fc_s.weight': head}
    for name, parameter in method.named_parameters():
        level, kind, rest = name.split('.', 2)
        inputs[f'{level}.projector_{list(KINDS.values()).index(kind)}.{rest}'] = parameter
    assert_gradients(case, loss, inputs)  # of statistics the file has those after the call alone


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_leaving_out_the_dcts_first_coefficient_takes_off_each_channels_mean(case: GoldenCase) -> None:
    dct, idct = case['dct_matrix'], case['idct_matrix']
    coefficients = dct @ case['feat_t'] @ dct.T
    coefficients[:, :, 0, 0] = 0
    expected = case['feat_t'] - case['feat_t'].mean((2, 3), keepdim=True)
    assert_golden(idct @ coefficients @ idct.T, expected, rtol=1e-12)


SWIN = dict(window_size=2, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
TEACHERS: Dict[str, Tuple[Any, Dict[str, Any]]] = {
    'cnn': ('test_resnet', {}),
    'class token': ('test_vit', dict(img_size=64)),
    'class and register tokens': ('test_vit', dict(img_size=64, reg_tokens=2)),
    'nhwc': ('swin_tiny_patch4_window7_224', dict(img_size=64, **SWIN)),
    'mlp': (MlpMixer, dict(img_size=64, embed_dim=32, num_blocks=4)),
    'hybrid': ('test_coatnet', {}),
}
STUDENTS: Dict[str, Tuple[str, Dict[str, Any]]] = {
    'cnn': ('test_efficientnet', {}),
    'vit': ('test_vit', dict(img_size=64, embed_dim=32, reg_tokens=1)),
}


def create_model(model: Tuple[Any, Dict[str, Any]], seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    create = partial(timm.create_model, model[0]) if isinstance(model[0], str) else model[0]
    return create(num_classes=CLASSES, **model[1])


def create_task(teacher: str, student: str = 'cnn', kd: str = 'scalekd', **kwargs: Any) -> DistillTask:
    options = {'input_size': SIZE, 'verbose': False, **kwargs}
    return create_distill_task(
        create_model(STUDENTS[student], 0), create_model(TEACHERS[teacher]), kd=kd, **options).train()


def create_batch(size: int = 2, shape: Tuple[int, int, int] = SIZE) -> Tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, *shape, generator=generator), torch.arange(size) % CLASSES


@pytest.mark.parametrize('student', STUDENTS)
@pytest.mark.parametrize('teacher', TEACHERS)
def test_gradients_come_back_through_the_teachers_frozen_last_stage(teacher: str, student: str) -> None:
    task = create_task(teacher, student)
    task.teacher.train()
    before = {name: value.clone() for name, value in task.teacher.state_dict().items()}
    result = task(*create_batch())
    assert {name for name in result if name.startswith('scalekd')} == {
        f'scalekd_{level}_{kind}_loss' for level in ('s3', 's4') for kind in KINDS.values()}
    result['scalekd_s3_direct_loss'].backward()
    assert not any(module.training for module in task.teacher.modules())
    projector = task.module.methods['scalekd'].s3['direct']
    assert all(p.grad is not None and p.grad.isfinite().all() for p in projector.parameters())
    assert projector.query.grad.abs().max() > 0
    assert next(task.module.student.parameters()).grad.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in task.teacher.parameters())
    assert all(torch.equal(task.teacher.state_dict()[name], value) for name, value in before.items())


def test_teachers_at_another_size_than_the_students_are_matched_on_their_own_grid() -> None:
    task = create_distill_task(
        create_model(STUDENTS['cnn'], 0), 'test_vit', kd='scalekd', input_size=SIZE, num_classes=CLASSES,
        teacher_pretrained=False, teacher_img_size=96, teacher_kwargs=dict(img_size=96), verbose=False)
    projector = task.module.methods['scalekd'].s3['direct']
    assert projector.grid == (6, 6) and projector.pos_embed.shape[2:] == (4, 4)
    assert torch.isfinite(task(*create_batch())['loss'])


def test_grids_that_are_not_square_keep_their_sides() -> None:
    task = create_distill_task(
        create_model(('test_efficientnet', {}), 0), create_model(('test_resnet', {})), kd='scalekd',
        input_size=(3, 64, 128), verbose=False).train()
    projector = task.module.methods['scalekd'].s3['direct']
    assert projector.grid == (4, 8)
    task(*create_batch(shape=(3, 64, 128)))['loss'].backward()
    assert projector.query.grad.abs().max() > 0


def test_images_of_another_size_than_the_first_train_as_well() -> None:
    task = create_task('cnn')
    result = task(*create_batch(shape=(3, 96, 96)))
    assert all(torch.isfinite(result[name]) for name in result if name.startswith('scalekd'))


def test_a_teacher_without_such_a_stage_is_named_with_the_reason_and_the_option() -> None:
    with pytest.raises(UsageError, match=r'no stage before its last feature.*alpha_s3=0,0'):
        create_distill_task(create_model(STUDENTS['cnn'], 0), Plain(), kd='scalekd', input_size=SIZE, verbose=False)


def test_without_the_first_part_any_teacher_with_a_map_will_do() -> None:
    task = create_distill_task(
        create_model(STUDENTS['cnn'], 0), Plain(), kd='scalekd', kd_kwargs={'scalekd.alpha_s3': (0, 0)},
        input_size=SIZE, verbose=False)
    terms = {name for name in task(*create_batch()) if name.startswith('scalekd')}
    assert terms and all('s4' in name for name in terms)


def test_weights_choose_projectors_and_where_the_queries_come_from() -> None:
    task = create_task('cnn', kd_kwargs={'scalekd.alpha_s3': [0.1, 0], 'scalekd.alpha_s4': [0.1, 0.2]})
    method = task.module.methods['scalekd']
    assert list(method.s3) == ['direct'] and list(method.s4) == ['direct', 'mean_free']
    assert method.s4['direct'].query is None and method.s4['mean_free'].query is not None
    learned = create_task('cnn', kd_kwargs={'scalekd.self_query': True}).module.methods['scalekd']
    assert all(projector.query is not None for projector in learned.s4.values())


def test_a_last_feature_of_one_position_has_no_mean_free_term() -> None:
    task = create_distill_task(
        create_model(STUDENTS['cnn'], 0), create_model(TEACHERS['cnn']), kd='scalekd', input_size=(3, 32, 32),
        verbose=False)
    assert list(task.module.methods['scalekd'].s3) == list(task.module.methods['scalekd'].s4) == ['direct']


def test_a_student_of_a_single_stage_gives_it_twice() -> None:
    task = create_distill_task(Plain(), create_model(TEACHERS['cnn']), kd='scalekd', input_size=SIZE, verbose=False)
    assert torch.isfinite(task(*create_batch())['loss'])


def test_bfloat16_teachers_take_the_students_float32_features() -> None:
    task = create_task('nhwc', teacher_dtype=torch.bfloat16)
    task(*create_batch())['loss'].backward()
    assert torch.isfinite(next(task.module.student.parameters()).grad).all()


def test_teachers_that_are_spread_over_processes_are_refused() -> None:
    task = create_task('cnn')
    with pytest.raises(UsageError, match='--teacher-fsdp'):
        task.teacher.shard(torch.device('cpu'))


def test_compiled_tasks_give_the_same_terms() -> None:
    task = create_task('class token')
    expected = copy.deepcopy(task)(*create_batch())
    task.compile(backend='eager')
    actual = task(*create_batch())
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize('width, heads', [(768, 12), (1024, 16), (512, 8), (1536, 24), (60, 1), (65, 1), (130, 2)])
def test_heads_have_at_least_64_channels_and_divide_the_width(width: int, heads: int) -> None:
    assert default_heads(width) == heads


@pytest.mark.parametrize('options, match', [
    (dict(alpha_s3=(0, 0), alpha_s4=(0, 0)), 'all 0'),
    (dict(alpha_s3=0.1), 'two weights'),
    (dict(alpha_s4=(0.1, -1)), 'two weights'),
    (dict(softmax_scale=0), 'softmax_scale'),
])
def test_impossible_options_are_named(options: Dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        create_method('scalekd', **options)


def test_a_number_of_heads_that_does_not_divide_the_width_is_named() -> None:
    with pytest.raises(UsageError, match='heads_s3=5 does not divide'):
        create_task('cnn', kd_kwargs={'scalekd.heads_s3': 5})
