"""Several processes train as one would with their batches together."""
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import torch
import torch.distributed as dist
from kill_runs import start_method
from timm.optim import create_optimizer_v2
from timm.utils import unwrap_model

from timm_distill import create_distill_task
from timm_distill.engine import evaluate, train_one_epoch

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
    return [(torch.randn(IMAGES, 3, 160, 160, generator=generator), torch.randint(10, (IMAGES,), generator=generator))
            for _ in range(STEPS)]


def train(rank: int, world_size: int) -> Dict[str, Any]:
    """Train two updates of two batches each; returns what a rank ends with."""
    task = create_task()
    task.setup_ema(decay=0.5)
    share = slice(rank * IMAGES // world_size, (rank + 1) * IMAGES // world_size)
    batches = [(images[share], target[share]) for images, target in create_batches()]
    gradients = first_gradients(task, batches[0], world_size)
    optimizer = create_optimizer_v2(task.trainable_module, 'sgd', lr=0.1, weight_decay=0.)
    metrics = train_one_epoch(
        task, batches, optimizer, epoch=0, device=CPU, grad_accum_steps=2, clip_grad=1., distributed=world_size > 1)
    return {
        'gradients': gradients,
        'student': task.get_checkpoint_state()['state_dict'],
        'ema': task.get_checkpoint_state(ema=True)['state_dict_ema'],
        'metrics': dict(metrics),
        'top1': evaluate(task.get_eval_model(), batches, device=CPU, distributed=world_size > 1)['top1'],
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


def run_rank(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=world_size)
    torch.save(train(rank, world_size), f'{folder}/{rank}.pth')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def alone() -> Dict[str, Any]:
    return train(0, 1)


@pytest.mark.parametrize('world_size', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_have_gradients_weights_and_metrics_of_the_joint_batch(
        tmp_path: Path, alone: Dict[str, Any], world_size: int) -> None:
    processes = [start_method().Process(target=run_rank, args=(rank, world_size, str(tmp_path)))
                 for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    ranks = [torch.load(tmp_path / f'{rank}.pth') for rank in range(world_size)]
    assert set(alone['gradients']) == set(ranks[0]['gradients'])
    for key in ('gradients', 'student', 'ema'):
        torch.testing.assert_close(ranks[0][key], alone[key], rtol=1e-4, atol=1e-6)
        for rank in ranks[1:]:
            torch.testing.assert_close(rank[key], ranks[0][key], rtol=0, atol=0)  # the same file, whoever writes it
    assert ranks[0]['metrics'] == ranks[-1]['metrics'] == pytest.approx(alone['metrics'], rel=1e-4)
    assert ranks[0]['top1'] == ranks[-1]['top1'] == pytest.approx(alone['top1'])
