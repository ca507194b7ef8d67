"""What every registered method promises, over convolutional and transformer pairs."""
import copy
import math
from functools import cache
from pathlib import Path
from typing import Any, Dict, Tuple

import pytest
import timm
import torch
import torch.nn as nn
from ranks import run_ranks
from timm.optim import create_optimizer_v2

from timm_distill import DistillTask, Teacher, create_distill_task, list_methods, merge_student
from timm_distill.methods import METHODS
from timm_distill.methods._composition import methods_of
from timm_distill.methods._wrapper import WrapperMethod

SIZE = (3, 32, 32)
CLASSES = 5
SAMPLE_LABELS = torch.arange(12) % CLASSES  # of a training set, for the methods that keep something of each sample
CNN: Tuple[str, Dict[str, Any]] = ('test_resnet', {})
CNN_STUDENT: Tuple[str, Dict[str, Any]] = ('test_efficientnet', {})
VIT: Tuple[str, Dict[str, Any]] = ('test_vit', dict(img_size=32, depth=4))
VIT_STUDENT: Tuple[str, Dict[str, Any]] = ('test_vit', dict(img_size=32, depth=4, embed_dim=32, reg_tokens=2))
PAIRS = {
    'cnn_to_cnn': CNN_STUDENT,
    'vit_to_cnn': CNN_STUDENT,
    'cnn_to_vit': VIT_STUDENT,
    'vit_to_vit': VIT_STUDENT,
}
# one that takes another is in a file of its own
METHOD_NAMES = [name for name in list_methods() if not issubclass(METHODS.get(name).cls, WrapperMethod)]
each_method = pytest.mark.parametrize('method', METHOD_NAMES)
each_pair = pytest.mark.parametrize('pair', PAIRS)


TOKEN_STUDENT: Tuple[str, Dict[str, Any]] = (
    'deit_tiny_distilled_patch16_224', dict(img_size=32, embed_dim=32, depth=2, num_heads=2))


def create_model(model: Tuple[str, Dict[str, Any]]) -> nn.Module:
    return timm.create_model(model[0], num_classes=CLASSES, **model[1])


@cache
def create_teacher(name: str) -> Teacher:
    """Return the frozen teacher of all students: 'cnn' or 'vit'."""
    torch.manual_seed(0)
    return Teacher(create_model(CNN if name == 'cnn' else VIT), SIZE)


def create_student(kd: str, student: Tuple[str, Dict[str, Any]] = CNN_STUDENT) -> nn.Module:
    """Return a student; one with a distillation token where a method reads that."""
    token = any('token_logits' in cls.student_outputs for cls in methods_of(kd).values())
    return create_model(TOKEN_STUDENT if token else student)


def made_ready(task: DistillTask) -> DistillTask:
    """Return the task, with class means and statistics of targets where a method needs them."""
    if task.class_means_shape is not None:
        task.set_class_means(torch.randn(task.class_means_shape))
    if task.needs_target_statistics:
        task.standardize_targets([(torch.randn(16, *SIZE), torch.zeros(16))])
    return task


@cache
def _task(method: str, pair: str) -> DistillTask:
    teacher, student = create_teacher(pair.split('_to_')[0]), PAIRS[pair]
    torch.manual_seed(0)
    return made_ready(create_distill_task(
        create_student(method, student), teacher, kd=method, sample_labels=SAMPLE_LABELS, input_size=SIZE,
        verbose=False))


def create_task(method: str, pair: str = 'cnn_to_cnn') -> DistillTask:
    """Return a task of its own for a test."""
    task = _task(method, pair)
    return copy.deepcopy(task, {id(task.teacher): task.teacher}).train()  # the teacher is frozen


@cache
def _shared_task(method: str, pair: str) -> DistillTask:
    return create_task(method, pair)


def shared_task(method: str, pair: str) -> DistillTask:
    """Return a task for what holds in any state of it: those tests that leave nothing but its weights changed."""
    task = _shared_task(method, pair).train()
    task.get_trainable_module().zero_grad(set_to_none=True)
    return task


