"""CRD against the official code's numbers, its banks and its sampling."""
import math
from pathlib import Path
from typing import Any, Dict, Tuple

import pytest
import timm
import torch
from golden_data import GoldenCase, assert_golden, case_id, golden_cases
from ranks import run_ranks

from timm_distill import DistillTask, UsageError, create_distill_task, create_method
from timm_distill.features.spec import Features, FeatureSpec, PairSpec
from timm_distill.methods import crd
from timm_distill.methods.crd import CRD, contrastive_loss, last_of_equals

LABELS = torch.tensor([2, 0, 1, 1, 0, 2, 2, 0, 3, 2, 1, 0])
SIZE = (3, 32, 32)
each_case = pytest.mark.parametrize('case', golden_cases('crd'), ids=case_id)


def create_spec(pre_logits: int) -> FeatureSpec:
    return FeatureSpec(4, (pre_logits, 1, 1), pre_logits, (), SIZE)


def create_crd(student: int = 7, teacher: int = 9, labels: Any = LABELS, num_samples: int = 12, **options: Any) -> CRD:
    torch.manual_seed(0)
    method = create_method('crd', **{'embed_dim': 5, 'negatives': 6, **options})
    method.build(PairSpec(create_spec(student), create_spec(teacher), num_samples, labels))
    return method


def create_features(method: CRD, indices: torch.Tensor) -> Tuple[Features, Features]:
    student = torch.randn(len(indices), method.embed_student.in_features)
    teacher = torch.randn(len(indices), method.embed_teacher.in_features)
    return Features(pre_logits=student.requires_grad_()), Features(pre_logits=teacher, indices=indices)


def create_golden_crd(case: GoldenCase) -> CRD:
    hparams = case.hparams
    method = create_crd(
        hparams['s_dim'], hparams['t_dim'], None, hparams['n_data'], embed_dim=hparams['feat_dim'], mode='instance',
        negatives=hparams['nce_k'], temperature=hparams['nce_t'], momentum=hparams['nce_m']).double()
    method.student_bank.copy_(case['memory_v1'])
    method.teacher_bank.copy_(case['memory_v2'])
    for name, layer in (('s', method.embed_student), ('t', method.embed_teacher)):
        layer.load_state_dict(case.under(f'embed_{name}.linear.'))
    return method


each_form = pytest.mark.parametrize('counted', [0, 10 ** 6], ids=['rows', 'counts'])


@each_form
@each_case
def test_two_calls_equal_the_official_codes_with_gradients_and_banks(
        case: GoldenCase, counted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crd, '_COUNTED', counted)
    method = create_golden_crd(case)
    for call in ('call1', 'call2'):
        monkeypatch.setattr(method, 'draw', lambda indices, call=call: case[f'{call}.contrast_idx'])
        inputs = [case[f'{call}.{name}'].clone().requires_grad_() for name in ('f_s', 'f_t')]
        teacher = Features(pre_logits=inputs[1], indices=case[f'{call}.idx'])
        loss = method(Features(pre_logits=inputs[0]), teacher, torch.zeros(1))['crd_loss']
        assert_golden(loss, case[f'{call}.loss'])
        assert_golden(method.log_partition.exp(), torch.stack([case[f'{call}.Z_v1'], case[f'{call}.Z_v2']]))
        assert_golden(method.student_bank, case[f'{call}.memory_v1_after'])
        assert_golden(method.teacher_bank, case[f'{call}.memory_v2_after'])
        method.zero_grad()
        loss.backward()
        assert_golden(inputs[0].grad, case[f'{call}.grad.f_s'])
        assert inputs[1].grad is None
        for name, layer in (('s', method.embed_student), ('t', method.embed_teacher)):
            for parameter in ('weight', 'bias'):
                expected = case[f'{call}.grad.embed_{name}.linear.{parameter}']
                assert_golden(getattr(layer, parameter).grad, expected)


@each_case
def test_each_side_of_the_loss_equals_the_official_codes(case: GoldenCase) -> None:
    for side in ('s', 't'):
        scores = case[f'call1.out_{side}'].log()
        loss = contrastive_loss(
            scores[:, 0], scores[:, 1:], scores.shape[1] - 1, case.hparams['n_data'], eps=case.hparams['eps'])
        assert_golden(loss, case[f'call1.loss_{side}'])


@pytest.mark.parametrize('similarity', [-1e4, 0., 1e4])
def test_loss_and_gradient_are_finite_for_any_similarity(similarity: float) -> None:
    scores = torch.full((1, 4), similarity, requires_grad=True)
    loss = contrastive_loss(scores[:, 0], scores[:, 1:], 3, 100)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(scores.grad).all()


