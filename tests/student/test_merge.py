"""Merged students give the logits of the students as trained and are plain timm models."""
import copy
from functools import cache
from pathlib import Path
from typing import Any, Dict, List, Tuple, Type

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import FrozenBatchNormAct2d, freeze_batch_norm_2d
from tiny_models import CHANNELS, Plain
from torch.nn.utils.parametrizations import weight_norm

from timm_distill import DistillTask, Teacher, UsageError, create_distill_task, merge_student
from timm_distill.errors import MergeError
from timm_distill.student.merge import full_precision, merge_error, merged_state_dict, merged_tensors

SIZE = (3, 32, 32)
CLASSES = 5
STUDENTS: Dict[str, Tuple[str, Dict[str, Any]]] = {
    'nchw_features': ('test_resnet', {}),
    'tokens_features': ('test_vit', dict(img_size=32, depth=2)),
    'pre_logits': ('test_convnext', dict(depths=(1, 1, 1, 1))),
    'conv_head_inside_features': ('test_efficientnet', {}),
    'nhwc_features': ('swin_tiny_patch4_window7_224', dict(
        img_size=32, window_size=1, embed_dim=16, depths=(1, 1), num_heads=(1, 2))),
    'conv_after_pool': ('mobilenetv3_small_050', {}),
}
ADAPTERS = {'bn_residual': (True, True), 'bn': (True, False), 'plain_residual': (False, True), 'plain': (False, False)}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
# An adapter gives one affine map and a student takes one, whatever gave it: every student with two adapters, every
# adapter with three students; in float32, which differs by rounding, with one of them.
MERGES = {
    f'{kind}-{adapter}-{str(dtype)[6:]}': (kind, adapter, dtype)
    for dtype in TOLERANCE for i, kind in enumerate(STUDENTS) for j, adapter in enumerate(ADAPTERS)
    if i % len(ADAPTERS) == j or dtype == torch.float64 and (i + 2) % len(ADAPTERS) == j}


def create_student(kind: str, **kwargs: Any) -> nn.Module:
    name, own = STUDENTS[kind]
    return timm.create_model(name, num_classes=CLASSES, **own, **kwargs)


@cache
def create_teacher(dtype: torch.dtype) -> Teacher:
    """Return the frozen teacher of all students."""
    torch.manual_seed(0)
    return Teacher(timm.create_model('test_resnet', num_classes=7), SIZE, dtype=dtype)


@cache
def trained_task(kind: str, adapter: str = 'bn_residual', dtype: torch.dtype = torch.float64) -> DistillTask:
    """Return a task after a few real training steps with EMA."""
    teacher, (batch_norm, residual) = create_teacher(dtype), ADAPTERS[adapter]
    torch.manual_seed(0)
    task = create_distill_task(
        create_student(kind), teacher, kd='norm', dtype=dtype,
        kd_kwargs={'norm': dict(segments=2, batch_norm=batch_norm, residual=residual, init='official')},
        input_size=SIZE, verbose=False)
    task.setup_ema(decay=0.6)
    task.train()
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.02, momentum=0.9)
    for step in range(3):
        task(torch.randn(4, *SIZE, dtype=dtype), torch.randint(CLASSES, (4,)))['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=step)
    return task


def unmerged_logits(task: DistillTask, images: torch.Tensor, ema: bool) -> torch.Tensor:
    module = task.get_trainable_module(ema=ema).eval()
    with torch.no_grad():
        logits = module(images)
    module.train()
    return logits


@pytest.mark.parametrize('ema', [False, True], ids=['raw', 'ema'])
@pytest.mark.parametrize(('kind', 'adapter', 'dtype'), MERGES.values(), ids=list(MERGES))
def test_merged_logits_equal_unmerged(kind: str, adapter: str, dtype: torch.dtype, ema: bool) -> None:
    task = trained_task(kind, adapter, dtype)
    images = torch.randn(4, *SIZE, dtype=dtype)
    expected = unmerged_logits(task, images, ema)
    with torch.no_grad():
        actual = merge_student(task, ema=ema)(images)
    spread = (expected - expected.mean()).abs().max()
    assert ((actual - expected).abs().max() / spread).item() < TOLERANCE[dtype]


@pytest.mark.parametrize('kind', STUDENTS)
def test_adapter_is_not_the_identity_so_merging_changes_the_consumer(kind: str) -> None:
    task = trained_task(kind)
    images = torch.randn(4, *SIZE, dtype=torch.float64)
    with torch.no_grad():
        bare = task.module.student.eval()(images)
    assert not torch.allclose(bare, unmerged_logits(task, images, ema=False), rtol=1e-2)


@pytest.mark.parametrize('ema', [False, True], ids=['raw', 'ema'])
@pytest.mark.parametrize('kind', STUDENTS)
def test_merged_state_is_exactly_a_stock_timm_models(kind: str, ema: bool) -> None:
    stock = create_student(kind).double()
    state = trained_task(kind).get_checkpoint_state(ema=ema)['state_dict_ema' if ema else 'state_dict']
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in stock.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()} == expected
    assert list(state) == list(stock.state_dict())
    stock.load_state_dict(state, strict=True)
    merged = merge_student(trained_task(kind), ema=ema)
    assert type(merged) is type(stock)
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in stock.parameters())
    images = torch.randn(2, *SIZE, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(stock.eval()(images), merged(images))


@pytest.mark.parametrize('form', ['direct', 'moments'])
@pytest.mark.parametrize('kind', ['nchw_features', 'tokens_features', 'conv_after_pool'])
def test_task_whose_batch_norms_are_frozen_on_the_way_trains_on_and_merges_exactly(kind: str, form: str) -> None:
    task = copy.deepcopy(trained_task(kind))
    images, target = torch.randn(4, *SIZE, dtype=torch.float64), torch.randint(CLASSES, (4,))
    with torch.no_grad():
        for _ in range(50):  # running statistics are the batch's then
            task(images, target)
    module = freeze_batch_norm_2d(task.module)
    module.adapters[0].form = form
    frozen = {name: tensor.clone() for name, tensor in module.named_buffers() if 'running' in name}
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    task(images, target)['loss'].backward()
    optimizer.step()
    assert any('adapters' in name for name in frozen)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in module.named_buffers() if name in frozen)
    plain = create_student(kind).double()
    plain.load_state_dict(task.get_checkpoint_state()['state_dict'], strict=True)
    expected = unmerged_logits(task, images, ema=False)
    torch.testing.assert_close(plain.eval()(images), expected, rtol=1e-10, atol=1e-10)


