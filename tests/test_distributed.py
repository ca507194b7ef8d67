"""Several processes train as one would with their batches together."""
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import timm
import torch
from kill_runs import Launch
from ranks import run_ranks
from timm.optim import create_optimizer_v2
from timm.utils import unwrap_model
from training import train_epoch

from timm_distill import Teacher, UsageError, create_distill_task
from timm_distill.engine.evaluate import ComputeSpec, evaluate
from timm_distill.teacher.sharding import count_local_parameters, count_parameters, find_parts
from timm_distill.utils.distributed import share_weights

pytestmark = pytest.mark.dist
CPU, STEPS, IMAGES = torch.device('cpu'), 4, 8


def create_task() -> Any:
    """A task without batch norms, whose moments each process takes of its own images."""
    torch.manual_seed(0)
    return create_distill_task(
        'test_vit', 'test_resnet', kd='norm+kd', kd_kwargs={'norm.segments': 2, 'norm.batch_norm': False},
        num_classes=10, input_size=(3, 160, 160), teacher_pretrained=False, verbose=False,
        teacher_kwargs={'num_classes': 10})


def create_batches() -> List[Tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(IMAGES, 3, 160, 160, generator=generator), torch.randint(10, (IMAGES,), generator=generator))
        for _ in range(STEPS)]


