"""Several teachers of one student."""
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import timm
import torch
import torch.nn as nn
from ranks import run_ranks
from timm.optim import create_optimizer_v2

from timm_distill import UsageError, check_pair, create_distill_task, merge_student
from timm_distill.methods._scopes import scope_term
from timm_distill.teacher.dropping import TeacherDrop
from timm_distill.teacher.several import Teachers, ask_each, live_teachers, teachers_by_name
from timm_distill.teacher.teacher import Teacher

SIZE, CLASSES = (3, 32, 32), 5
NORM = {'norm.segments': 3, 'norm.init': 'official'}


def create_model(name: str, seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **{'num_classes': CLASSES, **kwargs}).eval()


def create_teachers() -> Dict[str, Any]:
    """A headless one of tokens, and a classifier."""
    return {'dino': create_model('test_vit', 1, img_size=32, num_classes=0), 'sup': create_model('test_resnet', 2)}


def create_task(kd: str = 'norm+kd@sup', teacher: Any = None, **options: Any) -> Any:
    student = create_model('test_efficientnet')
    torch.manual_seed(3)
    kd_kwargs = {**(NORM if 'norm' in kd else {}), **options.pop('kd_kwargs', {})}
    return create_distill_task(
        student, create_teachers() if teacher is None else teacher, kd, kd_kwargs=kd_kwargs, input_size=SIZE,
        verbose=False, **options).train()


def create_batch(seed: int = 0) -> Tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, *SIZE, generator=generator), torch.randint(CLASSES, (6,), generator=generator)


