"""Expansion and contraction from moments: values and hand-written gradients, whole and in parts."""
from typing import Callable, List, Tuple

import pytest
import torch

from timm_distill.adapters.norm import blocks as segments
from timm_distill.adapters.norm.expansion import Expansion, expand_moments
from timm_distill.adapters.norm.moments import compute_moments
from timm_distill.losses import n_to_one_loss

CS, CT, SEGMENTS = 3, 2, 3
WIDTH = SEGMENTS * CT


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def expansion_case(case: str, contracting: bool = True) -> Tuple[Callable[..., Expansion], List[torch.Tensor]]:
    """Return a function of the tensors that get a gradient, and these tensors."""
    features, teacher = [draw(3, CS, 2, 2, seed=seed) for seed in (0, 50)], draw(3, CT, 2, 2)
    weights = [draw(WIDTH, CS), draw(CS, WIDTH), draw(WIDTH), draw(WIDTH, seed=1)]
    batch_stats = case.startswith('batch')
    inputs = [*weights, *features, draw(CS, seed=9)]

    def run(
            expand: torch.Tensor,
            contract: torch.Tensor,
            scale: torch.Tensor,
            offset: torch.Tensor,
            feature: torch.Tensor,
            other: torch.Tensor,
            shift: torch.Tensor,
    ) -> Expansion:
        own = compute_moments(feature)
        matched = {'batch, same': own, 'batch, other': compute_moments(other), 'running': own}.get(case)
        return expand_moments(
            expand, contract if contracting else None, scale, offset, own.cov if batch_stats else None, 1e-5, matched,
            None if matched is None else shift, None if matched is None else teacher)

    return run, [tensor.detach().clone().requires_grad_() for tensor in inputs]


CASES = ['batch, same', 'batch, other', 'batch, alone', 'running', 'running, alone']


@pytest.mark.parametrize('part_size', [1, 10 ** 9], ids=['segmentwise', 'at once'])
@pytest.mark.parametrize('contracting', [True, False], ids=['contracting', 'side'])
@pytest.mark.parametrize('case', CASES)
def test_gradient_of_the_expansion_is_that_of_finite_differences(
        case: str, contracting: bool, part_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, '_PART_SIZE', part_size)
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
    monkeypatch.setattr(segments, '_PART_SIZE', 1)
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
    expand, cov = inputs[0], compute_moments(inputs[4]).cov
    variance = run(*inputs).variance
    torch.testing.assert_close(variance, (expand @ cov @ expand.t()).diag().detach())
    assert not variance.requires_grad


def test_loss_is_that_of_the_expanded_feature() -> None:
    x, teacher = draw(4, CS, 3, 3) + 1, draw(4, CT, 3, 3) - 1
    expand, scale, offset, shift = draw(WIDTH, CS), draw(WIDTH), draw(WIDTH, seed=1), draw(CS, seed=2)
    matched = compute_moments(x)
    origin = (matched.mean - shift)[:, None, None]
    expanded = torch.einsum('oc,bchw->bohw', scale[:, None] * expand, x - origin) + offset[:, None, None]
    actual = expand_moments(expand, None, scale, offset, None, 0., matched, shift, teacher).loss
    torch.testing.assert_close(actual, n_to_one_loss(expanded, teacher, SEGMENTS), rtol=1e-12, atol=0.)


def test_loss_of_a_perfect_match_is_zero_and_not_negative() -> None:
    for seed in range(20):
        x = draw(8, CS, 3, 3, seed=seed).float() + 3
        weight = draw(CT, CS, seed=seed).float()
        teacher = torch.einsum('oc,bchw->bohw', weight, x)
        matched, ones = compute_moments(x), torch.ones(WIDTH)
        loss = expand_moments(
            weight.repeat(SEGMENTS, 1), None, ones, ones * 0, None, 0., matched, matched.mean, teacher).loss
        assert 0 <= loss < 1e-6 * SEGMENTS * teacher.square().sum(1).mean() / CT
