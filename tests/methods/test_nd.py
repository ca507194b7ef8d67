"""ND against the official code's numbers, and its promises."""
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from golden_data import GoldenCase, assert_golden, case_id, golden_cases

from timm_distill import DistillTask, UsageError, create_distill_task, create_method
from timm_distill.methods import METHODS
from timm_distill.methods.nd import EmbeddingHead, class_centers, nd_loss

SIZE, CLASSES = (3, 32, 32), 5
LOSSES = golden_cases('nd', having='loss')
EMBEDDINGS = golden_cases('emb_trans')


def create_task(
        kd: str = 'nd', teacher: str = 'test_resnet', student: str = 'test_efficientnet',
        means: bool = True, **kwargs: Any) -> DistillTask:
    torch.manual_seed(0)
    models = [timm.create_model(name, num_classes=CLASSES) for name in (student, teacher)]
    task = create_distill_task(*models, kd=kd, input_size=SIZE, verbose=False, **kwargs).train()
    if means:
        task.set_class_means(torch.randn(task.class_means_shape))
    return task


def create_batch(size: int = 4) -> tuple:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, *SIZE, generator=generator), torch.arange(size)


@pytest.mark.parametrize('case', LOSSES, ids=case_id)
def test_loss_and_gradient_equal_the_official_codes(case: GoldenCase) -> None:
    embedding = case['s_emb'].clone().requires_grad_()
    centers = case['centers'] if 'centers' in case else class_centers(case['class_means'], case['target'])
    loss = case.hparams['nd_loss_factor'] * nd_loss(embedding, case['t_emb'], centers)
    assert_golden(loss, case['loss'])
    assert_golden(torch.autograd.grad(loss, embedding)[0], case['grad.s_emb'])


@pytest.mark.parametrize('case', EMBEDDINGS, ids=case_id)
def test_embedding_head_equals_the_official_codes(case: GoldenCase) -> None:
    head = create_golden_head(case).eval()
    x = case['x'].clone().requires_grad_()
    embedding = head(x)
    assert_golden(embedding, case['emb'])
    check_gradients(case, 'grad.', head, x, embedding)
    assert head.bn.eps == case.hparams['bn_eps'] and EmbeddingHead(1, 1).dropout.p == case.hparams['dropout']


@pytest.mark.parametrize('case', golden_cases('emb_trans', having='train_nodrop.emb'), ids=case_id)
def test_embedding_head_in_training_equals_the_official_codes(case: GoldenCase) -> None:
    head, x = create_golden_head(case, dropout=0.).train(), case['x'].clone().requires_grad_()
    embedding = head(x)
    assert_golden(embedding, case['train_nodrop.emb'])
    check_gradients(case, 'train_nodrop.grad.', head, x, embedding)
    for name, value in case.under('after.').items():
        assert_golden(head.state_dict()[name], value)


def create_golden_head(case: GoldenCase, dropout: float = 0.5) -> EmbeddingHead:
    out_features, in_features = case['linear.weight'].shape
    head = EmbeddingHead(in_features, out_features, dropout).double()
    head.load_state_dict({k: v for k, v in case.tensors.items() if k.startswith(('bn.', 'linear.'))}, strict=False)
    return head


def check_gradients(case: GoldenCase, prefix: str, head: EmbeddingHead, x: torch.Tensor, output: torch.Tensor) -> None:
    parameters = {**dict(head.named_parameters()), 'x': x}
    expected = case.under(prefix)
    gradients = torch.autograd.grad((output * case['G']).sum(), [parameters[name] for name in expected])
    for name, gradient in zip(expected, gradients):
        assert_golden(gradient, expected[name])


def test_a_longer_student_in_the_right_direction_has_no_loss() -> None:
    teacher = torch.randn(3, 6).double()
    assert abs(nd_loss(2 * teacher, teacher, teacher)) < 1e-12
    assert abs(nd_loss(teacher / 2, teacher, teacher) - 0.5) < 1e-12


