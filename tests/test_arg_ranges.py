"""Every numeric flag has the range in which it makes sense, and a value outside is one message that names it."""
import argparse
import math
from pathlib import Path
from typing import Any, List

import pytest
import torch
from timm.data import Mixup
from timm.models import list_pretrained
from timm.models._registry import get_pretrained_cfg
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_distill.args import (
    check_train_args,
    check_validate_args,
    create_export_parser,
    create_train_parser,
    create_validate_parser,
    parse_args,
)
from timm_distill.args.checks import SCHEDULES
from timm_distill.args.ranges import RANGES, range_of
from timm_distill.data import create_train_loss
from timm_distill.errors import UsageError
from timm_distill.run.build import check_rates
from timm_distill.run.evaluate import read_valid_labels
from timm_distill.utils.ranges import Range

PARSERS = {'train': create_train_parser, 'validate': create_validate_parser, 'export': create_export_parser}
CHECKS = {'train': check_train_args, 'validate': check_validate_args}
LENGTHS = {'input_size': 3, 'ratio': 2, 'scale': 2, 'cutmix_minmax': 2}


def numeric_actions(script: str) -> List[argparse.Action]:
    return [a for a in PARSERS[script]()._actions if a.type in (int, float)]


def check(script: str, *argv: str) -> None:
    CHECKS[script](parse_args(PARSERS[script](), argv))


def flag_values(action: argparse.Action, value: Any) -> List[str]:
    """Return a command line that gives a flag a value, once for each that it takes."""
    first, *others = [str(value)] * LENGTHS.get(action.dest, 1)
    return [f'{max(action.option_strings, key=len)}={first}'] if not others else [
        max(action.option_strings, key=len), first, *others]


def outside(span: Range, kind: type) -> List[Any]:
    """Return numbers just outside of a range and far from it, of the type that a flag takes."""
    step = 1 if kind is int else 1e-3
    values: List[Any] = [] if kind is int else [math.nan, math.inf, -math.inf]
    if not math.isinf(span.low):
        values += [span.low if span.without_low else span.low - step, -10 ** 12]
    if not math.isinf(span.high):
        values += [span.high if span.without_high else span.high + step, 10 ** 12]
    return [kind(value) for value in values]


CASES = [
    (script, action, value) for script in CHECKS for action in numeric_actions(script)
    for value in outside(range_of(action.dest), action.type)  # type: ignore[arg-type]
    if value != -math.inf or action.dest not in LENGTHS]  # argparse takes a -inf that stands alone for a flag


@pytest.mark.parametrize('script', PARSERS)
def test_every_numeric_flag_has_a_range(script: str) -> None:
    known = {name for names in RANGES.values() for name in names}
    missing = [a.dest for a in numeric_actions(script) if a.dest not in known]
    assert not missing, f'give these flags their range in timm_distill/args/ranges.py: {missing}'


def test_no_range_is_there_twice_or_for_a_flag_that_does_not_exist() -> None:
    names = [name for names in RANGES.values() for name in names]
    assert len(names) == len(set(names))
    assert set(names) == {a.dest for script in PARSERS for a in numeric_actions(script)}


def test_every_default_is_in_its_range() -> None:
    for script in PARSERS:
        for action in numeric_actions(script):
            values = action.default if isinstance(action.default, list) else [action.default]
            assert all(v is None or v in range_of(action.dest) for v in values), action.dest


@pytest.mark.parametrize(
    ('script', 'action', 'value'), CASES, ids=[f'{script}-{action.dest}={value:g}' for script, action, value in CASES])
