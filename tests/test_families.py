"""Every family of heads in timm, as student of NORM and as teacher.

Models have random weights, few blocks and the smallest size that they take. Those that are published with over 140 M
parameters are tested by shapes as published too, on the meta device.
"""
import copy
import json
from dataclasses import dataclass
from functools import cache
from typing import Any, Dict, Iterator, Tuple

import pytest
import timm
import torch
import torch.nn as nn
from conftest import REPO_DIR
from cut_models import cut_models
from families import CLASSES, HUGE_M, Built, Family, build_small, family_params, list_families

from timm_distill import DistillTask, Teacher, create_distill_task, merge_student
from timm_distill.features.classifier import classifier_linear
from timm_distill.features.inputs import RawFeature, evaluation_mode
from timm_distill.features.spec import Features
from timm_distill.features.stages import last_stage_feature, resolve_feature_layout, resolve_stages
from timm_distill.teacher.fold import settle_batch_norms
from timm_distill.teacher.sharding import count_parameters
from timm_distill.utils.batch_norm import is_batch_norm

SHARED_LIST = REPO_DIR.parent / 'shared' / 'timm_heads.json'
TEACHER_OUTPUTS = frozenset({'logits', 'feature', 'pre_logits', 'stages'})
BATCH = 2
DOUBLE_M = 15.  # million parameters up to which a whole model runs in float64


@dataclass(frozen=True)
class Trained:
    """A task after one step, and what the step gave."""
    task: DistillTask
    result: Dict[str, torch.Tensor]
    gradients: Dict[str, float]
    images: torch.Tensor


@pytest.fixture(scope='module', autouse=True)
def cut() -> Iterator[None]:
    """Let timm create what is cut, whoever asks it to."""
    with cut_models({family.name: family.cut for family in list_families() if family.cut}):
        yield


@pytest.fixture(scope='module', params=family_params())
def built(request: pytest.FixtureRequest) -> Built:
    family: Family = request.param
    if family.params_m > HUGE_M and not family.small:
        pytest.skip(f'{family.name} has {family.params_m:.0f} M parameters and no argument that builds it smaller')
    return build_small(family)


@cache
def create_teacher_for(input_size: Tuple[int, int, int]) -> Teacher:
    """Return the teacher of all students of an input size, which is frozen."""
    torch.manual_seed(0)
    return Teacher(timm.create_model('test_resnet', num_classes=CLASSES), input_size)


@pytest.fixture(scope='module')
def trained(built: Built) -> Trained:
    """The model as student after one step, two where a classifier that starts at zero holds gradients back."""
    torch.manual_seed(0)
    task = create_distill_task(
        built.model, create_teacher_for(built.input_size), kd='norm',
        kd_kwargs={'norm.segments': 2, 'norm.init': 'official'}, input_size=built.input_size, verbose=False).train()
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01)
    images = torch.randn(BATCH, *built.input_size)
    result, gradients = train_step(task, images, optimizer)
    if not all(gradients.values()):
        result, gradients = train_step(task, images, optimizer)
    return Trained(task, result, gradients, images)


def train_step(
        task: DistillTask,
        images: torch.Tensor,
        optimizer: torch.optim.Optimizer,
) -> Tuple[Dict[str, torch.Tensor], Dict[str, float]]:
    """Train once; return what the task gave and the adapters' gradient norms, nan for a missing one."""
    result = task(images, torch.arange(BATCH))
    optimizer.zero_grad()
    result['loss'].backward()
    named = task.module.adapters.named_parameters()
    gradients = {name: float('nan') if p.grad is None else p.grad.norm().item() for name, p in named}
    # some architectures start with gradients that a bare step would make infinite weights of
    nn.utils.clip_grad_norm_(task.get_trainable_module().parameters(), 1.)
    optimizer.step()
    return result, gradients


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def to_double(raw: RawFeature) -> RawFeature:
    return raw.double() if isinstance(raw, torch.Tensor) else type(raw)(part.double() for part in raw)


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference relative to the logits' spread."""
    spread = (expected - expected.mean()).abs().max()
    return ((actual - expected).abs().max() / spread).item()


# As student

