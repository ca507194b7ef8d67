"""SRRL and feature matching against the official code's numbers, with every kind of teacher head."""
import copy
from typing import Any, Dict

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from golden_data import GoldenCase, assert_golden, case_id, golden_cases
from tiny_models import CHANNELS, Plain, WithClassifier

from timm_distill import DistillTask, Teacher, UsageError, create_distill_task, create_method
from timm_distill.features.spec import Features, FeatureSpec, PairSpec, Stage
from timm_distill.methods.srrl import Connector, regression_loss, statistics_loss

SIZE, CLASSES = (3, 32, 32), 5
CASES = golden_cases('srrl')
VIT = dict(img_size=32, embed_dim=32)
VGG = dict(mlp_ratio=0.01)


def create_model(name: str, seed: int = 1, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **{'num_classes': CLASSES, **kwargs})


def create_task(teacher: nn.Module, kd: str = 'srrl', student: str = 'test_efficientnet', **kwargs: Any) -> DistillTask:
    return create_distill_task(
        create_model(student, 0), teacher, kd=kd, input_size=SIZE, verbose=False, **kwargs).train()


def create_batch(size: int = 4) -> tuple:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, *SIZE, generator=generator), torch.arange(size)


def create_golden_method(case: GoldenCase, name: str) -> nn.Module:
    """Create the method for a case's shapes, with its stored connector."""
    def _spec(feature: torch.Tensor, **kwargs: Any) -> FeatureSpec:
        shape = tuple(feature.shape[1:])
        return FeatureSpec(case['pred_t'].shape[1], shape, shape[0], (Stage(-1, shape),), (3, 32, 32), **kwargs)

    method = create_method(name, **({'logit_weight': case.hparams['weight']} if name == 'srrl' else {})).double()
    method.build(PairSpec(
        _spec(case['feat_s']),
        _spec(case['feat_t'], head='feature', non_negative=frozenset({'feature'}))))
    method.connector.double().load_state_dict(
        {k: v for k, v in case.tensors.items() if k.startswith(('conv.', 'bn.'))},
        strict=False)
    assert method.connector.bn.eps == case.hparams['bn_eps']
    return method.train()


def run_golden(case: GoldenCase, name: str, feature: torch.Tensor) -> tuple:
    def _head(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.mean((2, 3)), case['teacher_fc.weight'], case['teacher_fc.bias'])

    method = create_golden_method(case, name)
    teacher = Features(logits=case['pred_t'], feature=case['feat_t'], head=_head)
    return method, method(Features(feature=feature), teacher, torch.zeros(1))


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_losses_gradients_and_statistics_equal_the_official_codes(case: GoldenCase) -> None:
    feature, weight = case['feat_s'].clone().requires_grad_(), case.hparams['weight']
    method, terms = run_golden(case, 'srrl', feature)
    loss, logit = sum(terms.values()), terms['srrl_logit_loss'] / weight
    parameters = {'feat_s': feature, **dict(method.connector.named_parameters())}
    assert_golden(loss, case['loss'])
    assert_golden(terms['srrl_stat_loss'], case['loss_stat'])
    assert_golden(logit, case['loss_mse'])
    for prefix, value in (('grad.', loss), ('grad_stat.', terms['srrl_stat_loss']), ('grad_mse.', logit)):
        expected = case.under(prefix)
        gradients = torch.autograd.grad(value, [parameters[name] for name in expected], retain_graph=True)
        for name, gradient in zip(expected, gradients):
            assert_golden(gradient, expected[name])
    for name, value in case.under('after.').items():
        assert_golden(method.connector.state_dict()[name], value)


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_feature_matching_is_the_official_codes_statistics_term(case: GoldenCase) -> None:
    feature = case['feat_s'].clone().requires_grad_()
    _, terms = run_golden(case, 'fm', feature)
    assert_golden(terms['fm_loss'], case['loss_stat'])
    assert_golden(torch.autograd.grad(terms['fm_loss'], feature)[0], case['grad_stat.feat_s'])


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_connector_and_head_equal_the_official_codes(case: GoldenCase) -> None:
    method = create_golden_method(case, 'srrl')
    connected = method.connector(case['feat_s'])
    assert_golden(connected, case['connected'])
    assert_golden(F.linear(connected.mean((2, 3)), case['teacher_fc.weight'], case['teacher_fc.bias']), case['pred_sc'])


HEADS: Dict[str, tuple] = {
    'map': ('test_resnet', {}, 'feature', True),
    'map in NHWC, norm in the head': ('swin_tiny_patch4_window7_224', dict(
        img_size=32, window_size=1, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)), 'feature', False),
    'map, norm in the head': ('test_convnext', {}, 'feature', False),
    'convolution behind the pool': ('mobilenetv3_small_050', {}, 'feature', False),
    'tokens without prefix': ('test_vit', dict(**VIT, class_token=False, global_pool='avg'), 'feature', False),
    'class token': ('test_vit', VIT, 'pre_logits', False),
    'large convolution': ('vgg11', VGG, 'feature', True),
}
each_head = pytest.mark.parametrize('head', HEADS)


def create_head_teacher(head: str) -> tuple:
    name, kwargs, output, relu = HEADS[head]
    return create_model(name, **kwargs), output, relu


@each_head
def test_head_gives_the_teachers_own_logits_for_its_own_feature(head: str) -> None:
    model, output, _ = create_head_teacher(head)
    teacher = Teacher(model, SIZE)
    features = teacher(create_batch()[0], frozenset({'logits', 'feature', 'pre_logits'}))
    assert teacher.head_input.output == output
    x = features.feature if output == 'feature' else features.pre_logits[:, :, None, None]
    torch.testing.assert_close(teacher.run_head(x), features.logits)


