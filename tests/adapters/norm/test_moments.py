"""Moments and the functions of them: values, hand-written gradients, sharing over processes."""
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import pytest
import torch
import torch.nn as nn
from ranks import run_ranks

from timm_distill import create_adapter
from timm_distill.adapters import Match
from timm_distill.adapters.norm import matmul as products
from timm_distill.adapters.norm.moments import compute_moments, map_rows, residual_spread, row_variances
from timm_distill.adapters.norm.transform import NToOneTransform
from timm_distill.losses import n_to_one_loss

CS, CT, SEGMENTS = 3, 2, 3


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)


each_format = pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])


@each_format
def test_moments_are_those_over_all_positions(memory_format: torch.memory_format) -> None:
    x = draw(4, 5, 3, 2) + 1
    actual = compute_moments(x.contiguous(memory_format=memory_format))
    torch.testing.assert_close(actual.mean, as_rows(x).mean(0))
    torch.testing.assert_close(actual.centred, as_rows(x) - as_rows(x).mean(0))
    torch.testing.assert_close(actual.cov, as_rows(x).t().cov(correction=0))


@each_format
def test_computing_moments_leaves_the_feature_as_it_is(memory_format: torch.memory_format) -> None:
    x = draw(4, 5, 3, 2).contiguous(memory_format=memory_format)
    before = x.clone()
    compute_moments(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize('part', ['centred', 'mean', 'cov'])
@each_format
def test_gradient_of_every_moment_is_that_of_finite_differences(memory_format: torch.memory_format, part: str) -> None:
    x = draw(2, CS, 2, 3).contiguous(memory_format=memory_format).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: getattr(compute_moments(x), part), x)


def test_gradient_of_all_moments_together_is_that_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(lambda x: tuple(compute_moments(x)), draw(2, CS, 2, 3).requires_grad_())


# What a linear map leaves of the teacher

@pytest.mark.parametrize('part_size', [1, 10 ** 9])
@each_format
def test_residual_spread_is_the_mean_squared_distance_of_the_centred_features(
        memory_format: torch.memory_format, part_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, '_PART_SIZE', part_size)
    x, teacher, weight = draw(4, CS, 3, 2), draw(4, CT, 3, 2) - 2, draw(CT, CS)
    rows, targets = as_rows(x - x.mean((0, 2, 3))[:, None, None]), as_rows(teacher) - as_rows(teacher).mean(0)
    actual = residual_spread(rows, weight, teacher.contiguous(memory_format=memory_format), teacher.mean((0, 2, 3)))
    torch.testing.assert_close(actual, (rows @ weight.t() - targets).square().sum(1).mean())


def test_gradients_of_the_residual_spread_are_those_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, '_PART_SIZE', 1)
    teacher, rows, weight = draw(2, CT, 2, 3), draw(12, CS).requires_grad_(), draw(CT, CS).requires_grad_()
    targets = as_rows(teacher) - as_rows(teacher).mean(0)
    expected = torch.autograd.grad((rows @ weight.t() - targets).square().sum(1).mean(), (rows, weight))
    actual = torch.autograd.grad(residual_spread(rows, weight, teacher, teacher.mean((0, 2, 3))), (rows, weight))
    torch.testing.assert_close(actual, expected)


def test_gradient_of_variances_is_that_of_finite_differences() -> None:
    weight, root = draw(4, CS).requires_grad_(), draw(CS, CS).requires_grad_()
    variances = row_variances(weight, root @ root.t())
    torch.testing.assert_close(variances, (weight @ root @ root.t() @ weight.t()).diag())
    assert torch.autograd.gradcheck(lambda weight, root: row_variances(weight, root @ root.t()), (weight, root))


# The map

def test_gradient_of_the_map_is_that_of_finite_differences() -> None:
    inputs = [tensor.requires_grad_() for tensor in (draw(7, CS), draw(4, CS), draw(4))]
    torch.testing.assert_close(map_rows(*inputs), inputs[0] @ inputs[1].t() + inputs[2])
    assert torch.autograd.gradcheck(map_rows, inputs)


def test_map_with_a_residual_connection_adds_the_rows() -> None:
    rows, weight, bias = (tensor.requires_grad_() for tensor in (draw(7, CS), draw(CS, CS), draw(CS)))
    torch.testing.assert_close(map_rows(rows, weight, bias, True), rows + rows @ weight.t() + bias)
    assert torch.autograd.gradcheck(map_rows, (rows, weight, bias, True))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_gradients_of_a_map_of_half_precision_rows_are_sums_in_single_precision(dtype: torch.dtype) -> None:
    rows, grad = draw(512, 8).to(dtype), (draw(512, 4) + 1).to(dtype)
    weight, bias = draw(4, 8).float().requires_grad_(), draw(4).float().requires_grad_()
    output = map_rows(rows, weight, bias)
    assert output.dtype == dtype
    output.backward(grad)
    assert weight.grad is not None and bias.grad is not None
    torch.testing.assert_close(weight.grad.double(), grad.double().t() @ rows.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad.double(), grad.double().sum(0), rtol=1e-6, atol=0.)


