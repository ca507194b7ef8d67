"""The N-to-one transform with several teachers, which share its segments."""
from typing import Any, Dict, Optional, Sequence, Tuple

import pytest
import torch

from timm_distill import UsageError, create_adapter
from timm_distill.adapters import Match
from timm_distill.adapters.norm.layers import Block, share_segments
from timm_distill.adapters.norm.transform import NToOneTransform

CS, WIDTHS, SEGMENTS = 6, (5, 3), 5  # three segments of the first teacher, two of the second
GRID = (4, 4)
GRIDS = {  # of the two teachers
    'same': (GRID, GRID), 'one smaller': (GRID, (2, 2)), 'both smaller': ((2, 2), (2, 4)), 'one larger': ((7, 7), GRID)}
OPTIONS: Dict[str, Dict[str, Any]] = {
    'official': {}, 'plain': dict(batch_norm=False), 'straight': dict(residual=False), 'side': dict(side=True),
    'without offset': dict(offset=False)}


def create(form: str = 'direct', widths: Any = WIDTHS, segments: int = SEGMENTS, **options: Any) -> NToOneTransform:
    adapter = create_adapter('norm', CS, widths, segments=segments, form=form, **options).double()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in adapter.state_dict().items():
        if tensor.is_floating_point():
            random = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(random.abs() + 0.5 if 'var' in name else random)
    return adapter  # type: ignore[return-value]


def draw(channels: int, grid: Sequence[int], seed: int) -> torch.Tensor:
    return torch.randn(3, channels, *grid, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def create_match(grids: Sequence[Sequence[int]] = (GRID, GRID)) -> Match:
    return Match(tuple(draw(c, grid, 7 + i) for i, (c, grid) in enumerate(zip(WIDTHS, grids))), lambda x: x)


def run(adapter: NToOneTransform, match: Optional[Match]) -> Dict[str, torch.Tensor]:
    """Return output, losses, all gradients of a sum that reads them with different weights, and running statistics."""
    x = draw(CS, GRID, 1).requires_grad_()
    result = adapter(x, match)
    total = (result.output * draw(CS, GRID, 2)).sum()
    losses = dict(enumerate(result.loss or ()))
    for i, loss in losses.items():
        total = total + (1.3 + i) * loss
    total.backward()
    gradients = {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}
    state = {name: tensor for name, tensor in adapter.state_dict().items() if 'running' in name}
    return {'output': result.output, **{f'loss{i}': v for i, v in losses.items()}, 'x': x.grad, **gradients, **state}


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('grids', GRIDS.values(), ids=list(GRIDS))
@pytest.mark.parametrize('options', OPTIONS.values(), ids=list(OPTIONS))
def test_both_forms_are_equal_with_several_teachers(
        options: Dict[str, Any],
        grids: Tuple[Tuple[int, int], Tuple[int, int]],
        training: bool,
) -> None:
    moments, direct = (run(create(form, **options).train(training), create_match(grids)) for form in (
        'moments', 'direct'))
    assert {'loss0', 'loss1'} <= direct.keys()
    for name, tensor in direct.items():
        scale = max(tensor.abs().max().item(), 1e-3)
        actual = moments.get(name, torch.zeros_like(tensor))
        torch.testing.assert_close(actual, tensor, rtol=1e-9, atol=1e-9 * scale, msg=lambda m: f'{name}: {m}')  # noqa: B023


@pytest.mark.parametrize('form', ['direct', 'moments'])
def test_the_loss_against_each_teacher_is_the_sum_over_its_own_segments(form: str) -> None:
    adapter, match = create(form).train(), create_match()
    expanded = adapter.expand_contract(draw(CS, GRID, 1))[1]
    segments = expanded.split([5, 5, 5, 3, 3], dim=1)  # channels of the first teacher, then of the second
    expected = [
        sum((segment - teacher).square().mean() for segment in own)
        for own, teacher in zip((segments[:3], segments[3:]), match.teacher)]
    torch.testing.assert_close(list(create(form).train()(draw(CS, GRID, 1), match).loss), expected)


def test_equal_teachers_have_together_the_loss_of_one() -> None:
    teacher = draw(4, GRID, 5)
    one = create(widths=4, segments=6).train()(draw(CS, GRID, 1), Match(teacher, lambda x: x))
    two = create(widths=(4, 4), segments=6).train()(draw(CS, GRID, 1), Match((teacher, teacher), lambda x: x))
    torch.testing.assert_close(sum(two.loss), one.loss)
    torch.testing.assert_close(two.output, one.output)


@pytest.mark.parametrize('options', [options for options in OPTIONS.values() if 'side' not in options])
def test_one_affine_map_merges_the_segments_of_all_teachers(options: Dict[str, Any]) -> None:
    adapter, x = create(**options).eval(), draw(CS, GRID, 3)
    weight, bias = adapter.affine()
    torch.testing.assert_close(adapter(x).output, torch.einsum('oc,bchw->bohw', weight, x) + bias[:, None, None])


@pytest.mark.parametrize('segments,widths,blocks', [
    (8, 5, [(8, 5)]), (8, (5, 3), [(4, 5), (4, 3)]), (8, (5, 3, 2), [(3, 5), (3, 3), (2, 2)]),
    (2, (5, 3), [(1, 5), (1, 3)])])
def test_segments_are_shared_out_evenly(segments: int, widths: Any, blocks: Any) -> None:
    assert share_segments(segments, widths) == tuple(Block(*block) for block in blocks)


def test_fewer_segments_than_teachers_are_an_error_that_says_so() -> None:
    with pytest.raises(UsageError, match='norm.segments=1 cannot be shared out among 2 teachers'):
        create_adapter('norm', CS, WIDTHS, segments=1)


def test_a_max_pooled_student_takes_the_direct_form_whichever_teacher_asks_for_it() -> None:
    match = create_match((GRID, (2, 2)))
    auto, direct = (run(create(form, pool='max').train(), match) for form in ('auto', 'direct'))
    assert all(torch.equal(auto[name], tensor) for name, tensor in direct.items())
    with pytest.raises(UsageError, match='norm.form=moments cannot max-pool'):
        create('moments', pool='max').train()(draw(CS, GRID, 1), match)


def test_a_teacher_too_few_is_not_passed_over() -> None:
    for form in ('direct', 'moments'):
        with pytest.raises(ValueError, match='zip'):
            create(form).train()(draw(CS, GRID, 1), Match(draw(WIDTHS[0], GRID, 4), lambda x: x))