def test_a_number_outside_of_its_range_is_one_message_that_names_flag_and_value(
        script: str,
        action: argparse.Action,
        value: Any,
) -> None:
    with pytest.raises(UsageError) as error:
        check(script, *flag_values(action, value))
    assert f'--{action.dest.replace("_", "-")} {value}' in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('argv', [
    ['--clip-grad', '0'],
    ['--std', '0.2', '0', '0.2'],
    ['--mean', '123.7', '116.3', '103.5'],
    ['--std', '58.4', '57.1', '57.4'],
    ['--scale', '0', '0'],
    ['--ratio', '0', '0'],
    ['--ratio', '0', '1'],
    ['--scale', '0.5', '0.2'],
    ['--scale', '0.5'],
    ['--cutmix-minmax', '0.3', '0.3'],
    ['--decay-milestones', '3', '2'],
    ['--decay-epochs', '0'],
    ['--lr-noise', '0.8', '0.2'],
    ['--lr-noise', '0.1', '0.2', '0.3'],
    ['--lr-noise', '0.5', '--lr-noise-pct', '1e-9'],  # would draw for ever
    ['--lr-cycle-limit', '0'],
    ['--smoothing', '1'],
    ['--naflex-loader', '--naflex-patch-sizes', '8', '16', '--naflex-patch-size-probs', '0', '0'],
    ['--opt-kwargs', 'eps=1e999'],
    ['--model-kwargs', 'drop_rate=1e999'],
    ['--teacher-kwargs', 'drop_rate=1e999'],
    ['--kd-kwargs', 'kd.temperature=1e999'],
    ['--kd-weight', 'kd=1e999'],
    ['--kd-kwargs', 'norm.schedule=[1e999]'],
    ['--epochs', '1' + 400 * '0'],
])
def test_a_senseless_setting_is_a_message(argv: List[str]) -> None:
    with pytest.raises(UsageError) as error:
        check('train', *argv)
    assert argv[0] in str(error.value) or argv[-2] in str(error.value) or argv[-3] in str(error.value)


@pytest.mark.parametrize('argv', [
    ['--crop-pct', '1.15'],  # timm's largest
    ['--mean', '0', '--std', '1'],
    ['--scale', '0', '1'],
    ['--scale', '0.85', '1.05', '--train-crop-mode', 'rkrr'],
    ['--lr', '0'],  # timm's word for: compute it from --lr-base
    ['--lr-noise', '0.4', '0.9'],
    ['--lr-noise', '0.4'],
    ['--opt-betas', '0.98', '0.92', '0.99', '--opt', 'adan'],
    ['--decay-epochs', '0.2', '--sched', 'wsd'],
    ['--decay-epochs', '2.4', '--decay-rate', '.97', '--sched', 'step'],
    ['--decay-milestones', '2', '2', '3', '--sched', 'multistep'],
    ['--decay-rate', '2', '--sched', 'poly'],
    ['--lr-cycle-mul', '2', '--lr-cycle-decay', '0', '--lr-cycle-limit', '3'],
    ['--poly-epsilon', '-1', '--loss', 'poly'],
    ['--drop', '0', '--drop-path', '0', '--reprob', '0', '--momentum', '0', '--weight-decay', '0'],
    ['--bn-momentum', '1'], ['--layer-decay', '1'], ['--cutmix-minmax', '0', '1'], ['--local-rank', '-1'],
    ['--opt-eps', '0'], ['--seed', '4294901760'], ['--head-init-scale', '0'], ['--head-init-bias', '-10'],
])
def test_what_timm_can_use_stays_legal(argv: List[str]) -> None:
    check('train', *argv)


@pytest.mark.parametrize(('argv', 'words'), [
    (['--opt-kwargs', 'foo=1'], "foo=1: 'sgd' has no such argument"),
    (['--opt', 'adamw', '--opt-kwargs', 'amsgard=True'], 'closest: amsgrad'),
    (['--opt', 'lookahead_adamw', '--opt-kwargs', 'amsgard=True'], 'closest: amsgrad'),
    (['--opt-kwargs', 'lr=1'], 'lr has a flag of its own, --lr'),
    (['--opt-kwargs', 'weight_decay=1'], 'weight_decay has a flag of its own, --weight-decay'),
])
def test_an_unknown_argument_of_the_optimizer_is_named_with_the_closest(argv: List[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check('train', *argv)


def test_arguments_of_the_optimizer_and_of_timms_factory_pass() -> None:
    check('train', '--opt-kwargs', 'nesterov=False', 'foreach=True')
    check('train', '--opt-kwargs', 'filter_bias_and_bn=False')  # decays biases and norms, as papers do
    check('train', '--opt', 'muon', '--opt-kwargs', 'fallback_list=[]', 'ns_steps=4')


@pytest.mark.parametrize('text', [
    'rand-mnan', 'rand-m9-mstdinf', 'rand-m9-magic', 'rand-m9.5', 'rand-m-9', 'rand-m9-q3',
    'augmix-w', 'augmix-z3', 'v0-mstd', 'original-x1'])
def test_an_augmentation_policy_that_timm_cannot_read_or_reads_in_part_is_named(text: str) -> None:
    with pytest.raises(UsageError, match='--aa'):
        check('train', '--aa', text)


@pytest.mark.parametrize('text', [
    'rand', 'rand-m9-mstd0.5-inc1', 'rand-m7-mstd1-tweights', 'rand-m15-n2-p0.6-mmax20', 'augmix-m5-w4-d2', 'v0',
    'v0r-mstd0.5', 'original', 'originalr', '3a', 'rand-mstd101'])
def test_an_augmentation_policy_of_timm_passes(text: str) -> None:
    check('train', '--aa', text)


@pytest.mark.parametrize('flags', [
    ['--lr-cycle-mul', '0.5', '--lr-cycle-limit', '2', '--cooldown-epochs', '40'],  # a logarithm of less than nothing
    ['--sched', 'step', '--decay-epochs', '0.001', '--decay-rate', '1e30'],
])
@pytest.mark.parametrize('on_updates', [False, True])
def test_a_schedule_that_would_end_inside_the_run_is_found_before_it(flags: List[str], on_updates: bool) -> None:
    argv = ['--lr', '0.1', '--epochs', '10', '--warmup-epochs', '0', *flags, *['--sched-on-updates'] * on_updates]
    with pytest.raises(UsageError, match='the learning rate of epoch'):
        schedule(argv)


def schedule(argv: List[str]) -> None:
    args = parse_args(create_train_parser(), argv)
    check_train_args(args)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.lr)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=7)
    check_rates(args, scheduler, epochs, 7)


