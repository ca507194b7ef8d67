"""A teacher of other classes than the student's: what methods, evaluation and factory make of its logits."""
import copy
from functools import cache
from typing import Any, Dict, List, Optional, Sequence, Tuple

import pytest
import timm
import torch
import torch.nn as nn

from timm_distill import (
    DistillTask,
    Teacher,
    UsageError,
    create_distill_task,
    create_method,
    create_teacher,
    list_methods,
)
from timm_distill.features.spec import Features
from timm_distill.methods._composition import methods_of
from timm_distill.methods.ofa import ofa_loss
from timm_distill.teacher.class_map import ClassMatch

SIZE, CLASSES, OTHERS = (3, 32, 32), 5, 12
ROWS = [7, 3, 11, 0, 5]
NAMES = ['left', 'right', 'up', 'down', 'stay']
KNOWN = [0, 2, 3, 4]
each_on_logits = pytest.mark.parametrize(
    'kd', [
        name for name in (*(name for name in list_methods() if name != 'sdd'), 'sdd:dkd')
        if any('logits' in cls.teacher_outputs for cls in methods_of(name).values())])


def create_model(name: str = 'test_resnet', classes: int = OTHERS, seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=classes, **kwargs)


def with_rows(model: nn.Module, rows: Sequence[int]) -> nn.Module:
    """Return a copy of a model whose classifiers give some of its logits alone."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name in ('fc', 'classifier', 'head', 'head_dist'):
            module.weight = nn.Parameter(module.weight[list(rows)].detach().clone())
            module.bias = nn.Parameter(module.bias[list(rows)].detach().clone())
            module.out_features = len(rows)
    return model


def create_student(kd: str) -> nn.Module:
    if any('token_logits' in cls.student_outputs for cls in methods_of(kd).values()):
        kwargs = dict(img_size=32, embed_dim=32, depth=2, num_heads=2)
        return create_model('deit_tiny_distilled_patch16_224', CLASSES, 1, **kwargs)
    return create_model('test_efficientnet', CLASSES, 1)


def input_size(kd: str) -> Tuple[int, int, int]:
    return (3, 64, 64) if 'sdd' in kd else SIZE


@cache
def create_frozen(kd_size: Tuple[int, int, int], rows: Tuple[int, ...] = (), known: Tuple[int, ...] = ()) -> Teacher:
    """Return a teacher of some of its classes' rows, or one whose classes are matched with those that it knows."""
    if rows:
        return Teacher(with_rows(create_model(), rows), kd_size)
    choice = {NAMES[i]: ROWS[i] if i in known else [] for i in range(CLASSES)}
    return Teacher(create_model(), kd_size, classes=ClassMatch(NAMES, choice))


def create_task(kd: str, student: nn.Module, teacher: nn.Module, classes: Any = None) -> DistillTask:
    torch.manual_seed(2)
    task = create_distill_task(
        copy.deepcopy(student), teacher, kd=kd, input_size=input_size(kd), verbose=False,
        kd_kwargs={'sdd.scales': '1,2'} if 'sdd' in kd else {}, sample_labels=torch.arange(20) % CLASSES,
        class_names=NAMES if classes else (), teacher_classes=classes).train()
    if task.class_means_shape is not None:
        task.set_class_means(torch.randn(task.class_means_shape))
    return task


def run(task: DistillTask, kd: str, labels: Sequence[int]) -> Dict[str, torch.Tensor]:
    target = torch.tensor(labels)
    if any(cls.needs_indices for cls in methods_of(kd).values()):
        target = torch.stack([target, torch.arange(len(target))], 1)
    images = torch.randn(len(labels), *input_size(kd), generator=torch.Generator().manual_seed(3))
    torch.manual_seed(4)
    return {name: value for name, value in task(images, target).items() if name.endswith('_loss')}


@each_on_logits
def test_every_method_on_logits_sees_the_teacher_with_the_students_classes(kd: str) -> None:
    student, size = create_student(kd), input_size(kd)
    mapped = run(create_task(kd, student, create_frozen(size, known=tuple(range(CLASSES)))), kd, [0, 1, 2, 3])
    restricted = run(create_task(kd, student, create_frozen(size, rows=tuple(ROWS))), kd, [0, 1, 2, 3])
    torch.testing.assert_close(mapped, restricted)


@pytest.mark.parametrize('kd', [
    'kd', 'dkd', 'nkd', 'wkd_l', 'wttm', 'dist', 'bce_kd', 'logitstd+kd', 'srrl', 'token', 'sdd:dkd', 'sdd:kd'])
def test_methods_compare_the_classes_that_both_know_and_the_labels_stay_whole(kd: str) -> None:
    student, size = create_student(kd), input_size(kd)
    mapped = run(create_task(kd, student, create_frozen(size, known=tuple(KNOWN))), kd, [0, 2, 3, 4])
    task = create_task(kd, with_rows(student, KNOWN), create_frozen(size, rows=tuple(ROWS[i] for i in KNOWN)))
    restricted = run(task, kd, [0, 1, 2, 3])
    plain = run(create_task(kd, student, create_frozen(size, rows=tuple(ROWS))), kd, [0, 2, 3, 4])
    for name in mapped:
        torch.testing.assert_close(mapped[name], (plain if name == 'task_loss' else restricted)[name], msg=name)