def create_batch(kd: str = 'none', soft: bool = False, size: int = 4) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return images and what the methods take as target: soft ones only where images may be mixed."""
    classes = methods_of(kd).values()
    soft = soft and all(cls.mixed_images for cls in classes)
    target = torch.rand(size, CLASSES).softmax(1) if soft else torch.arange(size) % CLASSES
    if any(cls.needs_indices for cls in classes):
        target = torch.stack([target, torch.arange(size)], 1)
    return torch.randn(size, *SIZE), target


def train(task: DistillTask, kd: str, steps: int = 2) -> None:
    """Train on batches of the current random state."""
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        task(*create_batch(kd))['loss'].backward()
        optimizer.step()
        task.update_ema(step=step)


# what a target looks like has nothing to do with where features come from
@pytest.mark.parametrize('pair, soft', [
    *((pair, False) for pair in PAIRS), ('cnn_to_cnn', True), ('vit_to_vit', True)])
@each_method
def test_result_is_finite_and_loss_is_the_sum_of_its_terms(method: str, pair: str, soft: bool) -> None:
    task = shared_task(method, pair)
    result = task(*create_batch(method, soft))
    terms = {name: value for name, value in result.items() if name.endswith('_loss')}
    assert set(terms) > {'task_loss'}
    assert all(value.ndim == 0 and torch.isfinite(value) for value in terms.values())
    assert torch.isfinite(result['output']).all() and result['output'].shape == (4, CLASSES)
    weighted = task.weighted_terms(result)
    assert {f'{name}_loss' for name in weighted} == set(terms)
    torch.testing.assert_close(result['loss'], sum(weighted.values()))
    weight, task_loss = METHODS.get(method).cls.published_weight, terms.pop('task_loss')
    torch.testing.assert_close(result['loss'], task_loss + weight * sum(terms.values()), rtol=1e-4, atol=1e-4)


@each_pair
@each_method
def test_every_trainable_tensor_gets_a_finite_gradient_and_the_teacher_none(method: str, pair: str) -> None:
    task = shared_task(method, pair)
    teacher = {name: tensor.clone() for name, tensor in task.teacher.state_dict().items()}
    task(*create_batch(method))['loss'].backward()
    for name, parameter in task.get_trainable_module().named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert all(p.grad is None and not p.requires_grad for p in task.teacher.parameters())
    state = task.teacher.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in teacher.items())


@each_pair
@each_method
def test_bfloat16_autocast_is_finite_with_losses_in_float32(method: str, pair: str) -> None:
    task = shared_task(method, pair)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = task(*create_batch(method))
    result['loss'].backward()
    assert {value.dtype for name, value in result.items() if name.endswith('loss')} == {torch.float32}
    assert all(torch.isfinite(value).all() for value in result.values())
    assert all(torch.isfinite(p.grad).all() for p in task.get_trainable_module().parameters())


@each_method
def test_every_trainable_tensor_is_in_optimizer_ema_and_checkpoint_and_the_teacher_in_none(method: str) -> None:
    task = create_task(method)
    task.setup_ema(decay=0.5)
    module = task.get_trainable_module()
    optimized = {id(p) for g in create_optimizer_v2(module, opt='sgd', lr=0.1).param_groups for p in g['params']}
    assert optimized == {id(p) for p in module.parameters() if p.requires_grad}
    assert not optimized & {id(p) for p in task.teacher.parameters()}
    assert {f'module.{name}' for name in module.state_dict()} == set(task.trainable_module_ema.state_dict())
    saved = task.get_checkpoint_state()
    state = saved['task_state']
    names = {f'student.{name}' for name in saved['state_dict']}
    names |= {f'adapters.{name}' for name in state['adapter']} | {f'methods.{name}' for name in state['methods']}
    assert names == set(module.state_dict())


@each_method
def test_training_lowers_the_methods_own_terms(method: str) -> None:
    torch.manual_seed(0)
    task, batch = create_task(method), create_batch(method)
    task.task_loss_weight = 0.
    optimizer = torch.optim.Adam(task.get_trainable_module().parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss = task(*batch)['loss']
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@each_pair
@each_method
def test_merged_student_has_the_trained_ones_logits(method: str, pair: str) -> None:
    task = shared_task(method, pair)
    task(*create_batch(method))['loss'].backward()
    images = create_batch()[0]
    with torch.no_grad():
        expected, actual = task.get_trainable_module().eval()(images), merge_student(task)(images)
    assert (actual - expected).abs().max() < 1e-5 * (expected - expected.mean()).abs().max()


@each_method
def test_defaults_can_be_given_by_name(method: str) -> None:
    defaults = METHODS.get(method).defaults
    options = {f'{method}.{key}': value for key, value in defaults.items()}
    torch.manual_seed(0)
    task = made_ready(create_distill_task(
        create_student(method), create_teacher('cnn'), kd=method, kd_kwargs=options, sample_labels=SAMPLE_LABELS,
        input_size=SIZE, verbose=False))
    assert torch.isfinite(task(*create_batch(method))['loss'])


@each_method
def test_state_saved_and_loaded_into_another_task_goes_on_bit_identical(method: str, tmp_path: Path) -> None:
    task = create_task(method)
    train(task, method)
    torch.save(task.get_checkpoint_state(), tmp_path / 'state.pt')
    other = create_task(method)
    other.load_checkpoint_state(**torch.load(tmp_path / 'state.pt', weights_only=True))
    for trained in (task, other):
        torch.manual_seed(3)
        train(trained, method)
    expected, actual = ({**t.module.state_dict(), **t.module.memory()} for t in (task, other))
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@each_method
@pytest.mark.parametrize('soft', [False, True], ids=['hard', 'soft'])
def test_batch_of_one_is_finite(method: str, soft: bool) -> None:
    torch.manual_seed(0)
    task = create_task(method)
    task.student.eval()  # its own batch norms take no single image at this size
    for module in task.module.adapters:
        module.eval()
    result = task(*create_batch(method, soft, size=1))
    result['loss'].backward()
    assert all(torch.isfinite(value).all() for value in result.values())
    assert all(torch.isfinite(p.grad).all() for p in task.module.parameters() if p.grad is not None)


@each_method
def test_beside_norm_it_merges_exactly_and_releases_the_plain_student(method: str) -> None:
    kd = 'norm' if method == 'norm' else f'norm+{method}'
    task = create_task(kd)
    train(task, kd)
    state, images = task.get_checkpoint_state()['state_dict'], create_batch()[0]
    assert list(state) == list(create_student(kd).state_dict())
    with torch.no_grad():
        expected, actual = task.get_trainable_module().eval()(images), merge_student(task)(images)
    assert (actual - expected).abs().max() < 1e-5 * (expected - expected.mean()).abs().max()


# Published weights are those of trained models of other sizes. That of vid is small on purpose at the start: its
# variances begin at 5 and its regressors at small outputs. Those of vitkd are for sums over 196 tokens of hundreds of
# channels.
SHARES = {'vid': (1e-5, 10.), 'vitkd': (1e-7, 10.)}


@each_method
def test_gradient_at_the_default_weight_is_a_sensible_part_of_the_label_losss(method: str) -> None:
    task = create_task(method, 'vit_to_cnn')
    torch.manual_seed(1)
    weighted = task.weighted_terms(task(*create_batch(method, size=10)))
    parameters = list(task.student.parameters())
    norms = []
    for term in (weighted.pop('task'), sum(weighted.values())):
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        norms.append(torch.cat([g.flatten() for g in gradients if g is not None]).norm().item())
    low, high = SHARES.get(method, (0.01, 100.))
    assert low < norms[1] / norms[0] < high


@each_method
def test_loss_falls_at_the_default_weight(method: str) -> None:
    torch.manual_seed(0)
    task, batch = create_task(method), create_batch(method)
    optimizer = torch.optim.Adam(task.get_trainable_module().parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss = task(*batch)['loss']
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@each_method
def test_a_method_trains_the_classifier_exactly_where_it_reads_the_logits(method: str) -> None:
    task = create_task(method)
    task.task_loss_weight = 0.
    task(*create_batch(method))['loss'].backward()
    head = task.student.get_classifier()
    gradients = [p.grad for p in (head[0] if isinstance(head, tuple) else head).parameters()]
    assert task.trains_classifier == any(g is not None and bool(g.any()) for g in gradients)


@each_method
def test_a_classifier_that_starts_at_zero_has_no_larger_gradient_than_any_other(method: str) -> None:
    sizes = []
    for bias in (None, 0., -math.log(CLASSES)):
        task = create_task(method)
        for head in (m for m in task.student.modules() if isinstance(m, nn.Linear) and m.out_features == CLASSES):
            if bias is not None:
                nn.init.zeros_(head.weight)
                nn.init.constant_(head.bias, bias)
        torch.manual_seed(1)
        result = task(*create_batch(method, size=6))
        result['loss'].backward()
        gradients = [p.grad.flatten() for p in task.module.parameters() if p.grad is not None]
        assert torch.isfinite(result['loss'])
        sizes.append(torch.cat(gradients).norm().item())
    assert max(sizes[1:]) < 10 * sizes[0]


def _run_rank(rank: int, world_size: int) -> Dict[str, torch.Tensor]:
    names = [name for name in METHOD_NAMES if 'token_logits' not in METHODS.get(name).cls.student_outputs]
    kd, teacher = '+'.join(names), create_teacher('cnn')
    torch.manual_seed(0)
    task = made_ready(create_distill_task(
        create_student(kd), teacher, kd=kd, kd_weight=dict.fromkeys(names, 1e-3), sample_labels=SAMPLE_LABELS,
        input_size=SIZE, verbose=False)).train()
    task.prepare_distributed(device_ids=[torch.device('cpu')])
    torch.manual_seed(1 + rank)
    train(task, kd, steps=3)
    return {**dict(task.module.named_parameters()), **task.module.memory()}


@pytest.mark.dist
def test_two_processes_keep_equal_parameters_and_memories_of_all_methods_together(tmp_path: Path) -> None:
    first, second = run_ranks(_run_rank, tmp_path)
    assert any('crd.student_bank' in name for name in first) and any('methods.fitnet' in name for name in first)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
        assert not tensor.is_floating_point() or torch.isfinite(tensor).all(), name


@pytest.mark.parametrize('method', [name for name in list_methods() if not METHODS.get(name).cls.reads_labels])
def test_a_method_that_needs_no_labels_gives_the_same_terms_whatever_the_targets(method: str) -> None:
    task = create_task(method).eval()
    images, target = create_batch(method)
    other = target.clone()
    if other.ndim == 1:
        other[:] = 0
    else:
        other[:, 0] = 0
    torch.manual_seed(1)
    first = task(images, target)
    torch.manual_seed(1)
    second = task(images, other)
    assert {name: value for name, value in first.items() if name not in ('loss', 'task_loss', 'output')} == {
        name: value for name, value in second.items() if name not in ('loss', 'task_loss', 'output')}