def test_soft_labels_mix_the_class_means() -> None:
    means, first, second = torch.randn(CLASSES, 3), torch.arange(4), torch.tensor([4, 3, 2, 1])
    soft = 0.3 * torch.eye(CLASSES)[first] + 0.7 * torch.eye(CLASSES)[second]
    torch.testing.assert_close(class_centers(means, soft), 0.3 * means[first] + 0.7 * means[second])
    torch.testing.assert_close(class_centers(means, torch.eye(CLASSES)[first]), class_centers(means, first))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_zero_features_and_means_have_finite_losses_and_gradients(dtype: torch.dtype) -> None:
    for student, teacher, centers in ((0., 0., 0.), (0., 1., 1.), (1., 0., 0.), (1e4, 1., 1.)):
        embedding = torch.full((2, 4), student, dtype=dtype, requires_grad=True)
        loss = nd_loss(embedding, torch.full((2, 4), teacher, dtype=dtype), torch.full((2, 4), centers, dtype=dtype))
        loss.backward()
        assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(embedding.grad).all()


def test_embedding_head_is_there_only_where_widths_differ() -> None:
    other = create_task(student='test_resnet', teacher='test_resnet')
    assert not list(other.module.methods['nd'].parameters())
    assert {name for name, _ in create_task().module.methods['nd'].named_parameters()} == {
        'embed.bn.weight', 'embed.bn.bias', 'embed.linear.weight', 'embed.linear.bias'}


def test_task_computes_the_loss_on_pre_logits() -> None:
    task = create_task(student='test_resnet', teacher='test_resnet')
    images, target = create_batch()
    features = task.teacher(images, frozenset({'pre_logits'}))
    student = task.module.student
    result = task(images, target)
    pre_logits = student.forward_head(student.forward_features(images), pre_logits=True)
    means = task.module.methods['nd'].class_means
    torch.testing.assert_close(result['nd_loss'], nd_loss(pre_logits, features.pre_logits, means[target]))


def test_without_class_means_a_step_is_an_error_that_says_where_they_come_from() -> None:
    with pytest.raises(UsageError, match='compute_class_means'):
        create_task(means=False)(*create_batch())


@pytest.mark.parametrize('means', [torch.zeros(CLASSES, 3), torch.zeros(2, 96), torch.full((CLASSES, 96), torch.inf)])
def test_class_means_of_another_shape_or_not_finite_are_an_error(means: torch.Tensor) -> None:
    with pytest.raises(UsageError, match='class means'):
        create_task(means=False).set_class_means(means)


def test_class_means_can_be_given_at_construction() -> None:
    means = torch.randn(CLASSES, 96)
    task = create_task(means=False, class_means=means)
    assert torch.equal(task.module.methods['nd'].class_means, means)
    assert create_task('kd', means=False).class_means_shape is None


def test_class_means_are_in_the_checkpoint_so_that_a_resumed_run_needs_no_pass() -> None:
    task, resumed = create_task(), create_task(means=False)
    saved = task.get_checkpoint_state()
    resumed.load_checkpoint_state(saved['state_dict'], saved['task_state'])
    for each in (task, resumed):
        torch.manual_seed(1)
        each.result = each(*create_batch())
    assert torch.equal(task.result['loss'], resumed.result['loss'])
    assert not any('means' in name for name in saved['state_dict'])


def test_teacher_with_other_classes_works() -> None:
    torch.manual_seed(0)
    student = timm.create_model('test_resnet', num_classes=CLASSES)
    teacher = timm.create_model('test_convnext', num_classes=7)
    task = create_distill_task(student, teacher, kd='nd', input_size=SIZE, verbose=False).train()
    assert task.class_means_shape == (CLASSES, teacher.num_features)
    task.set_class_means(torch.randn(task.class_means_shape))
    assert torch.isfinite(task(*create_batch())['loss'])


