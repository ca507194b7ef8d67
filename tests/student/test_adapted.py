"""The trainable module: student, adapter and methods in one forward."""
import copy
from typing import Any, Callable, Dict, Tuple

import pytest
import timm
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2
from tiny_models import CHANNELS, Plain, TwoScales, WithClassifier

from timm_distill import UsageError, create_adapter
from timm_distill.adapters import Match
from timm_distill.features.spec import Features
from timm_distill.losses import match_grids, n_to_one_loss
from timm_distill.methods import DistillMethod
from timm_distill.student.adapted import AdaptedStudent
from timm_distill.student.tap_search import resolve_student_tap

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
    adapter = create_adapter('norm', tap.layout.channels, 6, **{'segments': 2, 'init': 'official', **options})
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


each_form = pytest.mark.parametrize('form', ['direct', 'moments'])


@each_form
@pytest.mark.parametrize('kind', STUDENTS)
def test_adapter_matches_with_the_teachers_counterpart_of_the_tap(kind: str, form: str) -> None:
    module, images = create_module(kind, form=form).eval(), torch.randn(2, *SIZE)
    (site,), (adapter,) = module.tap.sites, module.adapters
    feature = module.student.forward_features(images)
    if module.tap.point == 'pre_logits':
        feature = module.student.forward_head(feature, pre_logits=True)
    positions = site.layout.to_positions(feature)
    expanded = site.layout.to_map(adapter.expand_contract(positions)[1])
    assert expanded.ndim == 4 and expanded.shape[:2] == (2, 12)
    teacher = torch.randn(2, 6, 2, 2)
    (loss,) = module.forward_with_features(images, Features(tap=teacher)).matched
    torch.testing.assert_close(loss, n_to_one_loss(*match_grids(expanded, teacher), 2))


@each_form
@pytest.mark.parametrize('kind', STUDENTS)
def test_nothing_is_matched_without_a_teacher_or_its_counterpart(kind: str, form: str) -> None:
    module, images = create_module(kind, form=form).eval(), torch.randn(2, *SIZE)
    alone = module.forward_with_features(images)
    without_tap = module.forward_with_features(images, Features(logits=torch.randn(2, CLASSES)))
    assert alone.matched == without_tap.matched == ()
    assert torch.equal(alone.logits, without_tap.logits)


@each_form
def test_prefix_tokens_are_matched_with_nothing(form: str) -> None:
    module, images = create_module('tokens', form=form).eval(), torch.randn(2, *SIZE)
    tokens = module.student.forward_features(images)[:, 1:]
    teacher = torch.randn(2, 6, 2, 2)
    (loss,) = module.forward_with_features(images, Features(tap=teacher)).matched
    _, expanded = module.adapters[0].expand_contract(tokens.transpose(1, 2).unflatten(2, (2, 2)))
    torch.testing.assert_close(loss, n_to_one_loss(expanded, teacher, 2))


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
    assert set(state) == {'student', 'adapter', 'methods', 'memory'} and not state['memory']
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


# Several adapters, adapters on the side, adapters inside a forward

