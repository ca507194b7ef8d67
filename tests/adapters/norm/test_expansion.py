"""Expansion, match and contraction from moments: values and hand-written gradients, whole and in parts."""
from typing import Callable, List, Optional, Tuple

import pytest
import torch

from timm_distill.adapters.norm import expansion
from timm_distill.adapters.norm.expansion import Expansion, match_expansion
from timm_distill.adapters.norm.moments import compute_moments
from timm_distill.losses import n_to_one_loss

CS, CT, SEGMENTS = 3, 2, 3
WIDTH = SEGMENTS * CT


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def expansion_case(
        eps: Optional[float], contracting: bool = True) -> Tuple[Callable[..., Expansion], List[torch.Tensor]]:
    """Return a function of the tensors that get a gradient, and these tensors."""
    teacher = draw(3, CT, 2, 2)
    inputs = [draw(WIDTH, CS), draw(CS, WIDTH), draw(WIDTH), draw(3, CS, 2, 2)]

    def run(
            expand: torch.Tensor,
            contract: torch.Tensor,
            scale: torch.Tensor,
            feature: torch.Tensor,
    ) -> Expansion:
        return match_expansion(
            expand, contract if contracting else None, scale, eps, compute_moments(feature), teacher,
            teacher.mean((0, 2, 3)))

    return run, [tensor.requires_grad_() for tensor in inputs]


each_scale = pytest.mark.parametrize('eps', [1e-5, None], ids=['batch norm', 'given'])


@pytest.mark.parametrize('part_size', [1, 10 ** 9], ids=['row by row', 'at once'])
@pytest.mark.parametrize('contracting', [True, False], ids=['contracting', 'side'])
@each_scale
def test_gradient_of_the_expansion_is_that_of_finite_differences(
        eps: Optional[float], contracting: bool, part_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expansion, '_PART_SIZE', part_size)
    run, inputs = expansion_case(eps, contracting)
    assert torch.autograd.gradcheck(
        lambda *tensors: tuple(x for x in run(*tensors)[:2] if x is not None), inputs)


@each_scale
def test_parts_change_no_number_of_the_expansion(eps: Optional[float], monkeypatch: pytest.MonkeyPatch) -> None:
    run, inputs = expansion_case(eps)
    whole = run(*inputs)
    monkeypatch.setattr(expansion, '_PART_SIZE', 1)
    torch.testing.assert_close(tuple(run(*inputs)), tuple(whole), rtol=1e-13, atol=1e-13)


@each_scale
def test_second_backward_pass_over_a_kept_graph_gives_the_same_gradients(eps: Optional[float]) -> None:
    run, inputs = expansion_case(eps)
    result = run(*inputs)
    assert result.contracted is not None
    total = result.contracted.square().sum() + result.loss
    passes = [torch.autograd.grad(total, inputs, retain_graph=True) for _ in range(3)]
    for gradients in passes[1:]:
        torch.testing.assert_close(gradients, passes[0], rtol=1e-13, atol=1e-13)


def test_gradients_of_two_graphs_do_not_share_memory() -> None:
    run, inputs = expansion_case(1e-5)
    first = torch.autograd.grad(run(*inputs).contracted.sum(), inputs, allow_unused=True)
    kept = [None if gradient is None else gradient.clone() for gradient in first]
    torch.autograd.grad(run(*[2 * tensor for tensor in inputs]).contracted.sum(), inputs, allow_unused=True)
    assert all(a is None or torch.equal(a, b) for a, b in zip(first, kept))


def test_variances_are_those_of_the_expanded_feature_and_not_differentiable() -> None:
    run, inputs = expansion_case(1e-5)
    expand, cov = inputs[0], compute_moments(inputs[3]).cov
    variance = run(*inputs).variance
    torch.testing.assert_close(variance, (expand @ cov @ expand.t()).diag().detach())
    assert not variance.requires_grad


def test_loss_is_that_of_the_centred_expanded_feature() -> None:
    x, teacher = draw(4, CS, 3, 3) + 1, draw(4, CT, 3, 3) - 1
    expand, scale = draw(WIDTH, CS), draw(WIDTH)
    expanded = torch.einsum('oc,bchw->bohw', scale[:, None] * expand, x - x.mean((0, 2, 3))[:, None, None])
    mean = teacher.mean((0, 2, 3))
    actual = match_expansion(expand, None, scale, None, compute_moments(x), teacher, mean).loss
    expected = n_to_one_loss(expanded, teacher - mean[:, None, None], SEGMENTS)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0.)


def test_loss_of_a_perfect_match_is_zero_and_not_negative() -> None:
    for seed in range(20):
        x = draw(8, CS, 3, 3, seed=seed).float() + 3
        weight = draw(CT, CS, seed=seed).float()
        teacher = torch.einsum('oc,bchw->bohw', weight, x)
        loss = match_expansion(
            weight.repeat(SEGMENTS, 1), None, torch.ones(WIDTH), None, compute_moments(x), teacher,
            teacher.double().mean((0, 2, 3))).loss
        assert 0 <= loss < 1e-6 * SEGMENTS * teacher.square().sum(1).mean() / CT