def train(rank: int, world_size: int) -> Dict[str, Any]:
    """Train two updates of two batches each; returns what a rank ends with."""
    task = create_task()
    task.setup_ema(decay=0.5)
    share = slice(rank * IMAGES // world_size, (rank + 1) * IMAGES // world_size)
    batches = [(images[share], target[share]) for images, target in create_batches()]
    gradients = first_gradients(task, batches[0], world_size)
    optimizer = create_optimizer_v2(task.trainable_module, 'sgd', lr=0.1, weight_decay=0.)
    metrics = train_epoch(
        task, batches, optimizer, epoch=0, device=CPU, grad_accum_steps=2, clip_grad=1., distributed=world_size > 1)
    return {
        'gradients': gradients,
        'student': task.get_checkpoint_state()['state_dict'],
        'ema': task.get_checkpoint_state(ema=True)['state_dict_ema'],
        'metrics': dict(metrics),
        'top1': evaluate(task.get_eval_model(), batches, ComputeSpec(CPU, distributed=world_size > 1))['top1'],
    }


def first_gradients(task: Any, batch: Tuple[torch.Tensor, torch.Tensor], world_size: int) -> Dict[str, torch.Tensor]:
    """Gradients of a batch, by way of one without synchronisation."""
    if world_size > 1:
        task.prepare_distributed(device_ids=[CPU])
    for context in (task.no_sync(), nullcontext()):
        with context:
            task(*batch)['loss'].backward()
    module = unwrap_model(task.trainable_module)
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return gradients


@pytest.fixture(scope='module')
def alone() -> Dict[str, Any]:
    return train(0, 1)


@pytest.mark.parametrize('world_size', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_have_gradients_weights_and_metrics_of_the_joint_batch(
        tmp_path: Path, alone: Dict[str, Any], world_size: int) -> None:
    ranks = run_ranks(train, tmp_path, world_size)
    assert set(alone['gradients']) == set(ranks[0]['gradients'])
    for key in ('gradients', 'student', 'ema'):
        torch.testing.assert_close(ranks[0][key], alone[key], rtol=1e-4, atol=1e-6)
        for rank in ranks[1:]:
            torch.testing.assert_close(rank[key], ranks[0][key], rtol=0, atol=0)  # the same file, whoever writes it
    assert ranks[0]['metrics'] == ranks[-1]['metrics'] == pytest.approx(alone['metrics'], rel=1e-4)
    assert ranks[0]['top1'] == ranks[-1]['top1'] == pytest.approx(alone['top1'])


ALL = frozenset({'logits', 'feature', 'pre_logits', 'stages'})
TEACHERS = ['test_resnet', 'test_vit', 'test_convnext', 'test_efficientnet', 'test_byobnet']


def run_sharded(rank: int, world_size: int) -> Dict[str, Any]:
    """Outputs of teachers before and after they are sharded, and how much of them this rank keeps."""
    results = {}
    for name in TEACHERS:
        torch.manual_seed(0)
        teacher = Teacher(timm.create_model(name), (3, 160, 160), channels_last=False)
        images = torch.randn(2, 3, 160, 160)
        expected = teacher(images, ALL).tensors()
        teacher.shard(CPU)
        with torch.inference_mode():  # as in validation
            teacher(images)
        head_input = torch.randn_like(teacher(images, ALL).pre_logits)[:, :, None, None].requires_grad_()
        if teacher.head_input is not None and teacher.head_input.output == 'pre_logits':
            teacher.run_head(head_input).sum().backward()
        same = all(torch.equal(a, b) for a, b in zip(teacher(images, ALL).tensors(), expected))
        results[name] = same, count_local_parameters(teacher.model) / count_parameters(teacher.model)
    return results


def test_sharded_teacher_gives_the_same_bits_and_each_process_holds_a_part(tmp_path: Path) -> None:
    pytest.importorskip('torch.distributed.fsdp')
    ranks = run_ranks(run_sharded, tmp_path)
    for name in TEACHERS:
        assert [rank[name][0] for rank in ranks] == [True, True], name
        assert all(rank[name][1] < 0.9 for rank in ranks), ranks  # most of what is tiny is the head


def share_drawn_weights(rank: int, world_size: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Logits of a teacher without weights, as drawn by this rank and as shared."""
    torch.manual_seed(rank)
    teacher = Teacher(timm.create_model('test_resnet'), (3, 32, 32))
    images = torch.ones(1, 3, 32, 32)
    drawn = teacher(images).logits
    share_weights(teacher, CPU)
    return drawn, teacher(images).logits


def test_a_teacher_without_weights_is_the_first_ranks_everywhere(tmp_path: Path) -> None:
    (first, shared), (second, other) = run_ranks(share_drawn_weights, tmp_path)
    assert not torch.allclose(first, second)
    assert torch.equal(shared, first) and torch.equal(other, first)


def test_parts_of_a_large_teacher_are_small_and_hold_nearly_all() -> None:
    with torch.device('meta'):
        for name in ('vit_large_patch16_224', 'resnet152', 'convnext_large', 'swin_large_patch4_window7_224'):
            model = timm.create_model(name)
            sizes = [count_parameters(part) for part in find_parts(model, [model.get_classifier()])]
            total = count_parameters(model)
            assert max(sizes) <= total / 8 and sum(sizes) > 0.85 * total, name


def test_sharding_one_process_names_torchrun() -> None:
    with pytest.raises(UsageError, match='torchrun'):
        Teacher(timm.create_model('test_resnet'), (3, 32, 32)).shard(CPU)


@pytest.mark.slow
def test_script_trains_with_a_sharded_teacher_as_with_a_whole_one(digits_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model('test_vit', num_classes=10, img_size=32).state_dict(), tmp_path / 'teacher.pth')
    argv = [
        '--data-dir', digits_dir, '--output', tmp_path, '--student', 'test_efficientnet', '--num-classes', 10,
        '--img-size', 32, '-b', 30, '-j', 0, '--device', 'cpu', '--epochs', 1, '--teacher', 'test_vit',
        '--teacher-kwargs', 'img_size=32', '--teacher-checkpoint', tmp_path / 'teacher.pth', '--kd', 'norm+kd',
        '--no-report']
    for name, more in {'whole': [], 'sharded': ['--teacher-fsdp']}.items():
        log = tmp_path / f'{name}.log'
        assert Launch([*argv, '--experiment', name, *more], str(log), 2).wait(600) == 0, log.read_text()[-3000:]
    assert 'gathered in' in (tmp_path / 'sharded.log').read_text()
    sharded, whole = (torch.load(tmp_path / name / 'last.pth.tar', weights_only=False) for name in ('sharded', 'whole'))
    torch.testing.assert_close(sharded['state_dict'], whole['state_dict'], rtol=1e-3, atol=1e-4)


def test_synchronised_batch_norms_on_the_cpu_are_a_usage_error(digits_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / 'log'
    argv = [
        '--data-dir', digits_dir, '--output', tmp_path / 'output', '--student', 'test_resnet', '--num-classes', 10,
        '--device', 'cpu', '--sync-bn']
    assert Launch(argv, str(log), 2).wait(600) == 2
    assert '--sync-bn needs GPUs' in log.read_text() and not (tmp_path / 'output').exists()
