"""Which grid a model's tokens form: at the size measured, at every later one, and where there is none."""
from typing import Any, Dict, List, Optional, Tuple

import pytest
import timm
import torch
import torch.nn as nn

from timm_distill import Teacher, UsageError, create_distill_task
from timm_distill.features.grids import grid_of_aspect
from timm_distill.features.inspection import inspect
from timm_distill.features.layouts import FeatureLayout
from timm_distill.features.reader import read
from timm_distill.features.spec import Features
from timm_distill.features.stages import drops_positions, layout_for, resolve_feature_layout
from timm_distill.student.tap_search import resolve_student_tap

CLASSES = 5
SIZES = [(64, 128), (128, 64), (96, 32), (64, 64)]
VIT = dict(img_size=64, dynamic_img_size=True)
EVA = dict(img_size=64, embed_dim=24, depth=2, num_heads=2)
# all of them take any size; the last's patch embedding has no formula, its maps tell the grid
ANY_SIZE: Dict[str, Tuple[str, Dict[str, Any]]] = {
    'vit': ('test_vit', VIT),
    'registers': ('test_vit', dict(**VIT, reg_tokens=3)),
    'no_class_token': ('test_vit', dict(**VIT, class_token=False, global_pool='avg')),
    'padded': ('test_vit', dict(**VIT, dynamic_img_pad=True)),
    'eva': ('vit_tiny_patch16_dinov3_qkvb', EVA),
    'xcit': ('xcit_nano_12_p16_224', dict(embed_dim=24, depth=2, num_heads=2)),
}
each_model = pytest.mark.parametrize('kind', ANY_SIZE)
each_size = pytest.mark.parametrize('size', SIZES)


