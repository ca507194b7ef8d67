"""Promises of the training and the evaluation loop."""
import logging
import math
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Tuple

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from ranks import run_ranks
from timm.task import TrainingTask
from timm.utils import NativeScaler
from training import train_epoch

from timm_distill.engine.evaluate import ComputeSpec, evaluate
from timm_distill.engine.train import NonFiniteLossError
from timm_distill.errors import UsageError
from timm_distill.utils.random import get_rng_state, set_rng_state

CPU = torch.device('cpu')


class StubTask(TrainingTask):
    """Classification with a second, named term."""

    def __init__(self, model: nn.Module):
        super().__init__(verbose=False)
        self.trainable_module = model
        self.epochs: List[int] = []
        self.ema_steps: List[Optional[int]] = []
        self.results: List[Dict[str, float]] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def update_ema(self, step: Optional[int] = None) -> None:
        self.ema_steps.append(step)
        super().update_ema(step=step)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        output = self.trainable_module(input)
        task_loss = F.cross_entropy(output, target)
        norm_loss = output.pow(2).mean()
        loss = task_loss + 0.1 * norm_loss
        self.results.append({'loss': loss, 'task_loss': task_loss, 'norm_loss': norm_loss})
        return {'loss': loss, 'output': output, 'task_loss': task_loss, 'norm_loss': norm_loss}


def create_batches(sizes: Tuple[int, ...] = (4, 4, 4, 2), num_features: int = 5, seed: int = 0) -> List[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, num_features, generator=generator), torch.randint(3, (n,), generator=generator))
        for n in sizes
    ]