@each_on_logits
def test_images_of_an_unknown_class_leave_every_loss_finite(kd: str) -> None:
    task = create_task(kd, create_student(kd), create_frozen(input_size(kd), known=tuple(KNOWN)))
    terms = run(task, kd, [1, 1, 0, 1])
    assert all(bool(value.isfinite()) for value in terms.values())
    sum(terms.values(), torch.zeros(())).backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in task.parameters())


@pytest.mark.parametrize('kd', ['dkd', 'nkd'])
def test_methods_of_the_label_take_nothing_from_images_of_an_unknown_class(kd: str) -> None:
    student, teacher = (Features(logits=torch.randn(3, 4)) for _ in range(2))
    teacher.classes = torch.tensor(KNOWN)
    method = create_method(kd)
    some, all_known = (sum(terms.values()) for terms in (
        method(student, teacher, torch.tensor([1, 3, 0])),
        method(Features(logits=student.logits[1:]), Features(logits=teacher.logits[1:]), torch.tensor([2, 0]))))
    torch.testing.assert_close(some, all_known * 2 / 3)
    assert sum(method(student, teacher, torch.tensor([1, 1, 1])).values()) == 0
    mixed = torch.tensor([[0., .6, .4, 0., 0.]] * 3)
    hard = method(student, teacher, torch.tensor([2, 2, 2]))
    torch.testing.assert_close(sum(method(student, teacher, mixed).values()), .4 * sum(hard.values()))


def test_ofa_enhances_no_class_of_images_of_an_unknown_one() -> None:
    student, teacher = torch.randn(2, 4), torch.randn(2, 4)
    loss = ofa_loss(student, teacher, torch.tensor([1, 1]), known=torch.tensor(KNOWN), eps=1.)
    torch.testing.assert_close(loss, -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean())


def test_features_of_a_mapped_teacher_are_its_own() -> None:
    model, outputs = create_model(), frozenset({'logits', 'pre_logits', 'feature'})
    images = torch.randn(2, *SIZE)
    plain = Teacher(model, SIZE)(images, outputs)
    teacher = Teacher(model, SIZE, classes=ClassMatch(NAMES, dict(zip(NAMES, ROWS))))
    mapped = teacher(images, outputs)
    assert plain.logits is not None and mapped.logits is not None
    assert torch.equal(mapped.logits, plain.logits[:, ROWS]) and mapped.classes is None
    assert torch.equal(mapped.pre_logits, plain.pre_logits) and torch.equal(mapped.feature, plain.feature)
    assert teacher.num_classes == CLASSES and teacher.class_sources == [[row] for row in ROWS]
    assert teacher.digest == Teacher(model, SIZE).digest


def test_classes_that_the_teacher_does_not_know_have_no_probability() -> None:
    choice = {NAMES[i]: ROWS[i] if i in KNOWN else [] for i in range(CLASSES)}
    features = Teacher(create_model(), SIZE, classes=ClassMatch(NAMES, choice))(torch.randn(2, *SIZE))
    assert features.logits is not None and features.classes is not None
    assert features.classes.tolist() == KNOWN and bool((features.logits.softmax(1)[:, 1] == 0).all())


def test_create_teacher_matches_classes_by_name(tmp_path: Any) -> None:
    names = ['dog', 'cat', 'Bird']
    torch.save({'state_dict': create_model(classes=3).state_dict(), 'label_names': names}, tmp_path / 'a')
    match = ClassMatch(['bird', 'dog'])
    teacher = create_teacher('test_resnet', SIZE, 2, checkpoint=str(tmp_path / 'a'), classes=match)
    assert teacher.class_sources == [[2], [0]]
    assert teacher.labels is not None and teacher.labels.source == 'its weights'


def test_a_teacher_of_as_many_classes_in_another_order_is_put_into_order(tmp_path: Any) -> None:
    names = ['dog', 'cat']
    torch.save({'state_dict': create_model(classes=2).state_dict(), 'label_names': names}, tmp_path / 'a')

    def _sources(order: List[str]) -> Optional[List[List[int]]]:
        match = ClassMatch(order)
        return create_teacher('test_resnet', SIZE, 2, checkpoint=str(tmp_path / 'a'), classes=match).class_sources
    assert _sources(names[::-1]) == [[1], [0]]
    assert _sources(names) is None


@pytest.mark.parametrize('names, flag', [
    (('n01440764', 'n02102040'), 'All classes of the data are among those of imagenet-1k.*teacher_classes auto'),
    (('tench', 'springer'), 'teacher_classes=FILE'),
    ((), 'teacher_classes=FILE'),
])
def test_other_class_counts_name_the_flag(names: Tuple[str, ...], flag: str) -> None:
    student, teacher = create_model('test_efficientnet', 2), create_model(classes=1000)
    with pytest.raises(UsageError, match=flag):
        create_distill_task(student, teacher, kd='kd', input_size=SIZE, class_names=names, verbose=False)


def test_a_teacher_without_classifier_has_no_classes_to_choose_from() -> None:
    with pytest.raises(UsageError, match='--teacher-classes auto: the teacher has no classifier'):
        Teacher(create_model(classes=0), SIZE, classes=ClassMatch(NAMES))


def test_as_many_names_as_classes_are_needed() -> None:
    with pytest.raises(UsageError, match='The student has 5 classes and class_names names 2'):
        create_distill_task(
            create_model('test_efficientnet', CLASSES), create_model(), kd='kd', input_size=SIZE,
            class_names=['a', 'b'], teacher_classes='auto', verbose=False)