# Several processes

SHARED_OPTIONS: Dict[str, Dict[str, Any]] = {
    'residual': {},
    'straight': dict(residual=False),
    'no_offset': dict(offset=False),
    'side': dict(side=True),
}
RANKS = {'equal': (4, 4), 'unequal': (3, 5)}
GRIDS = {'same': (3, 3), 'pooled': (2, 1)}


def _create_shared(options: Dict[str, Any], form: str) -> NToOneTransform:
    torch.manual_seed(0)
    adapter = create_adapter('norm', CS, CT, segments=SEGMENTS, form=form, **options).double().train()
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return adapter


def _create_joint_batch(grid: Tuple[int, int]) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the students' feature of all ranks, the teacher's, and a direction for the output's gradient."""
    x = draw(8, CS, 3, 3) + torch.arange(8)[:, None, None, None]  # the ranks' means differ
    return x, draw(8, CT, *grid), draw(8, CS, 3, 3, seed=5)


def _step(adapter: nn.Module, parts: List[slice], grid: Tuple[int, int]) -> Dict[str, Optional[torch.Tensor]]:
    """Return losses, gradients of the sum over the parts, and running statistics."""
    x, teacher, direction = _create_joint_batch(grid)
    x.requires_grad_()
    losses = []
    if len(parts) == 1:
        result = adapter(x[parts[0]], Match(teacher[parts[0]], lambda positions: positions))
        losses, outputs = [result.loss], result.output
    else:
        outputs, expanded = adapter.expand_contract(x)
        pooled = nn.functional.adaptive_avg_pool2d(expanded, grid)
        losses = [n_to_one_loss(pooled[part], teacher[part], SEGMENTS) for part in parts]
    total = sum(losses) + (outputs * direction[parts[0]] if len(parts) == 1 else outputs * direction).sum()
    total.backward()
    gradients = {f'grad {name}': p.grad for name, p in adapter.named_parameters()}
    state = {name: value.clone() for name, value in adapter.state_dict().items() if 'running' in name or 'num' in name}
    return {'loss': torch.stack(losses).detach(), 'x': x.grad, **gradients, **state}


def _run_rank(rank: int, world_size: int) -> Dict[str, Dict[str, Optional[torch.Tensor]]]:
    results = {}
    for name, options in SHARED_OPTIONS.items():
        for split, counts in RANKS.items():
            for grid_name, grid in GRIDS.items():
                adapter = nn.SyncBatchNorm.convert_sync_batchnorm(_create_shared(options, 'moments'))
                part = slice(0, counts[0]) if rank == 0 else slice(counts[0], 8)
                result = _step(adapter, [part], grid)
                adapter.eval()(draw(4, CS, 3, 3))  # reads the running statistics alone, on one rank or on all
                results[f'{name}-{split}-{grid_name}'] = result
    return results


@pytest.mark.dist
def test_synchronised_batch_norms_give_the_joint_batchs_loss_gradients_and_statistics(tmp_path: Path) -> None:
    first, second = run_ranks(_run_rank, tmp_path)
    for case in first:
        name, split, grid = case.split('-')
        count = RANKS[split][0]
        expected = _step(
            _create_shared(SHARED_OPTIONS[name], 'direct'), [slice(0, count), slice(count, 8)], GRIDS[grid])
        actual = {}
        for key in expected:
            a, b = first[case][key], second[case][key]
            if key == 'loss':
                actual[key] = torch.cat([a, b])
            elif key == 'x' or key.startswith('grad'):
                actual[key] = None if a is None else a + b
            else:
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
                actual[key] = a
        for key, tensor in expected.items():
            torch.testing.assert_close(
                actual[key], tensor, rtol=1e-9, atol=1e-9, msg=lambda m: f'{case} {key}: {m}')  # noqa: B023


def test_converted_batch_norms_need_no_process_group_to_train() -> None:
    adapter = nn.SyncBatchNorm.convert_sync_batchnorm(_create_shared({}, 'moments'))
    actual = _step(adapter, [slice(0, 8)], (3, 3))
    expected = _step(_create_shared({}, 'moments'), [slice(0, 8)], (3, 3))
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor)