def test_half_precision_student_merges_in_its_own_dtype() -> None:
    task = trained_task('nchw_features', dtype=torch.float32)
    module = copy.deepcopy(task.module)
    module.student.bfloat16()
    student = module.merged_copy()
    assert {t.dtype for t in student.parameters()} == {torch.bfloat16}


def test_merging_leaves_the_trained_student_alone() -> None:
    task = trained_task('pre_logits')
    module = task.module.train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    modes = [m.training for m in module.modules()]
    merged = merge_student(task)
    task.get_checkpoint_state()
    task.get_eval_model()
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert [m.training for m in module.modules()] == modes
    assert not merged.training
    shared = {p.data_ptr() for p in merged.parameters()} & {p.data_ptr() for p in module.parameters()}
    assert not shared


def test_only_the_consumers_tensors_change() -> None:
    module = trained_task('nchw_features').module
    assert set(merged_tensors(module.student, module.adapters, module.tap)) == {'fc.weight', 'fc.bias'}


def test_student_without_adapter_is_its_own_merge() -> None:
    student = create_student('nchw_features')
    assert merged_tensors(student, (), None) == {}
    state = merged_state_dict(student, (), None)
    assert all(torch.equal(state[name], tensor) for name, tensor in student.state_dict().items())


def test_merge_error_sees_a_wrong_merge_and_nan() -> None:
    module = trained_task('nchw_features').module
    plain = module.merged_copy()
    images = torch.randn(4, *SIZE, dtype=torch.float64)
    assert merge_error(module, plain, images) < 1e-10
    with torch.no_grad():
        plain.fc.bias += 1.
        assert merge_error(module, plain, images) > 1e-3
        plain.fc.bias *= float('nan')
    broken = merge_error(module, plain, images)
    assert broken != broken


def test_merge_is_measured_outside_autocast() -> None:
    module = trained_task('nchw_features', dtype=torch.float32).module
    images = torch.randn(4, *SIZE)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        error = module.merge_error(images)
        with full_precision(torch.device('cpu')):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert error < TOLERANCE[torch.float32]


def test_ema_student_is_asked_for_only_where_there_is_one() -> None:
    task = create_distill_task(create_student('nchw_features'), kd='none', input_size=SIZE, verbose=False)
    with pytest.raises(ValueError, match='setup_ema'):
        merge_student(task, ema=True)