def create(kind: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    name, own = ANY_SIZE[kind]
    return timm.create_model(name, num_classes=CLASSES, **{**own, **kwargs})


def own_map(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the last map by timm's own count of rows and columns, normalised as `forward_features` does."""
    last = model.forward_intermediates(images, indices=1, output_fmt='NCHW', intermediates_only=True)[-1]
    return model.norm(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize('tokens,size,grid', [
    (16, (64, 64), (4, 4)), (8, (64, 32), (4, 2)), (32, (64, 128), (4, 8)), (176, (230, 160), (16, 11)),
    (1, (64, 64), (1, 1)), (17, (64, 64), None), (12, (64, 64), None), (8, (64, 64), None), (24, (64, 128), None),
    (0, (64, 64), None),
])
def test_grid_of_a_model_that_tells_none_is_that_of_square_patches(
        tokens: int, size: Tuple[int, int], grid: Optional[Tuple[int, int]]) -> None:
    assert grid_of_aspect(tokens, size) == grid


@each_size
@each_model
def test_teachers_map_is_timms_own_at_every_size(kind: str, size: Tuple[int, int]) -> None:
    model = create(kind)
    teacher = Teacher(model, (3, 64, 64), fold=False)
    teacher.prepare.renormalize = False
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        feature = teacher(images, frozenset({'feature'})).feature
        torch.testing.assert_close(feature, own_map(model.eval(), images), rtol=1e-4, atol=1e-5)


@each_size
@each_model
def test_students_map_is_timms_own_at_every_size(kind: str, size: Tuple[int, int]) -> None:
    model = create(kind).eval()
    spec, images = inspect(model, (3, 64, 64), trains=True), torch.randn(2, 3, *size)
    with torch.no_grad():
        feature = read(model, spec, images, frozenset({'feature'})).feature
        torch.testing.assert_close(feature, own_map(model, images), rtol=1e-4, atol=1e-5)


@each_model
def test_adapter_matches_each_position_with_the_teachers_at_a_later_size(kind: str) -> None:
    task = create_distill_task(
        create(kind), timm.create_model('test_resnet', num_classes=CLASSES), 'norm', input_size=(3, 64, 64),
        kd_kwargs={'norm.segments': 1, 'norm.batch_norm': False}, kd_tap='side', verbose=False)
    module = task.module.eval()
    images = torch.randn(2, 3, 64, 128)
    with torch.no_grad():
        teacher = module.adapters[0].expand(own_map(module.student, images))
        (loss,) = module.forward_with_features(images, Features(tap=teacher)).matched
        (other,) = module.forward_with_features(images, Features(tap=teacher.transpose(2, 3))).matched
    assert loss < 1e-6 < 1e-3 < other


def test_grid_of_another_size_is_measured_once_and_leaves_the_model_as_it_was() -> None:
    model = create('xcit').train()
    layout = resolve_feature_layout(model, (3, 64, 64))
    state = torch.get_rng_state()
    runs: List[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: runs.append(1))
    model.blocks[0].register_forward_pre_hook(lambda module, args: runs.append(1))
    images = torch.randn(1, 3, 64, 128)
    state = torch.get_rng_state()
    assert layout_for(model, layout, images).grid == (4, 8)
    measured = len(runs)
    assert layout_for(model, layout, images).grid == (4, 8) and measured == len(runs) > 0
    assert model.training and torch.equal(torch.get_rng_state(), state)
    handle.remove()


# Tokens that are no grid

class Tokens(nn.Module):
    """A model with timm's parts whose tokens are those of its stem, rearranged by `arrange`."""

    def __init__(self, arrange: Any, maps: bool = True, **attributes: Any):
        super().__init__()
        self.num_classes, self.num_features, self.arrange = CLASSES, 6, arrange
        self.stem = nn.Conv2d(3, 6, 16, stride=16)
        self.fc = nn.Linear(6, CLASSES)
        if maps:
            self.forward_intermediates = self._forward_intermediates
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.arrange(self.stem(x).flatten(2).transpose(1, 2))

    def _forward_intermediates(self, x: torch.Tensor, intermediates_only: bool = False, **kwargs: Any) -> Any:
        return [self.stem(x)] if intermediates_only else (self.forward_features(x), [self.stem(x)])

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x.mean(1) if pre_logits else self.fc(x.mean(1))

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def with_prefix(count: int) -> Any:
    return lambda x: torch.cat([x[:, :1].expand(-1, count, -1), x], 1)


@pytest.mark.parametrize('arrange', [
    lambda x: x.flip(1), lambda x: x.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2), lambda x: x[:, :9],
    lambda x: x[:, ::2], with_prefix(9),
], ids=['reversed', 'columns_first', 'fewer_that_are_square', 'half', 'more_that_are_square'])
def test_tokens_that_are_not_the_models_own_positions_have_no_grid(arrange: Any) -> None:
    model = Tokens(arrange)
    assert resolve_feature_layout(model, (3, 64, 64)).grid is None
    with pytest.raises(UsageError, match='grid its 16|grid its 8|grid its 9|grid its 25'):
        resolve_student_tap(model, (3, 64, 64), 'features')
    assert resolve_student_tap(model, (3, 64, 64)).point == 'pre_logits'
    other = timm.create_model('test_resnet', num_classes=CLASSES)
    for student, teacher in ((model, other), (other, model)):
        create_distill_task(student, teacher, 'kd', input_size=(3, 64, 64), verbose=False)  # reads logits alone
        with pytest.raises(UsageError, match='does not tell on which grid'):
            create_distill_task(student, teacher, 'at', input_size=(3, 64, 64), verbose=False)


@pytest.mark.parametrize('count', [0, 1, 9])
def test_prefix_tokens_are_told_by_the_models_own_attributes(count: int) -> None:
    declared = Tokens(with_prefix(count), maps=False, num_prefix_tokens=count)
    owned = Tokens(with_prefix(count), maps=False, reg_token=nn.Parameter(torch.zeros(1, max(count, 1), 6)))
    for model in (declared, owned):
        layout = resolve_feature_layout(model, (3, 64, 64))
        assert (layout.num_prefix_tokens, layout.grid) == (count, (4, 4))


def test_class_tokens_alone_are_one_position() -> None:
    model = Tokens(lambda x: x[:, :2], cls_token=nn.Parameter(torch.zeros(1, 2, 6)))
    layout = resolve_feature_layout(model, (3, 64, 64))
    feature = model.forward_features(torch.randn(3, 3, 64, 64))
    torch.testing.assert_close(layout.to_map(layout.to_positions(feature)), feature.mean(1)[:, :, None, None])


def test_hidden_states_of_as_many_numbers_as_a_map_are_not_its_positions() -> None:
    model = timm.create_model('efficientvim_m4', num_classes=CLASSES, embed_dim=(16, 24, 32), depths=(1, 1, 1))
    tap = resolve_student_tap(model.eval(), (3, 256, 256))
    states, final = [feature.shape for feature in model.forward_features(torch.randn(1, 3, 256, 256))[-2:]]
    assert states == final
    assert [(site.index, site.layout.grid) for site in tap.sites] == [(3, (4, 4))]


@pytest.mark.parametrize('positions', [8, 15, 17])
def test_map_of_another_number_of_tokens_is_refused(positions: int) -> None:
    layout = FeatureLayout('NLC', 6, 1, (4, 4), (64, 64))
    with pytest.raises(UsageError, match='patch_drop_rate') as error:
        layout.to_map(layout.to_positions(torch.zeros(2, positions + 1, 6)))
    assert f'{positions} tokens' in str(error.value) and '4x4' in str(error.value)


# Positions dropped in training

DROPPING: Dict[str, Tuple[str, Dict[str, Any]]] = {
    'vit': ('test_vit', dict(img_size=64, patch_drop_rate=0.5)),
    'to_a_square': ('test_vit', dict(img_size=64, patch_drop_rate=0.75)),
    'eva': ('vit_tiny_patch16_dinov3_qkvb', dict(**EVA, patch_drop_rate=0.5)),
    'hiera': ('hiera_tiny_224', dict(
        img_size=64, embed_dim=16, num_heads=1, stages=(1, 1, 1, 1), patch_drop_rate=0.5)),
}


def create_dropping(kind: str) -> nn.Module:
    name, kwargs = DROPPING[kind]
    return timm.create_model(name, num_classes=CLASSES, **kwargs)


def create_task(student: nn.Module, kd: str, teacher: Optional[nn.Module] = None, **kwargs: Any) -> Any:
    return create_distill_task(
        student, teacher or timm.create_model('test_resnet', num_classes=CLASSES), kd, input_size=(3, 64, 64),
        verbose=False, **kwargs)


@pytest.mark.parametrize('kd', ['at', 'sp', 'fitnet', 'ofa', 'reviewkd'])
@pytest.mark.parametrize('kind', DROPPING)
def test_student_that_drops_positions_is_refused_by_methods_that_compare_maps(kind: str, kd: str) -> None:
    with pytest.raises(UsageError, match='drops positions.*patch_drop_rate'):
        create_task(create_dropping(kind), kd)


@pytest.mark.parametrize('kind', DROPPING)
def test_adapter_of_a_student_that_drops_positions_sits_at_the_pre_logits_or_nowhere(kind: str) -> None:
    task = create_task(create_dropping(kind), 'norm', kd_kwargs={'norm.segments': 2}).train()
    assert task.module.tap.point == 'pre_logits' and 'patch_drop_rate' in task.module.tap.rejected
    assert task(torch.randn(2, 3, 64, 64), torch.arange(2))['norm_loss'].isfinite()
    for point in ('features', 'side'):
        with pytest.raises(UsageError, match=f'not at {point}: the student drops positions in training'):
            create_task(create_dropping(kind), 'norm', kd_tap=point)


@pytest.mark.parametrize('kind', DROPPING)
def test_teacher_never_drops_positions(kind: str) -> None:
    task = create_task(
        timm.create_model('test_resnet', num_classes=CLASSES), 'norm', create_dropping(kind),
        kd_kwargs={'norm.segments': 2}).train()
    features = task.teacher_features(torch.randn(2, 3, 64, 64))
    assert features.feature.shape[-2:] == task.teacher.spec.layout.grid


def test_measuring_whether_positions_are_dropped_changes_nothing() -> None:
    model = timm.create_model('test_resnet', drop_rate=0.5).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    assert not drops_positions(model, torch.randn(2, 3, 64, 64))
    torch.set_rng_state(state)
    dropping = create_dropping('vit').train()
    state = torch.get_rng_state()
    assert drops_positions(dropping, torch.zeros(2, 3, 64, 64)) and torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# Logits of positions

@pytest.mark.parametrize('role', ['student', 'teacher'])
@pytest.mark.parametrize('name', ['test_vit', 'test_resnet', 'test_convnext'])
def test_model_without_pooling_is_one_clear_message(name: str, role: str) -> None:
    kwargs = dict(img_size=64) if name == 'test_vit' else {}
    without = timm.create_model(name, num_classes=CLASSES, global_pool='', **kwargs)
    other = timm.create_model('test_efficientnet', num_classes=CLASSES)
    student, teacher = (without, other) if role == 'student' else (other, without)
    with pytest.raises(UsageError, match=f"The {role} .* not pooled: leave out global_pool=''"):
        create_task(student, 'kd', teacher)
    if role == 'student':
        with pytest.raises(UsageError, match='not pooled'):
            create_distill_task(student, None, 'none', input_size=(3, 64, 64), verbose=False)
