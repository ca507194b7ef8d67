"""The moment form's pure functions: moments, expansion, their hand-written gradients, sharing over processes."""
import os
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
import torch
import torch.nn as nn

from timm_distill import create_adapter, moments
from timm_distill.adapters import Match
from timm_distill.adapters.norm import NToOneTransform
from timm_distill.losses import n_to_one_loss
from timm_distill.moments import (
    Expansion,
    Moments,
    compute_moments,
    compute_teacher_moments,
    expand_moments,
    full_float32,
)

CS, CT, SEGMENTS = 3, 2, 3
WIDTH = SEGMENTS * CT


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def draw_moments(seed: int = 0) -> Moments:
    """Return moments that a batch can have."""
    cov = draw(CS, CS, seed=seed)
    return Moments(draw(CS, seed=seed), cov @ cov.t() + torch.eye(CS).double(), draw(CT, CS, seed=seed))


# Moments

@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_moments_are_those_over_all_positions(memory_format: torch.memory_format) -> None:
    x, teacher = draw(4, 5, 3, 2) + 1, draw(4, 7, 3, 2) - 2
    rows, targets = [t.permute(0, 2, 3, 1).flatten(0, 2) for t in (x, teacher)]
    actual = compute_moments(x.contiguous(memory_format=memory_format), teacher.contiguous(memory_format=memory_format))
    torch.testing.assert_close(actual.mean, rows.mean(0))
    torch.testing.assert_close(actual.cov, rows.t().cov(correction=0))
    joint = torch.cat([targets, rows], 1).t().cov(correction=0)
    torch.testing.assert_close(actual.cross, joint[:7, 7:])