@pytest.mark.parametrize('mode', ['exact', 'relax', 'instance'])
@pytest.mark.parametrize('half', [False, True])
def test_rows_of_what_was_drawn_and_counts_over_all_samples_are_the_same_loss(
        mode: str, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for counted in (0, 10 ** 6):
        monkeypatch.setattr(crd, '_COUNTED', counted)
        method = create_crd(mode=mode, negatives=200, half_banks=half)
        dtype = torch.float32 if half else torch.float64
        method = method if half else method.double()
        losses = []
        for indices in (torch.tensor([3, 8, 0]), torch.tensor([8, 8, 5])):
            student, teacher = create_features(method, indices)
            own, other = (Features(pre_logits=x.pre_logits.to(dtype), indices=x.indices) for x in (student, teacher))
            losses.append(method(own, other, torch.zeros(3))['crd_loss'])
        losses[1].backward()
        results.append([
            *losses, method.embed_student.weight.grad, method.embed_teacher.weight.grad, method.student_bank,
            method.teacher_bank, method.log_partition])
    tolerance = {'rtol': 1e-4, 'atol': 1e-5} if half else {'rtol': 1e-10, 'atol': 1e-12}
    torch.testing.assert_close(*results, **tolerance)


@pytest.mark.parametrize('mode', ['exact', 'relax'])
def test_negatives_are_of_other_classes_and_all_of_those_are_drawn(mode: str) -> None:
    method = create_crd(mode=mode, negatives=400)
    indices = torch.arange(12)
    drawn = method.draw(indices)
    assert drawn.shape == (12, 401)
    for index in indices.tolist():
        others = set(torch.nonzero(LABELS != LABELS[index])[:, 0].tolist())
        assert set(drawn[index, 1:].tolist()) == others


def test_negatives_are_drawn_uniformly() -> None:
    method = create_crd(negatives=20000)
    counts = torch.bincount(method.draw(torch.tensor([8]))[0, 1:], minlength=12)  # the only one of its class
    assert counts[8] == 0
    expected = 20000 / 11
    chi_square = ((counts[counts > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 40  # 10 degrees of freedom: exceeded by chance once in 60,000 seeds


def test_positive_is_the_sample_itself_or_any_of_its_class() -> None:
    indices = torch.arange(12)
    assert torch.equal(create_crd(mode='exact').draw(indices)[:, 0], indices)
    assert torch.equal(create_crd(mode='instance', labels=None).draw(indices)[:, 0], indices)
    relaxed = torch.stack([create_crd(mode='relax').draw(indices)[:, 0]] + [
        method.draw(indices)[:, 0] for method in [create_crd(mode='relax')] for _ in range(200)])
    assert torch.equal(LABELS[relaxed], LABELS.expand_as(relaxed))
    assert set(relaxed[:, 0].tolist()) == {0, 5, 6, 9}


def test_instance_negatives_are_all_other_samples() -> None:
    drawn = create_crd(mode='instance', labels=None, negatives=400).draw(torch.arange(12))
    for index in range(12):
        assert set(drawn[index, 1:].tolist()) == set(range(12)) - {index}


def test_equal_random_states_draw_equal_samples() -> None:
    method = create_crd()
    state = torch.get_rng_state()
    first = method.draw(torch.arange(4))
    torch.set_rng_state(state)
    assert torch.equal(method.draw(torch.arange(4)), first)


def test_sample_that_comes_twice_is_counted_once_by_its_last() -> None:
    assert last_of_equals(torch.tensor([7, 3, 7, 1, 3, 7])).tolist() == [5, 4, 5, 3, 4, 5]
    method = create_crd(momentum=0.)
    student, teacher = create_features(method, torch.tensor([4, 4]))
    before = method.student_bank.clone()
    method(student, teacher, torch.zeros(2))
    row = torch.nn.functional.normalize(method.embed_student(student.pre_logits)[1], dim=0)
    torch.testing.assert_close(method.student_bank[4], row.detach())
    assert torch.equal(method.student_bank[5:], before[5:])


def test_banks_do_not_change_in_evaluation() -> None:
    method = create_crd().eval()
    before = method.teacher_bank.clone()
    method(*create_features(method, torch.tensor([1, 2])), torch.zeros(2))
    assert torch.equal(method.teacher_bank, before)


def test_zero_features_and_a_batch_of_one_give_finite_gradients() -> None:
    method = create_crd()
    with torch.no_grad():
        method.embed_student.bias.zero_()
    features = torch.zeros(1, 7, requires_grad=True)
    teacher = Features(pre_logits=torch.zeros(1, 9), indices=torch.tensor([3]))
    loss = method(Features(pre_logits=features), teacher, torch.zeros(1))['crd_loss']
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(features.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in method.parameters())


def test_half_banks_take_half_the_memory_and_give_nearly_the_loss() -> None:
    full, half = create_crd(), create_crd(half_banks=True)
    assert half.student_bank.dtype == torch.float16
    torch.manual_seed(1)
    features = create_features(full, torch.tensor([1, 2, 3]))
    losses = []
    for method in (full, half):
        torch.manual_seed(2)
        losses.append(method(*features, torch.zeros(3))['crd_loss'])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize('options, message', [
    (dict(mode='hard'), 'exact, relax, instance'),
    (dict(negatives=0), 'crd.negatives'),
    (dict(temperature=0.), 'crd.temperature'),
    (dict(momentum=1.), 'crd.momentum'),
    (dict(labels=None), 'crd.mode=instance'),
    (dict(labels=torch.zeros(12, dtype=torch.int64)), 'two or more classes'),
    (dict(num_samples=None), 'sample_labels or num_samples'),
])
def test_what_cannot_work_says_what_can(options: Dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_crd(**options)


# In a task

def create_task(**options: Any) -> DistillTask:
    torch.manual_seed(0)
    kwargs = {'embed_dim': 5, 'negatives': 6, **options}
    return create_distill_task(
        timm.create_model('test_vit', num_classes=4, img_size=32, depth=2),
        timm.create_model('test_resnet', num_classes=4), kd='crd', kd_kwargs={'crd': kwargs}, sample_labels=LABELS,
        input_size=SIZE, verbose=False).train()


def create_batch(indices: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(12, *SIZE, generator=torch.Generator().manual_seed(1))
    return images[indices], torch.stack([LABELS[indices], indices], 1)


def train(task: DistillTask, steps: int) -> None:
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        task(*create_batch(torch.arange(4 * step, 4 * step + 4) % 12))['loss'].backward()
        optimizer.step()
        task.update_ema(step=step)


def test_target_is_a_pair_of_class_and_sample() -> None:
    task = create_task()
    images, target = create_batch(torch.arange(4))
    result = task(images, target)
    torch.testing.assert_close(result['task_loss'], torch.nn.functional.cross_entropy(result['output'], target[:, 0]))
    for wrong in (target[:, 0], target.double(), torch.rand(4, 4)):
        with pytest.raises(UsageError, match='class index, sample index'):
            task(images, wrong)


def test_run_that_was_stopped_and_resumed_goes_on_bit_identical(tmp_path: Path) -> None:
    whole = create_task()
    train(whole, 2)
    torch.save({**whole.get_checkpoint_state(), 'rng': torch.get_rng_state()}, tmp_path / 'state.pt')
    saved = torch.load(tmp_path / 'state.pt', weights_only=True)
    resumed = create_task()
    resumed.load_checkpoint_state(saved['state_dict'], saved['task_state'])
    assert torch.equal(resumed.module.methods['crd'].student_bank, whole.module.methods['crd'].student_bank)
    results = []
    for task in (whole, resumed):
        torch.set_rng_state(saved['rng'])
        train(task, 3)
        state = task.get_checkpoint_state()
        results.append({**state['state_dict'], **state['task_state']['methods'], **state['task_state']['memory']})
    assert {'crd.student_bank', 'crd.teacher_bank', 'crd.log_partition'} <= set(results[0])
    assert all(torch.equal(results[1][name], tensor) for name, tensor in results[0].items())


def test_banks_of_another_training_set_are_refused() -> None:
    saved = create_task().get_checkpoint_state()
    saved['task_state']['memory']['crd.student_bank'] = torch.zeros(13, 5)
    with pytest.raises(UsageError, match='crd.student_bank'):
        create_task().load_checkpoint_state(**saved)


def test_ema_has_no_banks_of_its_own_and_averages_the_embeddings() -> None:
    task = create_task()
    task.setup_ema(decay=0.5)
    train(task, 4)
    own, ema = task.module.methods['crd'], task.get_trainable_module(ema=True).module.methods['crd']
    assert ema.student_bank is None and own.student_bank is not None
    assert not torch.equal(ema.embed_student.weight, own.embed_student.weight)
    state = task.get_checkpoint_state(ema=True)
    assert state['task_state_ema']['memory'] == {}
    create_task().load_checkpoint_state(**task.get_checkpoint_state())


def test_compiled_task_has_the_loss_and_banks_of_the_eager_one() -> None:
    eager, compiled = create_task(), create_task()
    compiled.compile(backend='aot_eager')
    for task in (eager, compiled):
        torch.manual_seed(3)
        train(task, 2)
    for name, tensor in eager.module.memory().items():
        torch.testing.assert_close(compiled.module.memory()[name], tensor)


def _run_rank(rank: int, world_size: int) -> Dict[str, Dict[str, torch.Tensor]]:
    task = create_task()
    if rank:
        task.module.methods['crd'].student_bank.zero_()  # ranks are seeded differently
    task.prepare_distributed(device_ids=[torch.device('cpu')])
    start = {name: buffer.clone() for name, buffer in task.module.memory().items()}
    torch.manual_seed(rank)
    for step in range(3):
        indices = torch.tensor([[0, 1, 2], [2, 3, 4]])[rank] + step  # one image is seen by both
        task(*create_batch(indices))['loss'].backward()
    return {'start': start, 'end': task.module.memory()}


@pytest.mark.dist
def test_two_processes_keep_equal_banks_that_hold_the_images_of_both(tmp_path: Path) -> None:
    first, second = run_ranks(_run_rank, tmp_path)
    for name, tensor in first['end'].items():
        assert torch.equal(second['end'][name], tensor), name
    moved = (first['end']['crd.student_bank'] != first['start']['crd.student_bank']).any(1)
    assert moved.tolist() == [i <= 6 for i in range(12)]
    assert not torch.equal(first['start']['crd.student_bank'], torch.zeros(12, 5))
    assert math.isfinite(first['end']['crd.log_partition'].sum())