@each_head
def test_every_head_trains_student_and_connector_and_stays_as_it_is(head: str) -> None:
    model, output, relu = create_head_teacher(head)
    task = create_task(model)
    method = task.module.methods['srrl']
    before = {name: value.clone() for name, value in task.teacher.state_dict().items()}
    result = task(*create_batch())
    result['srrl_logit_loss'].backward()
    assert (method.matched, method.connector.relu) == (output, relu)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in method.connector.parameters())
    assert next(task.module.student.parameters()).grad.abs().max() > 0
    assert all(p.grad is None for p in task.teacher.parameters())
    after = task.teacher.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


class FlatHead(Plain):
    """A head that reads every position of its 3 x 3 map by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = CHANNELS
        self.fc = nn.Linear(9 * CHANNELS, CLASSES)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.run_stem(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x.flatten(1) if pre_logits else self.fc(x.flatten(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def test_head_that_depends_on_the_grid_gets_the_teachers() -> None:
    assert Teacher(create_model('test_resnet'), SIZE).head_input.grid is None
    teacher = Teacher(FlatHead(), SIZE)
    assert teacher.head_input.grid == (3, 3)
    x = torch.randn(2, CHANNELS, 5, 7)
    torch.testing.assert_close(teacher.run_head(x), teacher.run_head(F.adaptive_avg_pool2d(x, (3, 3))))
    assert torch.isfinite(create_task(FlatHead())(*create_batch())['srrl_logit_loss'])


def test_head_is_in_no_state_of_the_student() -> None:
    task = create_task(create_model('test_resnet'))
    task.setup_ema(decay=0.5)
    names = {name for name, _ in task.module.methods.named_parameters()}
    assert names == {'srrl.connector.conv.weight', 'srrl.connector.bn.weight', 'srrl.connector.bn.bias'}
    task(*create_batch())
    copy.deepcopy(task.module)(create_batch()[0])
    assert set(task.get_task_state()['methods']) == set(task.module.methods.state_dict())


def test_teacher_with_other_classes_is_matched_through_its_own_head() -> None:
    task = create_task(create_model('test_resnet', num_classes=7))
    assert torch.isfinite(task(*create_batch())['loss'])


@pytest.mark.parametrize('model', [Plain, WithClassifier])
def test_a_model_that_is_not_split_gives_its_classifier_or_an_error(model: type) -> None:
    if model is Plain:
        assert torch.isfinite(create_task(model())(*create_batch())['srrl_logit_loss'])
    else:  # its logits are more than its classifier gives
        with pytest.raises(UsageError, match='kd fm'):
            create_task(model())
        assert torch.isfinite(create_task(model(), kd='fm')(*create_batch())['fm_loss'])


def test_a_head_of_several_features_is_an_error_that_names_feature_matching() -> None:
    teacher = create_model('deit_tiny_distilled_patch16_224', img_size=32, embed_dim=32, depth=1, num_heads=2)
    with pytest.raises(UsageError, match='kd fm'):
        create_task(teacher)
    assert torch.isfinite(create_task(teacher, kd='fm')(*create_batch())['fm_loss'])


@pytest.mark.parametrize('kd', ['srrl', 'fm'])
@pytest.mark.parametrize('teacher', ['test_resnet', 'test_vit'])
def test_batch_of_one_is_finite(kd: str, teacher: str) -> None:
    task = create_task(create_model(teacher, **(VIT if teacher == 'test_vit' else {})), kd)
    for module in task.module.student.modules():  # the student's own batch norms need more than one value
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    loss = task(*create_batch(1))['loss']
    loss.backward()
    assert torch.isfinite(loss)


def test_bfloat16_teacher_is_read_in_its_own_precision() -> None:
    model = create_model('test_resnet')
    teacher = Teacher(model.to(torch.bfloat16), SIZE)
    x = torch.randn(2, model.num_features, 1, 1, requires_grad=True)
    logits = teacher.run_head(x)
    logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16 and x.grad.dtype == torch.float32 and x.grad.any()


@pytest.mark.parametrize('teacher', ['test_resnet', 'test_vit'])
def test_compiled_task_has_the_same_losses(teacher: str) -> None:
    results = []
    for compiled in (False, True):
        options = {**VIT, 'depth': 2} if teacher == 'test_vit' else {}
        task = create_task(create_model(teacher, **options), student='test_resnet')
        if compiled:
            task.compile(backend='eager')
        results.append(task(*create_batch()))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value)


def test_standardised_logits_are_compared_with_standardised_logits() -> None:
    task = create_task(create_model('test_resnet'), 'norm+srrl', kd_kwargs={'norm.segments': 2, 'norm.logit_scale': 1.})
    result = task(*create_batch())
    assert result['srrl_logit_loss'] <= 4  # two vectors of unit variance


def test_losses_take_no_gradient_to_the_teacher_and_any_precision() -> None:
    student, teacher = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 2, 2, requires_grad=True)
    statistics_loss(student.half(), teacher.half()).backward()
    assert student.grad.any() and teacher.grad is None
    assert regression_loss(student.half(), student.detach().half()).dtype == torch.float32


def test_connector_without_relu_keeps_negative_values() -> None:
    assert (Connector(3, 4, relu=False)(torch.randn(2, 3, 2, 2)) < 0).any()
    assert not (Connector(3, 4)(torch.randn(2, 3, 2, 2)) < 0).any()


def test_negative_weight_is_named() -> None:
    with pytest.raises(UsageError, match='srrl.logit_weight'):
        create_method('srrl', logit_weight=-1.)
