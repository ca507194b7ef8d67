"""Every optimizer of timm goes on after a resume as if it had never stopped."""
import io
from typing import Any, Dict, Tuple

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from stub_task import StubTask, create_saver
from timm.optim import create_optimizer_v2, list_optimizers

from timm_distill.checkpoint.optimizer_state import get_hidden_state, load_optimizer_state, set_hidden_state
from timm_distill.checkpoint.resume import resume_task

pytestmark = pytest.mark.filterwarnings('ignore:Using backward.. with create_graph', 'ignore:It is highly')
UNUSUAL = ['lookahead_adamw', 'lookahead_adahessian']  # as --opt takes them, not listed


def create(opt: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(4 * 4, 5), nn.Linear(5, 3)).to(dtype)
    try:
        return model, create_optimizer_v2(model, opt=opt, lr=1e-2, weight_decay=0.05, **kwargs)
    except AssertionError as e:  # needs CUDA or a package
        pytest.skip(str(e))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, updates: int, seed: int) -> None:
    torch.manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(updates):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(torch.randn(4, 3, 4, 4, dtype=dtype)).float(), torch.randint(3, (4,)))
        loss.backward(create_graph=getattr(optimizer, 'is_second_order', False))
        optimizer.step()


def saved(state: Dict[str, Any]) -> Dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_resumes_exactly(opt: str, dtype: torch.dtype, before: int, after: int, **kwargs: Any) -> None:
    model, optimizer = create(opt, dtype, **kwargs)
    train(model, optimizer, before, seed=1)
    state = saved({
        'model': model.state_dict(), 'optimizer': optimizer.state_dict(),
        'hidden': get_hidden_state(optimizer)})
    train(model, optimizer, after, seed=2)
    resumed, resumed_optimizer = create(opt, dtype, **kwargs)
    resumed.load_state_dict(state['model'])
    load_optimizer_state(resumed_optimizer, state['optimizer'])
    set_hidden_state(resumed_optimizer, state['hidden'])
    train(resumed, resumed_optimizer, after, seed=2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('opt', [*list_optimizers(), *UNUSUAL])
def test_every_optimizer_goes_on_bit_for_bit(opt: str, dtype: torch.dtype) -> None:
    assert_resumes_exactly(opt, dtype, before=2, after=5)


@pytest.mark.parametrize('opt', ['adan', 'adahessian', 'lamb', 'nadam', 'lookahead_adan'])
def test_optimizer_that_counts_in_its_groups_resumes_from_a_checkpoint(opt: str, tmp_path: Any) -> None:
    def start(seed: int) -> Tuple[StubTask, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        task = StubTask(timm.create_model('test_resnet', num_classes=4))
        return task, create_optimizer_v2(task.get_trainable_module(), opt=opt, lr=1e-2)

    def step(task: StubTask, optimizer: torch.optim.Optimizer) -> None:
        torch.manual_seed(5)
        task.get_trainable_module().train()
        optimizer.zero_grad()
        loss = task(torch.randn(2, 3, 32, 32), torch.randint(4, (2,)))['loss']
        loss.backward(create_graph=getattr(optimizer, 'is_second_order', False))
        optimizer.step()

    task, optimizer = start(0)
    step(task, optimizer)
    create_saver(tmp_path, task, optimizer).save_checkpoint(0)
    step(task, optimizer)
    resumed, resumed_optimizer = start(1)
    resume_task(resumed, str(tmp_path / 'last.pth.tar'), resumed_optimizer)
    step(resumed, resumed_optimizer)
    torch.testing.assert_close(resumed.state_dict(), task.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize('before', [2, 3, 4])
def test_traces_that_live_over_several_updates_are_kept(before: int) -> None:
    assert_resumes_exactly('adahessian', torch.float32, before, after=5, update_each=3)


def test_average_of_bfloat16_weights_rounds_on_as_it_would_have(tmp_path: Any) -> None:
    def start() -> Tuple[StubTask, torch.optim.Optimizer]:
        torch.manual_seed(0)
        task = StubTask(timm.create_model('test_resnet', num_classes=4).bfloat16())
        task.setup_ema(decay=0.9)
        return task, torch.optim.SGD(task.parameters(), lr=0.1)

    def step(task: StubTask, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in task.get_trainable_module().parameters():
            parameter.data.add_(torch.randn_like(parameter))
        task.update_ema(step=10)

    task, optimizer = start()
    step(task, 1)
    create_saver(tmp_path, task, optimizer).save_checkpoint(0)
    step(task, 2)
    resumed, resumed_optimizer = start()
    resume_task(resumed, str(tmp_path / 'last.pth.tar'), resumed_optimizer)
    step(resumed, 2)
    ours, theirs = (t.get_trainable_module(ema=True).state_dict() for t in (resumed, task))
    assert any(value.dtype == torch.bfloat16 for value in theirs.values())
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