def test_timms_own_model_loads_the_checkpoint_and_gives_the_same_logits(tmp_path: Path) -> None:
    task = trained_task('nchw_features', dtype=torch.float32)
    images = torch.randn(2, *SIZE)
    torch.save(task.get_checkpoint_state(), tmp_path / 'last.pth.tar')
    model = timm.create_model('test_resnet', num_classes=CLASSES, checkpoint_path=str(tmp_path / 'last.pth.tar'))
    actual, expected = model.eval()(images).detach(), unmerged_logits(task, images, ema=False)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# Verified on what is saved

class Tied(Plain):
    """A model whose classifier has a second name; `reads` names what else reads its weight."""

    def __init__(self, reads: str = '') -> None:
        super().__init__()
        self.reads = reads
        if reads == 'registered first':
            self.first = nn.Linear(CHANNELS, CLASSES)
            self.fc.weight = self.first.weight
        elif reads == 'shared module':
            self.again = self.fc
        else:
            self.again = nn.Linear(CHANNELS, CLASSES)
            self.again.weight = self.fc.weight

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.run_stem(x)
        if self.reads == 'trunk':
            weight = self.again.weight
            x = x + torch.einsum('ck,kbhw->bchw', weight.T, torch.einsum('kc,bchw->kbhw', weight, x))
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def train_custom(student: nn.Module, dtype: torch.dtype = torch.float64, **kwargs: Any) -> DistillTask:
    torch.manual_seed(0)
    task = create_distill_task(
        student, timm.create_model('test_resnet', num_classes=7), kd='norm', kd_kwargs={'norm.segments': 2},
        input_size=SIZE, dtype=dtype, verbose=False, **kwargs)
    task.train()
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.02)
    for _ in range(3):
        task(torch.randn(4, *SIZE, dtype=dtype), torch.randint(CLASSES, (4,)))['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
    return task


def file_error(task: DistillTask, fresh: nn.Module) -> float:
    """Return how far a model with the file's tensors is from the student as trained, relative to the logits' spread."""
    images = torch.randn(8, *SIZE, dtype=torch.float64)
    fresh.double().load_state_dict(task.get_checkpoint_state()['state_dict'], strict=True)
    expected = unmerged_logits(task, images, ema=False)
    with torch.no_grad():
        return ((fresh.eval()(images) - expected).abs().max() / (expected - expected.mean()).abs().max()).item()


@pytest.mark.parametrize('reads', ['', 'shared module', 'registered first'])
def test_every_name_of_a_tied_classifier_is_saved_merged(reads: str) -> None:
    task = train_custom(Tied(reads))
    assert file_error(task, Tied(reads)) < 1e-10
    state = task.get_checkpoint_state()['state_dict']
    other = {'': 'again', 'shared module': 'again', 'registered first': 'first'}[reads]
    assert torch.equal(state['fc.weight'], state[f'{other}.weight'])
    untied = Tied(reads)
    untied.fc.weight = nn.Parameter(untied.fc.weight.detach().clone())
    assert file_error(task, untied) < 1e-10


@pytest.mark.parametrize('reads', ['', 'shared module', 'registered first'])
def test_tied_classifier_is_resumed_as_trained(reads: str) -> None:
    task, fresh = train_custom(Tied(reads)), train_custom(Tied(reads))
    state = task.get_checkpoint_state()
    with torch.no_grad():
        fresh.student.fc.weight.zero_()
    fresh.load_checkpoint_state(state['state_dict'], state['task_state'])
    expected = task.module.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in fresh.module.state_dict().items())


def test_classifier_whose_weight_the_trunk_reads_takes_no_adapter() -> None:
    with pytest.raises(UsageError, match='fc.weight is also again.weight, where the map does not belong'):
        train_custom(Tied('trunk'))


def test_wrong_state_dict_is_refused_at_save_however_it_came_about(monkeypatch: pytest.MonkeyPatch) -> None:
    task = train_custom(Tied())
    right = task.module.merged_state_dict
    stale = task.student.again.weight.detach().clone()
    monkeypatch.setattr(type(task.module), 'merged_state_dict', lambda module: {**right(), 'again.weight': stale})
    with pytest.raises(MergeError, match='largest logit difference'):
        task.get_checkpoint_state()


class ScaledLinear(nn.Linear):
    """A classifier with a forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(input) + 1


class CosineLinear(nn.Linear):
    """A classifier that no affine map folds into."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(nn.functional.normalize(input), self.weight, self.bias)