def test_distilled_student_is_read_at_the_average_of_both_tokens() -> None:
    torch.manual_seed(0)
    student = timm.create_model(
        'deit_tiny_distilled_patch16_224', img_size=32, embed_dim=32, depth=2, num_heads=2,
        num_classes=CLASSES)
    task = create_distill_task(
        student, timm.create_model('test_resnet', num_classes=CLASSES), kd='deit++',
        class_means=torch.randn(CLASSES, 96), input_size=SIZE, verbose=False).train()
    images = create_batch()[0]
    features = task.module.forward_with_features(images, task.teacher_features(images))
    tokens = student.forward_features(images)
    torch.testing.assert_close(features.pre_logits, (tokens[:, 0] + tokens[:, 1]) / 2)
    task.set_epoch(1)  # the schedule of the preset leaves the token's loss out of epoch 0
    task(*create_batch())['loss'].backward()
    assert all(p.grad is not None for p in task.module.parameters())


def test_batch_of_one_is_finite() -> None:
    task = create_task()
    for module in task.module.student.modules():  # the student's own batch norms need more than one value
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    assert torch.isfinite(task(*create_batch(1))['loss'])




@pytest.mark.parametrize('name, alias', [
    ('kd++', 'kdpp'), ('dkd++', 'dkdpp'), ('dist++', 'distpp'), ('reviewkd++', 'reviewkdpp'), ('deit++', 'deitpp')])
def test_presets_have_an_alias_and_nd(name: str, alias: str) -> None:
    presets = METHODS.presets()
    assert presets[name] is presets[alias]
    assert 'nd' in presets[name].weights


def test_presets_warm_up_as_the_authors_scripts_do() -> None:
    task = create_task('kd++')
    assert task.weights == {'kd': 2.5, 'nd': 1.}
    assert [task.schedules['kd'](epoch) for epoch in (0, 1, 5, 99)] == [0., 0.2, 1., 1.]
    assert task.schedules['nd'](0) == 1.
    dkd = create_task('dkdpp')
    assert dkd.schedules['nd'](0) == dkd.schedules['dkd'](0) == 0.
    method = dkd.module.methods['dkd']
    assert (method.alpha, method.beta, method.temperature) == (0.8, 0.5, 1.)


def test_a_schedule_of_the_user_replaces_the_presets() -> None:
    assert create_task('kd++', kd_schedule={'kd': 'const'}).schedules['kd'](0) == 1.


def test_usi_trains_on_the_teacher_alone_unless_told_otherwise() -> None:
    task = create_task('usi', means=False)
    result = task(*create_batch())
    torch.testing.assert_close(result['loss'], result['kd_loss'])
    assert task.module.methods['kd'].temperature == 1.
    official = create_task('usi', means=False, task_loss_weight=1., kd_weight={'kd': 5.})
    assert (official.task_loss_weight, official.weights) == (1., {'kd': 5.})


def test_nd_composes_with_an_adapter() -> None:
    assert torch.isfinite(create_task('norm+nd', kd_kwargs={'norm.segments': 2})(*create_batch())['loss'])


def test_dropout_must_be_a_probability() -> None:
    with pytest.raises(UsageError, match='nd.dropout'):
        create_method('nd', dropout=1.)


def test_loss_takes_no_gradient_to_teacher_and_means() -> None:
    student, teacher, means = (torch.randn(2, 4, requires_grad=True) for _ in range(3))
    nd_loss(student, teacher, means).backward()
    assert student.grad is not None and teacher.grad is None and means.grad is None
    assert F.cosine_similarity(student.grad, student, dim=1).isfinite().all()


@pytest.mark.parametrize('name', ['kd++', 'dkd++', 'dist++', 'reviewkd++'])
def test_presets_train(name: str) -> None:
    task = create_task(name)
    task.set_epoch(3)
    result = task(*create_batch())
    result['loss'].backward()
    assert torch.isfinite(result['loss']) and 'nd_loss' in result
    assert all(torch.isfinite(p.grad).all() for p in task.module.parameters())