def create_task(seed: int = 0) -> Tuple[StubTask, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    task = StubTask(nn.Linear(5, 3))
    return task, torch.optim.SGD(task.parameters(), lr=0.1, momentum=0.9)


def train(task: TrainingTask, batches: List[Any], optimizer: torch.optim.Optimizer, **kwargs: Any) -> OrderedDict:
    return train_epoch(task, batches, optimizer, **kwargs)


def test_averages_equal_reading_every_step():
    task, optimizer = create_task()
    metrics = train(task, create_batches(), optimizer, log_interval=3)
    assert list(metrics) == ['loss', 'task_loss', 'norm_loss']
    for name, value in metrics.items():
        expected = sum(result[name].item() * n for result, n in zip(task.results, (4, 4, 4, 2))) / 14
        assert value == pytest.approx(expected, rel=1e-12)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Lets the loop leave values on the device, as it does where reading them costs a wait."""
    monkeypatch.setattr('timm_distill.engine.nonfinite._on_cpu', lambda tensors: False)


def test_no_value_is_read_between_log_lines(monkeypatch, as_on_cuda):
    reads = []
    for name in ('item', 'tolist', '__float__', '__bool__', 'cpu', 'numpy'):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _f=original, _n=name, **k: (reads.append(_n), _f(self, *a, **k))[1])
    task, optimizer = create_task()
    train(task, create_batches((4,) * 20), optimizer, log_interval=10, clip_grad=1.)
    assert reads == ['tolist'] * 3  # updates 0, 10 and 19


def test_update_equals_plain_loop():
    task, optimizer = create_task()
    reference, reference_optimizer = create_task()
    train(task, create_batches(), optimizer, clip_grad=0.5)
    for input, target in create_batches():
        reference_optimizer.zero_grad()
        reference(input, target)['loss'].backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        reference_optimizer.step()
    torch.testing.assert_close(task.state_dict(), reference.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize('num_batches', [2, 3, 4])
def test_accumulation_equals_large_batches(num_batches):
    batches = create_batches((4,) * num_batches)
    task, optimizer = create_task()
    train(task, batches, optimizer, grad_accum_steps=2)
    large = [
        tuple(torch.cat(parts) for parts in zip(*batches[i:i + 2]))  # the last group may be a single batch
        for i in range(0, num_batches, 2)
    ]
    reference, reference_optimizer = create_task()
    train(reference, large, reference_optimizer)
    torch.testing.assert_close(task.state_dict(), reference.state_dict())


def test_accumulated_batches_do_not_synchronise_gradients():
    task, optimizer = create_task()
    contexts = []
    no_sync = task.no_sync
    task.no_sync = lambda: (contexts.append(len(task.results)), no_sync())[1]
    train(task, create_batches((2,) * 5), optimizer, grad_accum_steps=2)
    assert contexts == [0, 2]  # first of each full group; the last batch is a group of its own


def test_ema_and_scheduler_count_optimizer_updates_over_epochs():
    task, optimizer = create_task()
    task.setup_ema()
    steps = []
    scheduler = SimpleNamespace(step_update=lambda num_updates, metric: steps.append((num_updates, metric)))
    train(task, create_batches((2,) * 5), optimizer, epoch=2, grad_accum_steps=2, lr_scheduler=scheduler)
    assert task.ema_steps == [7, 8, 9]
    assert [num_updates for num_updates, _ in steps] == [7, 8, 9]
    assert all(math.isfinite(metric) for _, metric in steps)
    assert task.epochs == [2]


def test_loss_scaler_is_called_like_timms():
    task, optimizer = create_task()
    reference, reference_optimizer = create_task()
    train(task, create_batches(), optimizer, clip_grad=0.5, loss_scaler=NativeScaler(device='cpu'))
    train(reference, create_batches(), reference_optimizer, clip_grad=0.5)
    torch.testing.assert_close(task.state_dict(), reference.state_dict())


@pytest.mark.parametrize('log_interval', [1, 50])
def test_diverged_term_is_named_with_epoch_and_batch(log_interval):
    task, optimizer = create_task()
    batches = create_batches((4,) * 6)
    for i in (2, 3, 4):
        batches[i][0].fill_(float('nan'))
    words = 'epoch 5: loss=nan, task_loss=nan, norm_loss=nan at batch 2'
    with pytest.raises(NonFiniteLossError, match=words) as error:
        train(task, batches, optimizer, epoch=5, log_interval=log_interval, max_streak=3)
    if log_interval == 1:
        assert error.value.batch[0] is batches[2][0]
    assert all(p.isfinite().all() for p in task.parameters())


def with_bad_batches(batches: List[Any], *indices: int) -> List[Any]:
    return [(torch.full_like(x, float('nan')) if i in indices else x, y) for i, (x, y) in enumerate(batches)]


def test_skipped_update_changes_nothing():
    batches = create_batches((4,) * 5)
    task, optimizer = create_task()
    metrics = train(task, with_bad_batches(batches, 1, 3), optimizer, max_streak=2)
    reference, reference_optimizer = create_task()
    expected = train(reference, [batches[i] for i in (0, 2, 4)], reference_optimizer)
    torch.testing.assert_close(task.state_dict(), reference.state_dict(), rtol=0, atol=0)
    assert metrics == expected


def test_skipped_update_leaves_ema_and_running_statistics_alone():
    torch.manual_seed(0)
    task = StubTask(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)))
    task.setup_ema(decay=0.5)
    optimizer = torch.optim.AdamW(task.trainable_module.parameters(), lr=0.1)
    train(task, create_batches((4,)), optimizer)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    train(task, with_bad_batches(create_batches((4,) * 2), 0, 1), optimizer, max_streak=None)
    torch.testing.assert_close(task.state_dict(), before, rtol=0, atol=0)


def test_device_that_nobody_waits_for_stays_finite_too(as_on_cuda):
    torch.manual_seed(0)
    task = StubTask(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)))
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.1)
    train(task, create_batches((4,)), optimizer)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    train(task, with_bad_batches(create_batches((4,) * 2), 0, 1), optimizer, max_streak=None, clip_grad=1.)
    # without momentum and weight decay an update with gradients of zero is none
    torch.testing.assert_close(task.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize('grad_accum_steps', [1, 2])
def test_guarded_updates_are_bit_for_bit_those_of_an_unguarded_loop(as_on_cuda, grad_accum_steps):
    batches = create_batches((4,) * 6)
    task, optimizer = create_task()
    reference, reference_optimizer = create_task()
    train(task, batches, optimizer, grad_accum_steps=grad_accum_steps)
    for i in range(0, 6, grad_accum_steps):
        reference_optimizer.zero_grad()
        for input, target in batches[i:i + grad_accum_steps]:
            (reference(input, target)['loss'] / grad_accum_steps).backward()
        reference_optimizer.step()
    torch.testing.assert_close(task.state_dict(), reference.state_dict(), rtol=0, atol=0)


def test_streak_is_forgiven_where_the_caller_puts_the_weights_back():
    task, optimizer = create_task()
    errors = []
    train(
        task, with_bad_batches(create_batches((4,) * 6), 1, 2, 3), optimizer, max_streak=3, log_interval=1,
        on_diverged=errors.append)
    assert len(errors) == 1 and 'batch 1' in str(errors[0])


class Stop(Exception):
    pass


class RandomLoader:
    """Batches that depend on the generators at the moment they are made, one ahead as in timm's prefetcher."""

    def __init__(self, num_batches: int = 6):
        self.num_batches = num_batches

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Any:
        torch.randint(9, ())  # as a sampler draws its seed
        ahead = None
        for _ in range(self.num_batches):
            batch = torch.randn(4, 5), torch.randint(3, (4,))
            if ahead is not None:
                yield ahead
            ahead = batch
        yield ahead


def create_noisy_task() -> Tuple[StubTask, torch.optim.Optimizer]:
    torch.manual_seed(0)
    task = StubTask(nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3)))
    return task, torch.optim.SGD(task.parameters(), lr=0.1)