def train(task: Any, steps: int = 2, seed: int = 0) -> List[float]:
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.02)
    losses = []
    for step in range(steps):
        loss = task(*create_batch(seed + step))['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_each_teacher_runs_once_a_step_whatever_methods_read_it() -> None:
    task = create_task('norm+kd@sup+feature+at@sup')
    calls: List[str] = []
    for name, teacher in task.teachers.items():
        teacher.reader.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    task(*create_batch())
    assert calls == ['dino', 'sup']


def test_terms_are_logged_apart_and_sum_up_by_their_weights() -> None:
    task = create_task('norm+kd@sup+feature', kd_weight={'norm@dino': 0.3, 'norm': 2., 'feature@sup': 5.})
    result = task(*create_batch())
    weights = {'task': 1., 'norm@dino': 0.3, 'norm@sup': 2., 'kd@sup': 1., 'feature@dino': 1., 'feature@sup': 5.}
    assert task.term_weights() == weights
    assert result.keys() == {'loss', 'output', *(f'{name}_loss' for name in weights)}
    expected = sum(weight * result[f'{name}_loss'] for name, weight in weights.items())
    torch.testing.assert_close(result['loss'], expected)
    torch.testing.assert_close(sum(task.weighted_terms(result).values()), expected)
    averages = {name: value.item() for name, value in result.items() if value.ndim == 0}
    assert task.unscheduled_loss(averages) == pytest.approx(expected.item())


@pytest.mark.parametrize('kd,name,options', [
    ('kd', 'sup', {}), ('norm', 'dino', NORM), ('norm', 'sup', NORM), ('sdd:kd', 'sup', {'sdd.scales': '1,2'}),
    ('srrl', 'sup', {})])
def test_a_term_with_one_of_the_teachers_is_that_of_a_task_with_it_alone(
        kd: str, name: str, options: Dict[str, Any]) -> None:
    larger = {'output_stride': 8} if kd == 'sdd:kd' else {}
    teachers = {**create_teachers(), 'sup': create_model('test_resnet', 2, **larger)}
    other = {'dino': 'sup', 'sup': 'dino'}[name]

    def run(teacher: Any, kd: str) -> Dict[str, torch.Tensor]:
        student = create_model('test_efficientnet', **larger)
        torch.manual_seed(4)
        task = create_distill_task(student, teacher, kd, kd_kwargs=options, input_size=SIZE, verbose=False).train()
        return task(*create_batch())

    alone = run(teachers[name], kd)
    several = run({name: teachers[name], other: teachers[other]}, f'{kd}@{name}+feature@{other}')
    assert torch.equal(several['output'], alone['output'])
    terms = [term for term in alone if term.startswith(kd)]
    assert terms and all(torch.equal(several[scope_term(term, name)], alone[term]) for term in terms)


@pytest.mark.parametrize(
    'form,kd_tap', [('direct', 'auto'), ('moments', 'auto'), ('auto', 'pre_logits'), ('auto', 'side')])
def test_the_student_of_several_teachers_merges_into_a_plain_model(form: str, kd_tap: str) -> None:
    task = create_task('norm+kd@sup', kd_kwargs={'norm.form': form}, kd_tap=kd_tap)
    losses = train(task, 3)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert len(task.module.adapters) == 1 and task.module.merge_error(create_batch()[0]) < 1e-5
    plain = merge_student(task)
    stock = create_model('test_efficientnet')
    stock.load_state_dict(task.get_checkpoint_state()['state_dict'])
    images = create_batch(9)[0]
    trained = task.eval().module(images)
    torch.testing.assert_close(plain(images), trained, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stock(images), trained, rtol=1e-4, atol=1e-5)


def test_compiling_changes_no_number() -> None:
    plain, compiled = create_task('norm+kd@sup+feature'), create_task('norm+kd@sup+feature')
    compiled.compile(backend='eager')
    expected, actual = plain(*create_batch()), compiled(*create_batch())
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_a_restored_task_goes_on_to_the_bit_and_no_teacher_is_saved() -> None:
    task, other = create_task('norm+kd@sup+crd@dino', **with_samples()), create_task(
        'norm+kd@sup+crd@dino', **with_samples())
    batch = with_indices(create_batch())
    for one in (task, other):
        torch.manual_seed(5)
        one(*batch)['loss'].backward()
    assert not any(name.startswith('teacher') for name in task.state_dict())
    entries = task.get_checkpoint_state()
    torch.nn.init.zeros_(other.student.conv_stem.weight)
    other.load_checkpoint_state(entries['state_dict'], entries['task_state'])
    results = []
    for one in (task, other):
        torch.manual_seed(6)
        results.append(one(*batch))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def with_samples() -> Dict[str, Any]:
    return {'sample_labels': torch.arange(20) % CLASSES, 'kd_kwargs': {'crd.negatives': 4}}


def with_indices(batch: Tuple[torch.Tensor, torch.Tensor]) -> Tuple[torch.Tensor, torch.Tensor]:
    return batch[0], torch.stack([batch[1], torch.arange(len(batch[1]))], 1)


@pytest.mark.parametrize('kd,options,words', [
    ('kd', {}, ["kd kd@dino compares logits, but the teacher 'dino' has no classifier", 'Write kd kd@sup']),
    ('norm@dino', {}, ["No method of kd norm@dino reads the teacher 'sup'"]),
    ('norm@dino+norm@sup', {}, ['only one of these', "'norm' without @"]),
    ('norm', {'kd_kwargs': {'norm.segments': 1}}, ['norm.segments=1']),
    ('norm', {'teacher_img_size': {'x': 32}}, ["there is no teacher 'x'", 'dino, sup']),
    ('norm', {'teacher_img_size': {'dino': 32}}, ["Teacher 'dino'", 'given as a VisionTransformer']),
    ('norm', {'teacher': ['test_vit', 'test_resnet']}, ['2 teachers without names']),
    ('norm', {'teacher': {'a b': 'test_vit'}}, ['letters, digits and underscores']),
    ('norm', {'teacher': {'class': 'test_vit'}}, ['letters, digits and underscores']),
    ('norm', {'teacher': {'a': 'test_vitt', 'b': 'test_resnet'}}, ["Teacher 'a'", "Unknown teacher 'test_vitt'"]),
    ('norm', {'teacher': {'a': 'test_vit', 'b': None}}, ["Teacher 'b'", 'needs a teacher']),
    ('norm', {'class_means': {'dino': torch.zeros(5, 64)}}, ['No method reads class means']),
])
def test_what_several_teachers_cannot_do_is_one_error(kd: str, options: Dict[str, Any], words: List[str]) -> None:
    if isinstance(options.get('teacher'), dict):
        options = {**options, 'teacher_pretrained': False, 'teacher_kwargs': {'a': {'img_size': 32}}}
    with pytest.raises(UsageError) as error:
        create_task(kd, **options)
    for word in words:
        assert word in str(error.value)


def test_options_are_for_all_teachers_or_by_name() -> None:
    task = create_task(
        'norm', {'a': 'test_vit', 'b': 'test_resnet'}, teacher_pretrained=False, teacher_mean=[0.5],
        teacher_std={'a': [0.25]}, teacher_kwargs={'a': {'img_size': 64, 'num_classes': 0}, 'b': {'num_classes': 3}},
        teacher_dtype={'b': torch.float64}, teacher_img_size={'a': 64})
    a, b = task.teachers.values()
    assert (a.preprocessing.mean, b.preprocessing.mean) == ((0.5,) * 3, (0.5,) * 3)
    assert a.preprocessing.std == (0.25,) * 3 != b.preprocessing.std
    assert (a.input_size, b.input_size) == ((3, 64, 64), SIZE)
    assert (a.num_classes, b.num_classes) == (0, 3)
    assert (next(a.parameters()).dtype, next(b.parameters()).dtype) == (torch.float32, torch.float64)
    assert (a.autocast, b.autocast) == (True, False)
    assert torch.isfinite(task(*create_batch())['loss'])


def test_one_teacher_with_a_name_is_that_teacher() -> None:
    task = create_task('norm@sup+kd', {'sup': create_teachers()['sup']}, kd_weight={'kd@sup': 0.5})
    assert isinstance(task.teacher, Teacher) and task.weights == {'norm': 1., 'kd': 0.5}
    assert 'kd_loss' in task(*create_batch())


def test_each_teacher_has_classes_of_its_own() -> None:
    wide, task_classes = create_model('test_resnet', 4, num_classes=9), list(range(4, 8)) + [8]
    teachers = {'sup': create_model('test_resnet', 2), 'wide': wide}
    lists = {i: [c] for i, c in enumerate(task_classes)}
    names = [f'class{i}' for i in range(CLASSES)]
    known = {name: lists[i] for i, name in enumerate(names) if i != 2}  # one class that this teacher does not know
    task = create_task('kd', teachers, teacher_classes={'wide': known}, class_names=names)
    images, target = create_batch()
    result = task(images, target)
    sup, both = create_task('kd', teachers['sup'])(images, target), create_task(
        'kd', wide, teacher_classes=known, class_names=names)(images, target)
    assert torch.equal(result['kd@sup_loss'], sup['kd_loss'])
    assert torch.equal(result['kd@wide_loss'], both['kd_loss'])
    assert torch.equal(result['task_loss'], sup['task_loss'])


def test_class_means_are_of_each_teacher() -> None:
    teachers = {'small': create_model('test_resnet', 2), 'vit': create_model('test_vit', 1, img_size=32)}
    task = create_task('nd', teachers, kd_kwargs={'nd.dropout': 0.})
    shapes = task.class_means_shapes
    assert shapes.keys() == {'small', 'vit'} and task.class_means_shape is None
    means = {name: torch.randn(shape, generator=torch.Generator().manual_seed(8)) for name, shape in shapes.items()}
    with pytest.raises(UsageError, match='class means'):
        task(*create_batch())
    task.set_class_means(means)
    result = task(*create_batch())
    for name, teacher in reversed(teachers.items()):  # the one that is built first draws the same layers
        options = {'kd_kwargs': {'nd.dropout': 0.}}
        first = create_task('nd', {name: teacher, **teachers}, class_means=means, **options)(*create_batch())
        alone = create_task('nd', teacher, class_means=means[name], **options)(*create_batch())
        assert torch.equal(first[f'nd@{name}_loss'], alone['nd_loss']) and torch.isfinite(result[f'nd@{name}_loss'])


def test_a_unit_without_a_weight_takes_no_part_in_the_gradient() -> None:
    task = create_task('feature', kd_weight={'feature@dino': 0.})
    task(*create_batch())['loss'].backward()
    methods = task.module.methods
    assert all(p.grad is None for p in methods['feature@dino'].parameters())
    assert any(p.grad is not None for p in methods['feature@sup'].parameters())


def test_terms_of_images_that_are_not_trained_on_are_measured_for_each_teacher() -> None:
    task = create_task('norm+feature', has_labels=False)
    terms = task.distill_terms(create_batch()[0])
    assert terms.keys() == {'norm@dino_loss', 'norm@sup_loss', 'feature@dino_loss', 'feature@sup_loss'}


def test_what_is_asked_of_a_teacher_is_asked_of_each() -> None:
    teacher = create_task().teacher
    assert isinstance(teacher, Teachers) and list(live_teachers(teacher)) == ['dino', 'sup']
    assert ask_each(teacher, lambda one: one.num_classes) == {'dino': 0, 'sup': CLASSES}
    single = teacher.by_name()['sup']
    assert ask_each(single, lambda one: one.num_classes) == CLASSES and ask_each(None, len) is None
    assert teachers_by_name(single) == {'': single} and teachers_by_name(None) == {}
    assert not teacher.train().training and not any(m.training for m in teacher.modules())


def test_a_pair_of_several_teachers_is_checked_before_training() -> None:
    report = check_pair(
        {'a': 'test_vit', 'b': 'test_resnet'}, 'test_efficientnet', 'norm+kd@b', batch_size=4, num_classes=CLASSES,
        kd_kwargs=NORM, teacher_kwargs={'a': {'img_size': 32, 'num_classes': 0}, 'b': {'num_classes': CLASSES}},
        input_size=SIZE)
    assert report.ok and report.teacher == 'a (test_vit), b (test_resnet)'
    assert report.teacher_shapes.keys() == {'a', 'b'} and 'a [64' in str(report)


# Teacher dropping

def losses(*values: float) -> Dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in zip('abcd', values)}


