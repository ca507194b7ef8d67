"""The trainable module: student, adapter and methods in one forward."""
import copy
from typing import Any, Dict, Tuple

import pytest
import timm
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2

from timm_distill import UsageError, create_adapter
from timm_distill.methods import DistillMethod
from timm_distill.student import AdaptedStudent
from timm_distill.taps import Features, resolve_student_tap

SIZE = (3, 32, 32)
CLASSES = 5
STUDENTS: Dict[str, Tuple[str, Dict[str, Any]]] = {
    'nchw': ('test_resnet', {}),
    'nhwc': ('test_mambaout', {}),
    'tokens': ('test_vit', dict(img_size=32)),
    'vector': ('test_convnext', {}),
}


class Doubling(DistillMethod):
    """Trains one tensor, doubles the logits and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def transform_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return 2 * logits

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        self.seen = student, teacher
        return {'doubling_loss': (self.scale * student.logits).square().mean()}


def create_student(kind: str) -> nn.Module:
    torch.manual_seed(0)
    name, kwargs = STUDENTS[kind]
    return timm.create_model(name, num_classes=CLASSES, **kwargs)


def create_module(kind: str = 'nchw', seed: int = 0, **options: Any) -> AdaptedStudent:
    student = create_student(kind)
    tap = resolve_student_tap(student, SIZE)
    torch.manual_seed(seed)
    adapter = create_adapter('norm', tap.layout.channels, 6, **{'segments': 2, **options})
    return AdaptedStudent(student, [adapter], tap, {'doubling': Doubling()})


def silence(module: AdaptedStudent) -> None:
    """Make a residual adapter the identity."""
    nn.init.zeros_(module.adapters[0].contract.weight)


@pytest.mark.parametrize('kind', STUDENTS)
def test_adapter_that_is_the_identity_gives_the_students_logits(kind: str) -> None:
    module = create_module(kind).eval()
    silence(module)
    images = torch.randn(2, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(module(images), module.student(images))


@pytest.mark.parametrize('kind', STUDENTS)
def test_expanded_feature_is_a_map_of_segments_times_the_teachers_channels(kind: str) -> None:
    features = create_module(kind).forward_with_features(torch.randn(2, *SIZE))
    (expanded,) = features.expanded
    assert features.segments == 2
    assert expanded.ndim == 4 and expanded.shape[:2] == (2, 12)


def test_expanded_feature_of_tokens_leaves_prefix_tokens_out() -> None:
    module = create_module('tokens').eval()
    images = torch.randn(2, *SIZE)
    features = module.forward_with_features(images)
    tokens = module.student.forward_features(images)[:, 1:]
    expected = module.adapters[0](tokens.transpose(1, 2).unflatten(2, (2, 2))).expanded
    torch.testing.assert_close(features.expanded, (expected,))


def test_forward_without_a_teacher_gives_logits() -> None:
    assert create_module()(torch.randn(2, *SIZE)).shape == (2, CLASSES)


def test_forward_with_a_teacher_gives_raw_logits_mapped_logits_and_terms() -> None:
    module = create_module().eval()
    images, teacher_logits = torch.randn(2, *SIZE), torch.randn(2, CLASSES)
    logits, task_logits, terms = module(images, Features(logits=teacher_logits), torch.zeros(2).long())
    torch.testing.assert_close(logits, module(images))
    torch.testing.assert_close(task_logits, 2 * logits)
    assert list(terms) == ['doubling'] and list(terms['doubling']) == ['doubling_loss']
    student, teacher = module.methods['doubling'].seen
    assert student.logits is task_logits
    torch.testing.assert_close(teacher.logits, 2 * teacher_logits)


def test_module_without_adapter_runs_the_students_own_forward() -> None:
    student = create_student('nchw').eval()
    images = torch.randn(2, *SIZE)
    assert torch.equal(AdaptedStudent(student)(images), student(images))


def test_deep_copy_calls_its_own_adapter() -> None:
    module = create_module().eval()
    clone, images = copy.deepcopy(module), torch.randn(2, *SIZE)
    expected = module(images)
    nn.init.zeros_(module.adapters[0].contract.weight)
    assert torch.equal(clone(images), expected)
    assert not torch.allclose(module(images), expected)


def test_students_parameters_without_weight_decay_stay_so() -> None:
    module = create_module('tokens')
    own = module.student.no_weight_decay()
    assert own and module.no_weight_decay() == {f'student.{name}' for name in own}
    groups = create_optimizer_v2(module, opt='sgd', lr=0.1, weight_decay=0.05).param_groups
    undecayed = {id(p) for group in groups if not group['weight_decay'] for p in group['params']}
    assert all(id(p) in undecayed for name, p in module.student.named_parameters() if name in own)


@pytest.mark.parametrize('kind', STUDENTS)
def test_layer_decay_puts_adapter_and_methods_with_the_last_layer(kind: str) -> None:
    module = create_module(kind)
    groups = create_optimizer_v2(module, opt='adamw', lr=0.1, layer_decay=0.5).param_groups
    scales = {id(p): group.get('lr_scale', 1.) for group in groups for p in group['params']}
    assert set(scales) == {id(p) for p in module.parameters()}
    own = [*module.adapters.parameters(), *module.methods.parameters()]
    assert {scales[id(p)] for p in own} == {1.}
    reference = create_optimizer_v2(module.student, opt='adamw', lr=0.1, layer_decay=0.5).param_groups
    expected = {id(p): group['lr_scale'] for group in reference for p in group['params']}
    assert all(scales[key] == pytest.approx(scale) for key, scale in expected.items())


def test_student_without_a_group_matcher_has_no_groups() -> None:
    assert AdaptedStudent(nn.Linear(2, 2)).group_matcher() == {}


@pytest.mark.parametrize('kind', STUDENTS)
def test_state_comes_back_bit_identical(kind: str) -> None:
    module, fresh = create_module(kind), create_module(kind, seed=1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    fresh.load_task_state(module.merged_state_dict(), module.task_state())
    expected = module.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in fresh.state_dict().items())


def test_task_state_holds_only_what_the_merged_student_lacks() -> None:
    state = create_module().task_state()
    assert set(state) == {'student', 'adapter', 'methods'}
    assert set(state['student']) == {'fc.weight', 'fc.bias'}
    assert set(state['methods']) == {'doubling.scale'}


def test_state_of_another_adapter_is_refused() -> None:
    module, other = create_module(), create_module(segments=3)
    with pytest.raises(UsageError, match='--kd-kwargs'):
        other.load_task_state(module.merged_state_dict(), module.task_state())


def test_state_of_another_student_is_refused() -> None:
    module, other = create_module('nchw'), create_module('vector')
    with pytest.raises(UsageError, match='--student'):
        other.load_task_state(module.merged_state_dict(), module.task_state())


@pytest.mark.parametrize('task_state', [None, {}])
def test_plain_checkpoint_cannot_resume_an_adapter(task_state: Any) -> None:
    module = create_module()
    with pytest.raises(UsageError, match='holds no adapter'):
        module.load_task_state(module.merged_state_dict(), task_state)


def test_adapters_checkpoint_cannot_resume_a_plain_student() -> None:
    module = create_module()
    plain = AdaptedStudent(create_student('nchw'))
    with pytest.raises(UsageError, match='holds an adapter'):
        plain.load_task_state(module.merged_state_dict(), module.task_state())