def create_custom(factory: Callable[[], nn.Module], point: str = 'auto', **options: Any) -> AdaptedStudent:
    torch.manual_seed(0)
    student = factory().double()
    tap = resolve_student_tap(student, SIZE, point)
    adapters = [
        create_adapter('norm', site.layout.channels, 3, segments=2, side=point == 'side', **options)
        for site in tap.sites
    ]
    module = AdaptedStudent(student, adapters, tap).double()
    for parameter in module.adapters.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def images_and_logits(module: AdaptedStudent) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return a batch and the logits of a plain student with the merged weights."""
    images = torch.randn(2, *SIZE, dtype=torch.float64)
    return images, module.merged_copy()(images)


@each_form
def test_every_site_has_an_adapter_of_its_own_width_and_a_loss(form: str) -> None:
    module = create_custom(TwoScales, form=form).eval()
    assert [adapter.student_channels for adapter in module.adapters] == [4, CHANNELS]
    images, teacher = torch.randn(2, *SIZE, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    losses = module.forward_with_features(images, Features(tap=teacher)).matched
    expected = [
        n_to_one_loss(*match_grids(adapter.expand_contract(feature)[1], teacher), 2)
        for adapter, feature in zip(module.adapters, module.student.forward_features(images))
    ]
    torch.testing.assert_close(losses, tuple(expected))


@pytest.mark.parametrize('factory', [TwoScales, Plain, WithClassifier])
def test_custom_models_merge_exactly(factory: Callable[[], nn.Module]) -> None:
    module = create_custom(factory).eval()
    images, merged = images_and_logits(module)
    torch.testing.assert_close(module(images), merged, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(factory().double().eval()(images), merged, rtol=1e-2)
    assert module.merge_error(images) < 1e-10


def test_adapters_of_several_sites_change_each_heads_own_tensors() -> None:
    module = create_custom(TwoScales)
    assert set(module.task_state()['student']) == {'fc.0.weight', 'fc.0.bias', 'fc.1.weight', 'fc.1.bias'}
    assert {name.split('.')[0] for name in module.task_state()['adapter']} == {'0', '1'}


def test_side_adapter_leaves_the_students_logits_and_weights_untouched() -> None:
    module = create_custom(TwoScales, 'side').eval()
    images, merged = images_and_logits(module)
    assert torch.equal(module(images), module.student(images)) and torch.equal(module(images), merged)
    state = module.merged_state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in module.student.state_dict().items())
    assert list(state) == list(module.student.state_dict())
    assert module.task_state()['student'] == {}


@each_form
def test_side_adapters_loss_reaches_the_trunk_and_not_the_head(form: str) -> None:
    module = create_custom(TwoScales, 'side', form=form).train()
    teacher = Features(tap=torch.randn(4, 3, 3, 3, dtype=torch.float64))
    (loss,) = module.forward_with_features(torch.randn(4, *SIZE, dtype=torch.float64), teacher).matched
    loss.backward()
    reached = {name for name, p in module.student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached >= {'stem.0.weight', 'stem.1.weight'} and not any(name.startswith('fc') for name in reached)
    assert all(p.grad is not None for p in module.adapters.parameters())


@pytest.mark.parametrize('factory', [Plain, WithClassifier])
def test_adapter_inside_a_forward_keeps_the_students_names(factory: Callable[[], nn.Module]) -> None:
    module = create_custom(factory)
    assert type(module.student.fc) is nn.Linear
    assert list(module.student.state_dict()) == list(factory().state_dict())
    assert [n for n, _ in module.student.named_modules()] == [n for n, _ in factory().named_modules()]
    assert {name.split('.')[0] for name in module.state_dict()} == {'student', 'adapters'}
    assert len({id(p) for p in module.parameters()}) == len(list(module.parameters()))


@pytest.mark.parametrize('factory', [Plain, WithClassifier])
def test_adapter_inside_a_forward_is_gone_from_the_merged_copy(factory: Callable[[], nn.Module]) -> None:
    module = create_custom(factory).train()
    module(torch.randn(4, *SIZE, dtype=torch.float64)).sum().backward()
    merged = module.merged_copy()
    assert type(merged.fc) is nn.Linear
    assert set(vars(merged.fc)) == set(vars(factory().fc)) and not merged.fc._forward_pre_hooks
    factory().double().load_state_dict(merged.state_dict(), strict=True)


def test_adapter_inside_a_forward_sees_the_classifiers_input() -> None:
    module = create_custom(Plain).eval()
    images = torch.randn(2, *SIZE, dtype=torch.float64)
    pooled = module.student.run_stem(images).mean((2, 3))
    teacher = torch.randn(2, 3, 1, 1, dtype=torch.float64)
    adapted = module.adapters[0](pooled[:, :, None, None], Match(teacher, lambda positions: positions))
    features = module.forward_with_features(images, Features(tap=teacher))
    torch.testing.assert_close(features.matched, (adapted.loss,))
    fc = module.student.fc
    torch.testing.assert_close(
        features.logits, nn.functional.linear(adapted.output.flatten(1), fc.weight, fc.bias))


def test_deep_copy_runs_its_own_adapter_inside_a_forward() -> None:
    module = create_custom(Plain).train()
    images = torch.randn(4, *SIZE, dtype=torch.float64)
    module(images).sum().backward()
    clone = copy.deepcopy(module.eval())
    expected = clone(images)
    for parameter in module.adapters.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(clone(images), expected)
    assert not torch.allclose(module(images), expected)


def test_adapter_inside_a_forward_follows_dtype_and_state() -> None:
    module, fresh = create_custom(Plain), create_custom(Plain)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.)
    fresh.load_task_state(module.merged_state_dict(), module.task_state())
    images = torch.randn(2, *SIZE, dtype=torch.float64)
    assert torch.equal(fresh.eval()(images), module.eval()(images))
    assert module.float()(images.float()).dtype == torch.float32


@pytest.mark.parametrize('factory', [Plain, WithClassifier])
def test_adapter_inside_a_forward_keeps_nothing_of_a_batch(factory: Callable[[], nn.Module]) -> None:
    module, images = create_custom(factory).train(), torch.randn(4, *SIZE, dtype=torch.float64)
    teacher = Features(tap=torch.randn(4, 3, 1, 1, dtype=torch.float64))
    (loss,) = module.forward_with_features(images, teacher).matched
    assert loss.requires_grad
    copy.deepcopy(module)  # refuses tensors that are not leaves
    assert module.forward_with_features(images).matched == ()
    module(images)
    copy.deepcopy(module)
    assert not module.student.fc._forward_pre_hooks


def test_forward_that_fails_leaves_no_hook_behind() -> None:
    module, images = create_custom(Plain), torch.randn(2, *SIZE, dtype=torch.float64)
    module.adapters[0].forward = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        module(images)
    assert not module.student.fc._forward_pre_hooks


# Dropout in front of the classifier

class DropsBetween(Plain):
    """timm's parts with pre-logits in front of the dropout that the head runs, and a classifier behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = CHANNELS
        self.head = nn.Sequential(nn.Dropout(0.5), self.fc)
        del self.fc

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.run_stem(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module:
        return self.head[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


class DropsInForward(Plain):
    """A model with nothing but a forward, with a dropout in the middle and one before the classifier."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(self.run_stem(x), 0.1 if self.training else 0.2, False)
        return self.fc(nn.functional.dropout(x.mean((2, 3)), 0.5, self.training))


DROPPING: Dict[str, Callable[[], nn.Module]] = {
    'function': lambda: timm.create_model('test_efficientnet', num_classes=CLASSES, drop_rate=0.5),
    'module': lambda: timm.create_model('test_convnext', num_classes=CLASSES, drop_rate=0.5, depths=(1, 1, 1, 1)),
    'tokens': lambda: timm.create_model('test_vit', num_classes=CLASSES, drop_rate=0.5, img_size=32, depth=2),
    'behind the pre-logits': DropsBetween,
    'in a plain forward': DropsInForward,
}
each_dropping = pytest.mark.parametrize('kind', DROPPING)


def create_dropping(kind: str, form: str = 'direct') -> AdaptedStudent:
    torch.manual_seed(0)
    student = DROPPING[kind]().double()
    tap = resolve_student_tap(student, SIZE, 'pre_logits')
    adapter = create_adapter('norm', tap.layout.channels, 3, segments=2, form=form)
    module = AdaptedStudent(student, [adapter], tap).double().train()
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.momentum = 1.
    return module


@each_form
@each_dropping
def test_batch_norms_at_the_pre_logits_see_what_they_see_at_inference(kind: str, form: str) -> None:
    module, images = create_dropping(kind, form), torch.randn(32, *SIZE, dtype=torch.float64)
    module(images)
    for part in module.student.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()
    dropped = module(images)
    trained = copy.deepcopy(module.adapters[0].state_dict())
    module.student.eval()
    expected = module(images)  # the adapter alone in training
    for name, tensor in module.adapters[0].state_dict().items():
        if 'running' in name:
            torch.testing.assert_close(trained[name], tensor, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(dropped, expected, rtol=0.1)


@each_dropping
def test_half_of_the_classifiers_input_is_dropped_behind_the_adapter(kind: str) -> None:
    module, images = create_dropping(kind), torch.randn(32, *SIZE, dtype=torch.float64)
    inputs = []
    name = module.tap.consumers[0].linear
    linear = module.student.get_submodule(name)
    forward = nn.functional.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, 'linear', lambda x, weight, *bias: [
            inputs.append(x) if weight is linear.weight else None, forward(x, weight, *bias)][1])
        module(images)
        module.eval()(images)
    dropped, kept = inputs
    assert 0.3 < (dropped == 0).double().mean() < 0.7
    assert (kept != 0).all()


@each_dropping
def test_logits_of_eval_and_the_loss_do_not_depend_on_the_dropout(kind: str) -> None:
    module, images = create_dropping(kind), torch.randn(8, *SIZE, dtype=torch.float64)
    teacher = torch.randn(8, 3, 1, 1, dtype=torch.float64)
    losses = [module.forward_with_features(images, Features(tap=teacher)).matched[0] for _ in range(2)]
    torch.testing.assert_close(*losses)
    module.eval()
    torch.testing.assert_close(module(images), module.merged_copy()(images))
    copy.deepcopy(module)


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'backend'), [
    ('function', 'eager'), ('module', 'eager'), ('in a plain forward', 'aot_eager')])
def test_compiled_student_drops_behind_the_adapter_too(kind: str, backend: str) -> None:
    torch.compiler.reset()
    module, images = create_dropping(kind), torch.randn(32, *SIZE, dtype=torch.float64)
    module(images)
    expected = copy.deepcopy(module.adapters[0].state_dict())
    torch.compile(module, backend=backend)(images)
    for name, tensor in module.adapters[0].state_dict().items():
        if 'running' in name:
            torch.testing.assert_close(tensor, expected[name])