def test_the_teacher_with_the_largest_loss_stays() -> None:
    drop = TeacherDrop(1., seed=0)
    assert [name for name, kept in drop.choose(losses(1., 3., 2.)).items() if kept] == ['b']
    assert [name for name, kept in drop.choose(losses(1., 3., float('nan'))).items() if kept] == ['c']
    assert all(TeacherDrop(0., seed=0).choose(losses(1., 3.)).values())


def test_teachers_are_dropped_with_the_probability_and_by_seed_and_batch_alone() -> None:
    first, second, third = TeacherDrop(0.3, seed=1), TeacherDrop(0.3, seed=1), TeacherDrop(0.3, seed=2)
    before = torch.get_rng_state()
    choices = [[bool(kept) for kept in first.choose(losses(1., 2., 9.)).values()] for _ in range(2000)]
    assert torch.equal(torch.get_rng_state(), before)
    shares = torch.tensor(choices).double().mean(0)
    assert abs(shares[0] - 0.7) < 0.04 and abs(shares[1] - 0.7) < 0.04 and shares[2] == 1
    for _ in range(500):
        second.choose(losses(1., 2., 9.))
    third.load_state_dict(second.state_dict())
    again = [[bool(kept) for kept in third.choose(losses(1., 2., 9.)).values()] for _ in range(1500)]
    assert again == choices[500:]