@pytest.mark.parametrize('stop_after', [0, 2, 4, 5])
def test_epoch_continued_from_inside_gives_the_bits_of_one_never_stopped(stop_after):
    task, optimizer = create_noisy_task()
    expected = train(task, RandomLoader(), optimizer)
    after = torch.rand(3)

    stopped, stopped_optimizer = create_noisy_task()
    saved: Dict[str, Any] = {}

    def after_update(update_idx, get_position):
        if update_idx == stop_after:
            saved.update(position=get_position(), rng=get_rng_state())
            raise Stop

    with pytest.raises(Stop):
        train(stopped, RandomLoader(), stopped_optimizer, after_update=after_update)
    torch.manual_seed(99)  # another process
    set_rng_state(saved['rng'])
    metrics = train(stopped, RandomLoader(), stopped_optimizer, position=saved['position'])
    torch.testing.assert_close(stopped.state_dict(), task.state_dict(), rtol=0, atol=0)
    assert metrics == expected
    assert torch.equal(torch.rand(3), after)


def test_log_line_names_each_term(caplog):
    task, optimizer = create_task()
    with caplog.at_level(logging.INFO):
        train(task, create_batches((2,) * 5), optimizer, epoch=3, log_interval=2)
    lines = [r.message for r in caplog.records if r.message.startswith('Train: 3')]
    assert [line[:15] for line in lines] == ['Train: 3 [   0/', 'Train: 3 [   2/', 'Train: 3 [   4/']
    assert all(word in lines[0] for word in ('Loss: ', 'task_loss: ', 'norm_loss: ', 'images/s', 'LR: 1.000e-01'))


def test_progress_bar_is_shown_on_request_only(capsys):
    task, optimizer = create_task()
    train(task, create_batches(), optimizer)
    assert capsys.readouterr().err == ''
    train(task, create_batches(), optimizer, epoch=2, num_epochs=10, progress=True)
    assert 'epoch 2 of 0-9 train' in capsys.readouterr().err


def test_mixup_and_transfer_are_left_to_a_prefetching_loader():
    calls = []

    def mixup_fn(input, target):
        calls.append(input.dtype)
        return input.float(), target

    task, optimizer = create_task()
    train(task, create_batches(), optimizer, mixup_fn=mixup_fn, prefetcher=True)
    assert calls == []
    train(task, create_batches(), optimizer, mixup_fn=mixup_fn, prefetcher=False, model_dtype=torch.float64)
    assert calls == [torch.float64] * 4


def test_empty_loader_is_a_usage_error():
    task, optimizer = create_task()
    with pytest.raises(UsageError, match='--batch-size'):
        train(task, [], optimizer)


def test_real_model_trains_in_channels_last_and_bfloat16_autocast():
    torch.manual_seed(0)
    task = StubTask(timm.create_model('test_resnet', num_classes=3))
    optimizer = torch.optim.SGD(task.parameters(), lr=0.01)
    batches = [(torch.randn(4, 3, 32, 32), torch.randint(3, (4,))) for _ in range(2)]
    metrics = train(
        task, batches, optimizer, channels_last=True,
        amp_autocast=lambda: torch.autocast('cpu', dtype=torch.bfloat16))
    assert math.isfinite(metrics['loss'])


