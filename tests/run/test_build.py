"""What a run is built of: the optimizer's parameter groups."""
import argparse
import copy
from typing import Any, Dict

import pytest
import timm
import torch
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_distill import DistillTask, UsageError, create_distill_task
from timm_distill.args import create_train_parser, parse_args
from timm_distill.checkpoint.resume import check_same_run
from timm_distill.run.build import build_optimizer

SIZE = (3, 32, 32)


def parse(*argv: str) -> argparse.Namespace:
    args = parse_args(create_train_parser(), ['--lr', '0.1', *argv])
    args.rank, args.world_size = 0, 1
    return args


def create_task(kd: str = 'norm') -> DistillTask:
    torch.manual_seed(0)
    options = {'norm.segments': 2} if 'norm' in kd else {}
    return create_distill_task(
        timm.create_model('test_resnet', num_classes=10), timm.create_model('test_efficientnet', num_classes=10),
        kd=kd, kd_kwargs=options, input_size=SIZE, verbose=False)


def rates(optimizer: torch.optim.Optimizer, task: DistillTask) -> Dict[str, Any]:
    """Return the learning rate of each parameter by name."""
    names = {id(parameter): name for name, parameter in task.module.named_parameters()}
    return {names[id(p)]: group['lr'] for group in optimizer.param_groups for p in group['params']}


@pytest.mark.parametrize('flags', [
    (), ('--opt', 'adamw'), ('--opt', 'lookahead_adam'), ('--opt', 'muon'), ('--layer-decay', '0.5'),
    ('--sched', 'none'), ('--warmup-epochs', '3', '--warmup-lr', '0.01')], ids=' '.join)
def test_learning_rate_of_what_distillation_adds_is_multiplied_and_no_other(flags: tuple) -> None:
    task, rate_of = create_task(), {}
    for factor in ('1', '0.25'):
        args = parse('--kd-lr-mult', factor, *flags)
        optimizer = build_optimizer(args, task, 32)
        scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=2)
        for epoch in (0, 5):
            if scheduler is not None:
                scheduler.step(epoch)
            rate_of[factor, epoch] = rates(optimizer, task)
    for epoch in (0, 5):
        plain, scaled = rate_of['1', epoch], rate_of['0.25', epoch]
        assert plain.keys() == scaled.keys()
        for name, rate in plain.items():
            assert scaled[name] == pytest.approx(rate * (1. if name.startswith('student.') else 0.25)), name


def test_scaled_groups_train_and_their_state_loads_again() -> None:
    task, args = create_task(), parse('--kd-lr-mult', '0.5', '--opt', 'adamw')
    optimizer = build_optimizer(args, task, 32)
    task(torch.randn(4, *SIZE), torch.arange(4))['loss'].backward()
    before = {name: p.detach().clone() for name, p in task.module.named_parameters()}
    optimizer.step()
    trained = {n: p for n, p in task.module.named_parameters() if p.grad is not None and p.grad.any()}
    assert 'adapters.0.expand.weight' in trained
    assert not any(torch.equal(before[name], p) for name, p in trained.items())
    again = build_optimizer(args, task, 32)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert rates(again, task) == rates(optimizer, task)


def test_factor_of_one_leaves_the_groups_of_earlier_checkpoints() -> None:
    task = create_task()
    assert len(build_optimizer(parse(), task, 32).param_groups) == 2  # with and without weight decay
    assert len(build_optimizer(parse('--kd-lr-mult', '2'), task, 32).param_groups) == 4


def test_factor_without_anything_to_apply_it_to_is_said(caplog: pytest.LogCaptureFixture) -> None:
    build_optimizer(parse('--kd-lr-mult', '2'), create_task('kd'), 32)
    assert '--kd-lr-mult has no effect' in caplog.text


@pytest.mark.parametrize('value', ['0', '-1', 'nan', 'inf'])
def test_factor_that_is_no_positive_number_is_one_message(value: str) -> None:
    from timm_distill.args import check_train_args
    with pytest.raises(UsageError, match='--kd-lr-mult'):
        check_train_args(parse('--kd-lr-mult', value, '--data-dir', '.', '--teacher', 'test_vit', '--kd', 'norm'))


def test_resumed_run_has_the_factor_of_its_checkpoint_or_a_fresh_optimizer() -> None:
    saved = parse('--kd-lr-mult', '0.5')
    check_same_run(parse('--kd-lr-mult', '0.5'), {'args': saved})
    with pytest.raises(UsageError, match='--kd-lr-mult 0.5, not 1'):
        check_same_run(parse(), {'args': saved})
    check_same_run(parse('--no-resume-opt'), {'args': saved})
    del saved.kd_lr_mult  # written before the flag was
    check_same_run(parse(), {'args': saved})
    with pytest.raises(UsageError, match='--kd-lr-mult 1, not 2'):
        check_same_run(parse('--kd-lr-mult', '2'), {'args': saved})
