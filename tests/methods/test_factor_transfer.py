"""Factor transfer against the official code's numbers, and its joint training of the paraphraser."""
import pytest
import torch
from feature_pairs import create_features, create_pair
from golden_data import GoldenCase, assert_golden, case_id, golden_cases

from timm_distill import UsageError, create_method
from timm_distill.methods import METHODS, DistillMethod
from timm_distill.methods.factor_transfer import factor_loss, reconstruction_loss

CASES = golden_cases('factor_transfer')


def create_golden_method(case: GoldenCase) -> DistillMethod:
    """Return the method with a case's weights."""
    x, y = case['feat_s'], case['feat_t']
    student, teacher = create_features('student'), create_features('teacher')
    student.stages, teacher.stages = (x,), (y,)
    powers = {'factor_power': case.hparams['p1'], 'difference_power': case.hparams['p2']}
    known = METHODS.get('ft').options
    powers = {name: power for name, power in powers.items() if power in known[name].allowed}
    method = create_method('ft', factor_rate=case.hparams['k'], factor_weight=1., **powers)
    method.build(create_pair(student, teacher))
    method.double().train()
    missing = method.load_state_dict({**_weights(case, 'paraphraser'), **_weights(case, 'translator')}, strict=False)
    assert not missing.unexpected_keys and all('num_batches' in name for name in missing.missing_keys)
    return method


def _weights(case: GoldenCase, part: str) -> dict:
    return {f'{part}.{name}': value for name, value in case.under(f'{part}.').items()}


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_losses_and_gradients_equal_the_official_codes(case: GoldenCase) -> None:
    method = create_golden_method(case)
    x, y = case['feat_s'].clone().requires_grad_(), case['feat_t']
    student, teacher = create_features('student'), create_features('teacher')
    student.stages, teacher.stages = (x,), (y,)
    terms = method(student, teacher, torch.zeros(1))
    powers = case.hparams['p2'], case.hparams['p1']
    loss = factor_loss(method.translator(x), method.paraphraser(y)[0], *powers)
    if powers == (method.difference_power, method.factor_power):
        torch.testing.assert_close(terms['ft_loss'], loss)
    assert_golden(loss, case['loss'])
    assert_golden(terms['ft_reconstruction_loss'], case['loss_paraphraser'])
    loss.backward()
    assert_golden(x.grad, case['grad.feat_s'])
    scale = max(g.abs().max().item() for g in case.under('grad.translator.').values())
    for name, parameter in method.translator.named_parameters():
        # a bias in front of a batch norm has a gradient of rounding alone
        torch.testing.assert_close(parameter.grad, case[f'grad.translator.{name}'], rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_factors_and_reconstruction_equal_the_official_codes(case: GoldenCase) -> None:
    method = create_golden_method(case)
    factor, reconstruction = method.paraphraser(case['feat_t'])
    assert_golden(factor, case['factor_t'])
    assert_golden(reconstruction, case['reconstruction'])
    assert_golden(method.translator(case['feat_s']), case['factor_s'])
    assert_golden(reconstruction_loss(reconstruction, case['feat_t']), case['loss_paraphraser'])


def test_paraphraser_learns_from_its_reconstruction_alone_and_the_student_from_the_factors_alone() -> None:
    student, teacher = create_features('student'), create_features('teacher')
    method = create_method('ft')
    method.build(create_pair(student, teacher))
    terms = method(student, teacher, torch.zeros(1))
    own = [*method.paraphraser.parameters()]
    learned = [student.stages[1], *method.translator.parameters()]
    assert all(g is None for g in torch.autograd.grad(terms['ft_loss'], own, retain_graph=True, allow_unused=True))
    assert all(g is not None for g in torch.autograd.grad(terms['ft_loss'], learned, allow_unused=True))
    reconstruction = terms['ft_reconstruction_loss']
    assert all(g is None for g in torch.autograd.grad(reconstruction, learned, retain_graph=True, allow_unused=True))
    assert all(g is not None for g in torch.autograd.grad(reconstruction, own, allow_unused=True))


def test_factors_of_other_scale_and_width_can_be_compared() -> None:
    factor = torch.randn(2, 3, 4, 4)
    assert factor_loss(5 * torch.cat([factor, factor], 1), factor) < 1e-6
    torch.testing.assert_close(factor_loss(factor, -2 * factor, 2), torch.tensor(0.))


@pytest.mark.parametrize('power', [1, 2, 3, 4])
@pytest.mark.parametrize('difference_power', [1, 2, 4])
def test_exponents_are_those_of_the_formula(power: int, difference_power: int) -> None:
    student, teacher = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 5, 4, 4).double()
    maps = [torch.nn.functional.normalize((f ** power).mean(1).flatten(1)) for f in (student, teacher)]
    expected = ((maps[0] - maps[1]).abs() ** difference_power).mean()
    torch.testing.assert_close(factor_loss(student, teacher, difference_power, power), expected)
    method = create_method('ft', factor_power=power, difference_power=difference_power)
    assert (method.factor_power, method.difference_power) == (power, difference_power)


@pytest.mark.parametrize('power', [1, 2, 3, 4])
def test_powers_of_huge_factors_are_finite(power: int) -> None:
    student = (1e9 * torch.randn(2, 3, 4, 4)).requires_grad_()
    loss = factor_loss(student, 1e15 * torch.randn(2, 3, 4, 4), 1, power)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


@pytest.mark.parametrize('options', [
    dict(factor_power=5), dict(factor_rate=0.),
    dict(difference_power=3), dict(factor_weight=0.), dict(stages='all'), dict(stages=(0, 1)),
])
def test_impossible_options_are_refused(options: dict) -> None:
    with pytest.raises(UsageError, match=f'ft.{next(iter(options))}'):
        create_method('ft', **options)