class StubLoader(list):
    """Batches, of which only the first num_valid_samples examples are real."""

    def __init__(self, batches: List[Any], num_valid_samples: Optional[int] = None):
        super().__init__(batches)
        self.sampler = SimpleNamespace(num_valid_samples=num_valid_samples)


def test_evaluation_weighs_a_partial_last_batch_by_its_size():
    batches = create_batches((4, 4, 3))
    model = create_task()[0].trainable_module
    metrics = evaluate(model, batches, ComputeSpec(CPU))
    input, target = (torch.cat(parts) for parts in zip(*batches))
    output = model(input)
    assert list(metrics) == ['loss', 'top1', 'top5']
    assert metrics['loss'] == pytest.approx(F.cross_entropy(output, target).item(), rel=1e-6)
    assert metrics['top1'] == pytest.approx(100 * (output.argmax(1) == target).double().mean().item())
    assert metrics['top5'] == 100.


def test_evaluation_does_not_count_sampler_padding():
    batches = create_batches((4, 4))
    model = create_task()[0].trainable_module
    padded = evaluate(model, StubLoader(batches, num_valid_samples=6), ComputeSpec(CPU))
    exact = evaluate(model, [batches[0], tuple(part[:2] for part in batches[1])], ComputeSpec(CPU))
    assert padded == pytest.approx(exact)


def test_evaluation_takes_the_first_of_several_outputs_in_eval_mode_without_gradients():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x):
            assert not self.training and torch.is_inference_mode_enabled()
            return self.fc(x), torch.zeros(1)

    model = TwoHeads()
    assert evaluate(model, create_batches(), ComputeSpec(CPU)) == evaluate(model.fc, create_batches(), ComputeSpec(CPU))


def test_evaluation_averages_the_views_of_an_image():
    batches = create_batches((6,))
    model = create_task()[0].trainable_module
    metrics = evaluate(model, batches, ComputeSpec(CPU), tta=3)
    logits, target = model(batches[0][0]).view(2, 3, -1).mean(1), batches[0][1][::3]
    assert metrics['loss'] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-6)


def test_evaluation_reads_values_at_log_lines_only(monkeypatch):
    reads = []
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, 'item', lambda self: (reads.append(1), item(self))[1])
    evaluate(create_task()[0].trainable_module, create_batches((4,) * 20), ComputeSpec(CPU), log_interval=10)
    assert len(reads) == 4  # batches 0, 10, 19 and the result


def _run_rank(rank: int, world_size: int) -> Tuple[Any, ...]:
    task, optimizer = create_task()
    batches = create_batches((4, 4), seed=rank) if rank else create_batches((4, 2), seed=rank)
    metrics = train(task, batches, optimizer, distributed=True)
    own = [{k: v.item() for k, v in result.items()} for result in task.results]
    evaluated = evaluate(create_task()[0].trainable_module, batches, ComputeSpec(CPU, distributed=True))
    batches[0][0].fill_(float('nan') if rank else 1.)
    try:
        train(task, batches, optimizer, distributed=True, max_streak=1)
        error = ''
    except NonFiniteLossError as e:
        error = str(e)
    return dict(metrics), own, dict(evaluated), error


def test_averages_and_divergence_are_shared_by_all_ranks(tmp_path):
    results = run_ranks(_run_rank, tmp_path)
    sizes = {0: (4, 2), 1: (4, 4)}
    expected = sum(r['loss'] * n for k in sizes for r, n in zip(results[k][1], sizes[k])) / 14
    assert results[0][0]['loss'] == results[1][0]['loss'] == pytest.approx(expected)

    together = create_batches((4, 2), seed=0) + create_batches((4, 4), seed=1)
    reference = evaluate(create_task()[0].trainable_module, together, ComputeSpec(CPU))
    assert results[0][2] == results[1][2] == pytest.approx(dict(reference))
    assert 'on another rank' in results[0][3] and 'at batch 0' in results[1][3]