class RaisingLinear(nn.Linear):
    """A classifier that takes nothing but float32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype == torch.float64:
            raise RuntimeError('float64 is not supported')
        return super().forward(input)


def with_classifier(kind: Type[nn.Linear]) -> nn.Module:
    student = Plain()
    student.fc = kind(CHANNELS, CLASSES)
    return student


def test_classifier_with_a_forward_of_its_own_keeps_it_in_training_and_in_the_file() -> None:
    plain, images = with_classifier(ScaledLinear).double().eval(), torch.randn(2, *SIZE, dtype=torch.float64)
    task = train_custom(with_classifier(ScaledLinear))
    assert type(task.student.fc) is ScaledLinear is type(merge_student(task).fc) is type(task.get_eval_model().fc)
    assert file_error(task, with_classifier(ScaledLinear)) < 1e-10
    plain.load_state_dict(task.student.state_dict())
    task.module.eval()
    for parameter in task.module.adapters[0].parameters():
        nn.init.zeros_(parameter)  # a residual adapter is the identity then
    with torch.no_grad():
        torch.testing.assert_close(task.module(images), plain(images))


@pytest.mark.parametrize('kind', [CosineLinear, RaisingLinear, lambda *sizes: weight_norm(nn.Linear(*sizes))])
def test_classifier_that_cannot_be_folded_or_measured_is_refused_and_left_as_it_was(kind: Any) -> None:
    student = with_classifier(kind).train()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    hooks = sum(len(module._forward_pre_hooks) for module in student.modules())
    with pytest.raises(UsageError, match='not at pre_logits: .*classifier fc'):
        create_distill_task(
            student, timm.create_model('test_resnet', num_classes=7), kd='norm', input_size=SIZE,
            verbose=False)
    state = student.state_dict()
    assert all(torch.equal(before[name], state[name]) and state[name].dtype == before[name].dtype for name in before)
    assert student.training and sum(len(module._forward_pre_hooks) for module in student.modules()) == hooks


@pytest.mark.parametrize('kind', ['nchw_features', 'tokens_features', 'pre_logits'])
def test_merge_is_verified_on_the_architecture_built_again_by_name(kind: str) -> None:
    task = trained_task(kind)
    images = torch.randn(2, *SIZE, dtype=torch.float64)
    task.student.mark = 'of the student that was trained'  # a copy would have it
    state = torch.get_rng_state()
    plain = task.module.plain_student(images)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(plain) is type(task.student) and not hasattr(plain, 'mark')
    plain.load_state_dict(task.module.merged_state_dict(), strict=True)
    assert task.module.merge_error(images, plain) < 1e-10


def test_student_that_was_changed_after_it_was_built_is_verified_on_a_copy() -> None:
    student = create_student('nchw_features')
    student.act1 = nn.Tanh()
    student.bn1.act = nn.Tanh()
    task = train_custom(student)
    plain = task.module.plain_student(torch.randn(2, *SIZE, dtype=torch.float64))
    assert isinstance(plain.bn1.act, nn.Tanh)
    task.get_checkpoint_state()


@pytest.mark.parametrize('bad', [[0], [1, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize('value', [float('nan'), float('inf'), 1e300])
def test_images_that_are_not_finite_or_overflow_do_not_stop_a_save(bad: List[int], value: float) -> None:
    task = train_custom(create_student('nchw_features'))
    for epoch in range(3):
        task.set_epoch(epoch)
        images = torch.randn(6, *SIZE, dtype=torch.float64)
        images[bad, 0, 3, 3] = value
        before = copy.deepcopy(task.module.state_dict())
        task(images, torch.randint(CLASSES, (6,)))
        task.module.load_state_dict(before)  # as the loop leaves out the step, and timm's norms are restored
        assert file_error(task, create_student('nchw_features')) < 1e-10


def test_head_that_begins_with_a_frozen_batch_norm_takes_the_adapter() -> None:
    class NormHead(Plain):
        """A batch norm in front of a 1x1 convolution without bias, and one behind it."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = FrozenBatchNormAct2d(CHANNELS, apply_act=False)
            self.conv, self.norm2 = nn.Conv2d(CHANNELS, 8, 1, bias=False), FrozenBatchNormAct2d(8)
            self.fc = nn.Linear(8, CLASSES)

        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            return self.run_stem(x)

        def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
            x = self.norm2(self.conv(self.norm(x))).mean((2, 3))
            return x if pre_logits else self.fc(x)

        def get_classifier(self) -> nn.Module:
            return self.fc

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.forward_head(self.forward_features(x))

    student = NormHead()
    for name, buffer in student.named_buffers():
        if name.startswith('norm'):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    task = train_custom(student)
    (consumer,) = task.module.tap.consumers
    assert (consumer.linear, consumer.pre_norm, consumer.post_norm) == ('conv', 'norm', 'norm2')
    assert file_error(task, NormHead()) < 1e-10