def test_one_step_has_a_finite_loss_and_a_gradient_in_every_adapter_parameter(trained: Trained) -> None:
    assert all(torch.isfinite(value).all() for value in trained.result.values())
    assert trained.result['norm_loss'] > 0
    assert trained.gradients
    assert {name: norm for name, norm in trained.gradients.items() if not 0 < norm < float('inf')} == {}


@torch.no_grad()
def test_merged_logits_equal_unmerged(trained: Trained) -> None:
    expected = trained.task.module.eval()(trained.images)
    actual = first(merge_student(trained.task)(trained.images))
    assert actual.shape == (BATCH, CLASSES)
    assert difference(actual, expected) < 1e-4


@torch.no_grad()
def test_merged_logits_equal_unmerged_in_float64(
        trained: Trained, built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    module, images = trained.task.module.eval(), trained.images
    head_alone = count_parameters(module.student) > DOUBLE_M * 1e6 and not module.tap.inside
    if head_alone:
        raw = to_double(module.student.forward_features(images))
        monkeypatch.setattr(module.student, 'forward_features', lambda images: raw)
    try:
        merged = module.double().merged_copy()
        actual = merged.forward_head(raw) if head_alone else merged(images.double())
        assert difference(first(actual), module(images.double())) < 1e-9
    finally:
        module.float()


def test_merged_weights_load_strictly_into_the_stock_architecture(trained: Trained, stock: nn.Module) -> None:
    state = trained.task.get_checkpoint_state()['state_dict']
    assert list(state) == list(stock.state_dict())
    stock.load_state_dict(state, strict=True)


# As teacher

@pytest.fixture(scope='module')
def stock(built: Built) -> nn.Module:
    return built.stock


@dataclass(frozen=True)
class Taught:
    """A teacher, a batch and what it gives for it."""
    teacher: Teacher
    images: torch.Tensor
    features: Features


@pytest.fixture(scope='module')
def taught(built: Built, stock: nn.Module) -> Taught:
    images = torch.randn(BATCH, *built.input_size)
    with evaluation_mode(stock):
        settle_batch_norms(stock, images)
    teacher = Teacher(stock, built.input_size)
    return Taught(teacher, images, teacher(images, TEACHER_OUTPUTS))


def test_teacher_gives_finite_feature_map_pre_logits_and_logits(taught: Taught) -> None:
    teacher, features = taught.teacher, taught.features
    assert features.feature.ndim == 4
    assert features.feature.shape[:2] == (BATCH, teacher.tap_channels('features'))
    assert features.pre_logits.shape == (BATCH, teacher.tap_channels('pre_logits'))
    assert features.logits.shape == (BATCH, CLASSES)
    assert all(torch.isfinite(x).all() for x in (features.feature, features.pre_logits, features.logits))


@torch.no_grad()
def test_teachers_logits_are_those_of_its_model(taught: Taught) -> None:
    expected = first(taught.teacher.model(taught.teacher.prepare(taught.images)))
    torch.testing.assert_close(taught.features.logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@torch.no_grad()
def test_folding_batch_norms_adds_nothing_to_the_rounding_of_the_logits(
        taught: Taught, built: Built, stock: nn.Module) -> None:
    folded, images = taught.teacher.folded, taught.teacher.prepare(taught.images)
    assert folded.norms == sum(map(is_batch_norm, stock.modules()))
    assert folded.folded == folded.norms - sum(map(is_batch_norm, taught.teacher.model.modules()))
    if not folded.folded:
        return
    assert folded.error < 1e-9
    plain = first(stock.eval()(images)).double()
    exact = first(copy.deepcopy(stock).double()(images.double()))
    # random models amplify rounding, some a thousandfold
    assert difference(taught.features.logits.double(), exact) < max(10 * difference(plain, exact), 1e-5) < 0.1


@torch.no_grad()
def test_teachers_map_is_the_grid_without_prefix_tokens(taught: Taught) -> None:
    teacher, feature = taught.teacher, taught.features.feature
    raw = last_stage_feature(teacher.model.forward_features(teacher.prepare(taught.images)), teacher.model)
    if raw.ndim == 4:
        assert feature.shape == teacher.spec.layout.to_positions(raw).shape
        return
    if not teacher.spec.layout.ordered:  # class tokens alone
        assert torch.equal(feature.flatten(1), raw.mean(1))
        return
    tokens = raw.shape[teacher.spec.layout.fmt.index('L')]
    assert feature.shape[2] * feature.shape[3] == tokens - teacher.spec.layout.num_prefix_tokens
    declared = getattr(teacher.model, 'num_prefix_tokens', None)
    if declared is not None and declared < tokens:
        assert teacher.spec.layout.num_prefix_tokens == declared


@torch.no_grad()
def test_teachers_stages_are_the_deepest_map_of_every_grid_or_the_quarters_of_one(taught: Taught) -> None:
    teacher, stages = taught.teacher, taught.features.stages
    if not hasattr(teacher.model, 'forward_intermediates'):
        assert stages == (taught.features.feature,)
        return
    maps = teacher.model.forward_intermediates(
        teacher.prepare(taught.images), output_fmt='NCHW', intermediates_only=True)
    assert stages and [tuple(stage.shape[1:]) for stage in stages] == [stage.shape for stage in teacher.spec.stages]
    deepest = {tuple(map_.shape[2:]): map_ for map_ in maps}
    expected = list(deepest.values())
    if len(deepest) == 1 and len(maps) >= 4:
        expected = [maps[len(maps) * quarter // 4 - 1] for quarter in (1, 2, 3, 4)]
    assert len(stages) == len(expected)
    for stage, map_ in zip(stages, expected):
        torch.testing.assert_close(stage, map_)


WITHOUT_TAIL = {  # their last feature reads more than the stage, or class tokens that cannot be read at it
    'coat_tiny', 'crossvit_tiny_240', 'hiera_tiny_224', 'hrnet_w18_small', 'legacy_xception', 'mvitv2_small_cls',
    'nasnetalarge', 'pit_ti_224', 'pit_ti_distilled_224', 'pnasnet5large', 'tnt_s_legacy_patch16_224', 'xception41p'}


@pytest.mark.slow
def test_what_follows_the_stage_before_the_last_is_found_or_the_reason_is_given(taught: Taught, built: Built) -> None:
    reason = taught.teacher.resolve_tail()
    assert bool(reason) == (built.family.name in WITHOUT_TAIL), reason
    if reason:
        return
    features = taught.teacher(taught.images, frozenset({'stages', 'feature', 'tail'}))
    with torch.no_grad():
        actual = taught.teacher.run_tail(features.stages[-2], features.prefix)
    assert difference(actual, features.feature) < 1e-4  # measured to 1e-6 already, in float64 where rounding is larger


def test_classifier_for_methods_that_reuse_it_has_a_row_for_every_class(taught: Taught) -> None:
    classifier = classifier_linear(taught.teacher.model)
    if classifier is not None:
        assert classifier.weight.shape[0] == CLASSES


# Too large to run

@pytest.mark.parametrize('family', [pytest.param(f, id=f.name) for f in list_families() if f.params_m > HUGE_M])
def test_huge_models_have_a_layout_and_stages_on_the_meta_device(family: Family) -> None:
    if family.name.startswith('gemma4'):
        pytest.skip(f'{family.name} reads its grid from values, which a tensor on the meta device does not have')
    with torch.device('meta'):
        model = family.create()
        layout = resolve_feature_layout(model, (3, family.size, family.size))
        stages = resolve_stages(model, (3, family.size, family.size))
    assert layout.channels == model.num_features
    assert stages


# The list

def test_list_holds_every_family_once() -> None:
    families = list_families()
    assert len({family.name for family in families}) == len(families) == 119


def test_list_is_that_of_the_survey() -> None:
    if not SHARED_LIST.is_file():
        pytest.skip('the survey of timm\'s heads is not beside the repository')
    rows = json.loads(SHARED_LIST.read_text(encoding='utf-8'))['families']
    surveyed = {(row['representative'], row['module'], row['input_size'][1], row['params_m']) for row in rows}
    assert {(f.name, f.module, f.size, f.params_m) for f in list_families()} == surveyed