def test_teachers_moments_are_its_mean_and_its_spread_around_it() -> None:
    teacher = draw(4, 7, 3, 2) * 2 - 5
    actual = compute_teacher_moments(teacher.float().requires_grad_())
    torch.testing.assert_close(actual.mean.double(), teacher.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    expected = (teacher - actual.mean[:, None, None]).square().sum(1).mean()
    assert actual.spread.dtype == torch.float64 and not actual.mean.requires_grad
    torch.testing.assert_close(actual.spread, expected.detach(), rtol=1e-6, atol=0.)


def test_without_a_teacher_there_is_no_covariance_with_it() -> None:
    x = draw(4, 5, 3, 2)
    alone, with_teacher = compute_moments(x), compute_moments(x, draw(4, 7, 3, 2))
    assert alone.cross.numel() == 0
    assert torch.equal(alone.cov, with_teacher.cov) and torch.equal(alone.mean, with_teacher.mean)


@pytest.mark.parametrize('with_teacher', [True, False])
def test_gradient_of_the_moments_is_that_of_finite_differences(with_teacher: bool) -> None:
    teacher = draw(2, CT, 2, 3) if with_teacher else None
    x = draw(2, CS, 2, 3).requires_grad_()

    def run(x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        result = compute_moments(x, teacher)
        return tuple(result) if with_teacher else (result.mean, result.cov)

    assert torch.autograd.gradcheck(run, x)


@pytest.mark.parametrize('part', ['mean', 'cov', 'cross'])
def test_gradient_of_one_moment_alone_is_right(part: str) -> None:
    assert torch.autograd.gradcheck(
        lambda x: getattr(compute_moments(x, draw(2, CT, 2, 3)), part), draw(2, CS, 2, 3).requires_grad_())


# Expansion

def expansion_case(case: str, contracting: bool = True) -> Tuple[Callable[..., Expansion], List[torch.Tensor]]:
    """Return a function of the tensors that get a gradient, and these tensors."""
    teacher = compute_teacher_moments(draw(3, CT, 2, 2))
    own, other = draw_moments(), draw_moments(seed=50)
    weights = [draw(WIDTH, CS), draw(CS, WIDTH), draw(WIDTH), draw(WIDTH, seed=1)]
    matched = {'batch, same': own, 'batch, other': other, 'running': other}.get(case)
    batch_stats = case.startswith('batch')
    inputs = [*weights, own.cov, other.cov, own.cross, draw(CS, seed=9)]

    def run(
            expand: torch.Tensor,
            contract: torch.Tensor,
            scale: torch.Tensor,
            offset: torch.Tensor,
            cov: torch.Tensor,
            other_cov: torch.Tensor,
            cross: torch.Tensor,
            shift: torch.Tensor,
    ) -> Expansion:
        positions = None if matched is None else Moments(own.mean, cov if matched is own else other_cov, cross)
        return expand_moments(
            expand, contract if contracting else None, scale, offset, cov if batch_stats else None, 1e-5, positions,
            None if matched is None else shift, None if matched is None else teacher)

    return run, [tensor.detach().clone().requires_grad_() for tensor in inputs]


CASES = ['batch, same', 'batch, other', 'batch, alone', 'running', 'running, alone']


@pytest.mark.parametrize('part_size', [1, 10 ** 9], ids=['segmentwise', 'at once'])
@pytest.mark.parametrize('contracting', [True, False], ids=['contracting', 'side'])
@pytest.mark.parametrize('case', CASES)
def test_gradient_of_the_expansion_is_that_of_finite_differences(
        case: str, contracting: bool, part_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, '_PART_SIZE', part_size)
    if case.endswith('alone') and not contracting:
        pytest.skip('computes nothing')
    run, inputs = expansion_case(case, contracting)

    def outputs(*tensors: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        result = run(*tensors)
        parts = [result.contracted] if contracting else []
        return tuple(parts + ([] if case.endswith('alone') else [result.loss]))

    assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize('case', CASES)
def test_parts_change_no_number_of_the_expansion(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, inputs = expansion_case(case)
    whole = run(*inputs)
    monkeypatch.setattr(moments, '_PART_SIZE', 1)
    torch.testing.assert_close(tuple(run(*inputs)), tuple(whole), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize('case', CASES)
def test_second_backward_pass_over_a_kept_graph_gives_the_same_gradients(case: str) -> None:
    run, inputs = expansion_case(case)
    result = run(*inputs)
    total = result.contracted.square().sum() + result.loss
    passes = [torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True) for _ in range(3)]
    for gradients in passes[1:]:
        for actual, expected in zip(gradients, passes[0]):
            assert (actual is None) == (expected is None)
            if expected is not None:
                torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_gradients_of_two_graphs_do_not_share_memory() -> None:
    run, inputs = expansion_case('batch, same')
    first = torch.autograd.grad(run(*inputs).contracted.sum(), inputs, allow_unused=True)
    kept = [None if gradient is None else gradient.clone() for gradient in first]
    torch.autograd.grad(run(*[2 * tensor for tensor in inputs]).contracted.sum(), inputs, allow_unused=True)
    assert all(a is None or torch.equal(a, b) for a, b in zip(first, kept))


def test_variances_are_those_of_the_expanded_feature_and_not_differentiable() -> None:
    run, inputs = expansion_case('batch, same')
    expand, cov = inputs[0], inputs[4]
    variance = run(*inputs).variance
    torch.testing.assert_close(variance, (expand @ cov @ expand.t()).diag().detach())
    assert not variance.requires_grad


def test_loss_is_that_of_the_expanded_feature() -> None:
    x, teacher = draw(4, CS, 3, 3) + 1, draw(4, CT, 3, 3) - 1
    expand, scale, offset, shift = draw(WIDTH, CS), draw(WIDTH), draw(WIDTH, seed=1), draw(CS, seed=2)
    matched = compute_moments(x, teacher)
    origin = (matched.mean - shift)[:, None, None]
    expanded = torch.einsum('oc,bchw->bohw', scale[:, None] * expand, x - origin) + offset[:, None, None]
    actual = expand_moments(
        expand, None, scale, offset, None, 0., matched, shift, compute_teacher_moments(teacher)).loss
    torch.testing.assert_close(actual, n_to_one_loss(expanded, teacher, SEGMENTS), rtol=1e-12, atol=0.)


def test_loss_of_a_perfect_match_is_zero_and_not_negative() -> None:
    for seed in range(20):
        x = draw(8, CS, 3, 3, seed=seed).float() + 3
        weight = draw(CT, CS, seed=seed).float()
        teacher = torch.einsum('oc,bchw->bohw', weight, x)
        matched = compute_moments(x, teacher)
        ones = torch.ones(WIDTH)
        loss = expand_moments(
            weight.repeat(SEGMENTS, 1), None, ones, ones * 0, None, 0., matched, matched.mean,
            compute_teacher_moments(teacher)).loss
        assert 0 <= loss < 1e-6 * SEGMENTS * teacher.square().sum(1).mean() / CT


# Flags

@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = enabled
    try:
        yield
    finally:
        for backend, value in zip(backends, before):
            backend.allow_tf32 = value


def tf32_flags() -> Tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize('enabled', [True, False])
def test_tf32_is_off_inside_and_as_before_behind(enabled: bool) -> None:
    with tf32(enabled):
        with full_float32():
            assert tf32_flags() == (False, False)
        assert tf32_flags() == (enabled, enabled)
        with pytest.raises(ZeroDivisionError), full_float32():
            raise ZeroDivisionError
        assert tf32_flags() == (enabled, enabled)


@pytest.mark.parametrize('enabled', [True, False])
def test_tf32_is_as_before_behind_a_step(enabled: bool) -> None:
    with tf32(enabled):
        adapter = create_adapter('norm', CS, CT, segments=2, form='moments')
        result = adapter(draw(4, CS, 3, 3).float(), Match(draw(4, CT, 3, 3).float(), lambda positions: positions))
        assert tf32_flags() == (enabled, enabled)
        (result.loss + result.output.sum()).backward()
        assert tf32_flags() == (enabled, enabled)


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


def _run_rank(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE='2')
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', rank=rank, world_size=2)
    results = {}
    for name, options in SHARED_OPTIONS.items():
        for split, counts in RANKS.items():
            for grid_name, grid in GRIDS.items():
                adapter = nn.SyncBatchNorm.convert_sync_batchnorm(_create_shared(options, 'moments'))
                part = slice(0, counts[0]) if rank == 0 else slice(counts[0], 8)
                result = _step(adapter, [part], grid)
                adapter.eval()(draw(4, CS, 3, 3))  # reads the running statistics alone, on one rank or on all
                results[f'{name}-{split}-{grid_name}'] = result
    torch.save(results, Path(folder) / f'rank{rank}.pt')
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.dist
def test_synchronised_batch_norms_give_the_joint_batchs_loss_gradients_and_statistics(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_run_rank, args=(port, str(tmp_path)), nprocs=2)
    first, second = [torch.load(tmp_path / f'rank{rank}.pt', weights_only=True) for rank in range(2)]
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