def test_a_dropped_teachers_terms_leave_loss_and_gradient() -> None:
    task, kept = create_task('feature', teacher_drop=1.), create_task('feature')
    result, full = task(*create_batch()), kept(*create_batch())
    largest = max(('dino', 'sup'), key=lambda name: full[f'feature@{name}_loss'].item())
    other = {'dino': 'sup', 'sup': 'dino'}[largest]
    torch.testing.assert_close(result['loss'], full['task_loss'] + full[f'feature@{largest}_loss'])
    assert torch.equal(result[f'feature@{other}_loss'], full[f'feature@{other}_loss'])  # logged all the same
    assert task.weighted_terms(result)[f'feature@{other}'] == 0
    result['loss'].backward()
    # zero, and not none, for which DDP would wait
    assert all(not p.grad.any() for p in task.module.methods[f'feature@{other}'].parameters())
    assert any(p.grad.any() for p in task.module.methods[f'feature@{largest}'].parameters())
    torch.testing.assert_close(task.eval()(*create_batch())['loss'], kept.eval()(*create_batch())['loss'])


def test_a_restored_task_drops_the_teachers_that_it_would_have_dropped() -> None:
    torch.manual_seed(11)
    task = create_task('feature', teacher_drop=0.5)
    train(task, 3)
    entries = task.get_checkpoint_state()
    other = create_task('feature', teacher_drop=0.5)
    other.load_checkpoint_state(entries['state_dict'], entries['task_state'])
    assert train(other, 4, seed=3) == train(task, 4, seed=3)


def test_one_teacher_is_not_dropped_and_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    task = create_task('kd', create_teachers()['sup'], teacher_drop=0.5)
    assert '--teacher-drop 0.5 is ignored' in caplog.text
    assert 'teacher_drop' not in task.get_task_state()


def drop_in_ranks(rank: int, world_size: int) -> Dict[str, Any]:
    """Train with other images in each rank; return the choices and the weights at the end."""
    torch.manual_seed(20 + rank)  # as --seed does, which adds the rank
    teachers = create_teachers()
    student = create_model('test_vit', img_size=32)
    task = create_distill_task(
        student, teachers, 'feature+kd@sup', input_size=SIZE, verbose=False, teacher_drop=0.7).train()
    task.prepare_distributed()
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.02)
    choices = []
    for step in range(6):
        optimizer.zero_grad()
        task(*create_batch(10 * step + rank))['loss'].backward()
        optimizer.step()
        choices.append({name: bool(kept) for name, kept in task.terms.kept.items()})
    return {'choices': choices, 'weights': {n: p.detach() for n, p in task.module.named_parameters()}}


@pytest.mark.dist
def test_all_processes_drop_the_same_teachers(tmp_path: Path) -> None:
    first, second = run_ranks(drop_in_ranks, tmp_path)
    assert first['choices'] == second['choices']
    assert any(not all(choice.values()) for choice in first['choices'])
    assert all(torch.equal(weight, second['weights'][name]) for name, weight in first['weights'].items())