@pytest.mark.parametrize('sched', SCHEDULES)
@pytest.mark.parametrize('on_updates', [False, True])
def test_every_schedule_of_timm_passes(sched: str, on_updates: bool) -> None:
    argv = ['--sched', sched, '--lr', '0.1', '--epochs', '30', '--decay-epochs', '3', '--cooldown-epochs', '5']
    schedule([*argv, *['--sched-on-updates'] * (on_updates and sched != 'plateau')])
    schedule(['--sched', sched, '--lr', '0.1', '--epochs', '200000', '--decay-epochs', '30'])


def test_normalisation_and_crop_of_every_timm_model_are_in_range() -> None:
    for name in list_pretrained():
        cfg = get_pretrained_cfg(name)
        for value in (cfg.crop_pct, cfg.test_crop_pct):
            assert value is None or value in range_of('crop_pct'), name
        for key in ('mean', 'std'):
            assert all(value in range_of(key) for value in getattr(cfg, key)), name


def test_timms_mixup_needs_two_different_ends_of_cutmix_minmax() -> None:
    mixup = Mixup(cutmix_minmax=(0.3, 0.3), mixup_alpha=0., num_classes=2)
    with pytest.raises(ValueError):  # the reason for the rule
        mixup(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(('span', 'text'), [
    (Range(), 'a finite number'),
    (Range(0), 'a finite number from 0'),
    (Range(0, without_low=True), 'a finite number above 0'),
    (Range(0, 1), 'between 0 and 1'),
    (Range(0, 1, without_high=True), '0 or more and below 1'),
    (Range(0, 1, without_low=True), 'above 0 and at most 1'),
    (Range(1, 2 ** 31 - 1), '1 or more, at most 2147483647'),
    (Range(1, 10 ** 8, whole=True), 'an integer between 1 and 100000000'),
])
def test_a_range_is_told_in_words(span: Range, text: str) -> None:
    assert str(span) == text


@pytest.mark.parametrize('flag', ['--loss-pos-weight', '--loss-class-weight'])
@pytest.mark.parametrize('value', ['nan,1', '1,inf', '-1,1', 'nan', 'inf', '-2'])
def test_weights_of_classes_are_finite_and_not_negative(flag: str, value: str) -> None:
    args = parse_args(create_train_parser(), ['--bce-loss', f'{flag}={value}'])
    with pytest.raises(UsageError, match='weight'):
        create_train_loss(args, num_classes=2)


@pytest.mark.parametrize(('text', 'reason'), [
    ('0\n-1\n', '-1 is none'), ('0\n10', '10 is none'), ('3\n3\n', 'twice'),
    ('\n', 'empty'), ('1.5\n', 'one class index per line')])
def test_valid_labels_are_different_classes_of_the_model(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / 'labels.txt'
    path.write_text(text)
    with pytest.raises(UsageError, match=reason):
        read_valid_labels(str(path), 10)
    path.write_text('9\n0\n')
    assert read_valid_labels(str(path), 10) == [9, 0]
