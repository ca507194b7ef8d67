"""The command lines: timm's flags under timm's names, our own, config files, and what is rejected early."""
import argparse
import json
import logging
import sys
import types
from pathlib import Path

import pytest
import yaml
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import nn

from timm_distill.args import (
    args_to_yaml,
    check_train_args,
    check_validate_args,
    create_train_parser,
    create_validate_parser,
    parse_args,
    translate_timm_distillation,
)
from timm_distill.errors import UsageError

TIMM_FLAGS = json.loads((Path(__file__).parent / 'timm_flags.json').read_text())
PARSERS = {'train': create_train_parser, 'validate': create_validate_parser}

# Flags that differ from timm's on purpose, with the reason.
EXCEPTIONS = {
    '--device': 'without the flag the scripts take cuda where there is one and the CPU otherwise',
}
# timm's flags that are understood and refused: how to ask for them, and a word of the reason.
REFUSED = {
    'torchscript': (['--torchscript'], 'plain timm model'),
}


def parse(*argv: str) -> argparse.Namespace:
    return parse_args(create_train_parser(), argv)


def write_config(tmp_path: Path, **values: object) -> str:
    path = tmp_path / 'config.yaml'
    path.write_text(yaml.safe_dump(values))
    return str(path)


def type_name(action: argparse.Action) -> object:
    return getattr(action.type, '__name__', None)


def normalize(description: dict) -> dict:
    return {**description, 'type': description['type'] or 'str'}  # argparse's default is text


def describe(action: argparse.Action) -> dict:
    return {
        'dest': action.dest,
        'default': action.default,
        'type': type_name(action),
        'nargs': action.nargs,
        'choices': list(action.choices) if action.choices else None,
    }


@pytest.mark.parametrize('script', PARSERS)
def test_every_flag_of_timm_is_there(script):
    ours = {a.dest for a in PARSERS[script]()._actions}
    missing = [flag['flags'] for flag in TIMM_FLAGS[script] if flag['dest'] not in ours]
    assert not missing, f'add these flags of timm to args/, with its default and meaning: {missing}'


@pytest.mark.parametrize('script', PARSERS)
def test_timm_flags_keep_name_default_type_and_choices(script):
    actions = {a.dest: a for a in PARSERS[script]()._actions}
    for flag in TIMM_FLAGS[script]:
        if flag['flags'][0] in EXCEPTIONS:
            continue
        action = actions[flag['dest']]
        assert set(flag['flags']) <= set(action.option_strings or [action.dest]), flag['flags']
        expected = {key: flag[key] for key in describe(action)}
        assert normalize(describe(action)) == normalize(expected), flag['flags']


def test_frozen_list_holds_all_flags_of_timms_scripts():
    assert [len(TIMM_FLAGS[script]) for script in PARSERS] == [172, 57]


@pytest.mark.parametrize('name', REFUSED)
def test_refused_flag_says_why_in_one_line(name):
    argv, reason = REFUSED[name]
    assert name in {flag['dest'] for flag in TIMM_FLAGS['train']}
    with pytest.raises(UsageError, match=reason) as error:
        check_train_args(parse(*argv))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('script', PARSERS)
def test_every_flag_has_a_help_text(script):
    parser = PARSERS[script]()
    assert all(action.help for action in parser._actions), [a.dest for a in parser._actions if not a.help]
    assert 'usage' in parser.format_help()


@pytest.mark.parametrize('script', PARSERS)
def test_help_is_short_and_names_every_flag_under_a_topic(script, capsys):
    parser = PARSERS[script]()
    with pytest.raises(SystemExit) as exit_info:
        parse_args(parser, ['--help'])
    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 80
    missing = [
        a.dest for a in parser._actions if a.dest not in ('help', 'config', 'data')
        and not any(name in out for name in a.option_strings)]
    assert not missing


def test_help_of_a_topic_explains_its_flags_alone(capsys):
    with pytest.raises(SystemExit):
        parse('-h', 'kd')
    out = capsys.readouterr().out
    assert '--teacher-checkpoint' in out
    assert 'instead of pretrained ones' in out
    assert '--epochs' not in out
    with pytest.raises(SystemExit) as exit_info:
        parse('-h', 'dataset')
    assert exit_info.value.code == 2
    assert "no topic 'dataset'" in capsys.readouterr().err


def test_completion_is_offered_where_argcomplete_is_installed(monkeypatch):
    parsers = []
    monkeypatch.setitem(sys.modules, 'argcomplete', types.SimpleNamespace(autocomplete=parsers.append))
    parse()
    assert len(parsers) == 1


def test_student_is_another_name_of_model():
    assert parse('--student', 'test_vit').model == parse('--model', 'test_vit').model == 'test_vit'


def test_issue_command_line_is_understood():
    args = parse(
        '--data-dir', 'x', '--teacher', 'resnet50', '--student', 'mobilenetv2_100', '--kd', 'norm+kd',
        '--kd-weight', 'norm=1', 'kd=0.5', '--kd-kwargs', 'norm.segments=8', 'kd.temperature=4.', 'norm.schedule=[1,2]',
        'norm.kind=imagenet')
    check_train_args(args)
    assert args.kd == 'norm+kd'
    assert args.kd_weight == {'norm': 1, 'kd': 0.5}
    assert args.kd_kwargs == {
        'norm.segments': 8, 'kd.temperature': 4., 'norm.schedule': [1, 2], 'norm.kind': 'imagenet'}
    assert args.teacher_pretrained is True
    assert args.teacher_eval is None


def test_timm_optimizer_and_scheduler_factories_take_our_arguments():
    args = parse('--opt', 'lookahead_adamw', '--lr', '0.1', '--sched', 'step', '--decay-epochs', '2', '--epochs', '4')
    check_train_args(args)
    optimizer = create_optimizer_v2(nn.Linear(2, 2), **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    _, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=1)
    assert num_epochs == 4


@pytest.mark.parametrize('item', ['segments', '=8'])
def test_item_that_is_not_key_value_exits_with_2_and_is_named(item, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse('--kd-kwargs', item)
    assert exit_info.value.code == 2
    assert f"'{item}' is not of the form key=value" in capsys.readouterr().err


def test_unknown_flag_exits_with_2_in_one_line(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse('--no-such-flag')
    assert exit_info.value.code == 2
    err = capsys.readouterr().err
    assert '--no-such-flag' in err
    assert err.count('\n') == 1


def test_config_sets_defaults_and_command_line_wins(tmp_path):
    config = write_config(
        tmp_path, batch_size=8, lr='1e-3', amp=True, scale=[0.5, 1], student='test_vit', data='folder',
        teacher_pretrained=False, kd_weight={'norm': 2})
    args = parse('-c', config, '-b', '16')
    assert (args.batch_size, args.lr, args.amp, args.model) == (16, 1e-3, True, 'test_vit')
    assert (args.scale, args.data, args.teacher_pretrained) == ([0.5, 1.], 'folder', False)
    assert args.kd_weight == {'norm': 2}
    assert not hasattr(args, 'config')


def test_args_yaml_reads_back_to_the_same_arguments(tmp_path):
    args = parse(
        '--student', 'test_vit', '--lr', '1e-5', '--kd-kwargs', 'norm.segments=4', 'norm.schedule=(1,2)',
        '--torchcompile', '--input-size', '3', '32', '32', '--mean', '0.5', '--no-teacher-eval', '--experiment', '001')
    path = tmp_path / 'args.yaml'
    path.write_text(args_to_yaml(args))
    again = parse('--config', str(path))
    assert again.kd_kwargs.pop('norm.schedule') == list(args.kd_kwargs.pop('norm.schedule'))  # YAML has no tuples
    assert again == args


def test_validate_args_read_back_to_the_same_arguments(tmp_path):
    args = parse_args(create_validate_parser(), ['-m', 'test_vit', '--use-ema'])
    (tmp_path / 'args.yaml').write_text(args_to_yaml(args))
    assert parse_args(create_validate_parser(), ['-c', str(tmp_path / 'args.yaml')]) == args
    check_validate_args(args)


def test_unknown_config_key_is_an_error_with_the_closest_valid_ones(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse('-c', write_config(tmp_path, batchsize=8, teecher='resnet50'))
    assert exit_info.value.code == 2
    err = capsys.readouterr().err
    assert "'batchsize' (closest: batch_size" in err
    assert "'teecher' (closest: teacher" in err


@pytest.mark.parametrize(('key', 'value', 'words'), [
    ('amp', 'yes', 'true or false'),
    ('no_prefetcher', 1, 'true or false'),
    ('epochs', 1.5, 'a whole number'),
    ('epochs', None, 'a whole number'),
    ('epochs', True, 'a whole number'),
    ('lr', 'fast', 'a number'),
    ('scale', 0.5, 'a list'),
    ('scale', ['a'], 'a number'),
    ('input_size', [3, 32], 'a list of 3 values'),
    ('kd_weight', 'norm=1', 'a mapping'),
    ('kd_tap', 'stem', 'one of auto, features, pre_logits'),
    ('model', ['a'], 'text'),
])
def test_config_value_of_a_wrong_type_is_an_error(tmp_path, capsys, key, value, words):
    with pytest.raises(SystemExit) as exit_info:
        parse('-c', write_config(tmp_path, **{key: value}))
    assert exit_info.value.code == 2
    assert f'{key} must be {words}' in capsys.readouterr().err


@pytest.mark.parametrize('text', [None, 'a: [', '- a\n- b\n', ''])
def test_config_that_cannot_be_read_is_an_error_that_names_it(tmp_path, capsys, text):
    path = tmp_path / 'config.yaml'
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as exit_info:
        parse('-c', str(path))
    assert exit_info.value.code == 2
    err = capsys.readouterr().err
    assert str(path) in err
    assert err.count('\n') == 1


def test_config_cannot_run_code(tmp_path):
    path = tmp_path / 'config.yaml'
    path.write_text('model: !!python/object/apply:os.getcwd []\n')
    with pytest.raises(SystemExit):
        parse('-c', str(path))


@pytest.mark.parametrize(('argv', 'words'), [
    (['--amp-dtype', 'float8'], "--amp-dtype 'float8' must be one of 'float16', 'bfloat16'"),
    (['--model-dtype', 'half'], '--model-dtype'),
    (['--model-dtype', 'bfloat16', '--amp'], '--model-dtype bfloat16 does not go with --amp'),
    (['--kd', 'norm'], '--teacher'),
    (['--batch-size', '0'], '--batch-size 0 must be 1 or more'),
    (['--epochs', '0'], '--epochs 0'),
    (['--mixup', '-0.1'], '--mixup -0.1'),
    (['--cutmix', '-1'], '--cutmix'),
    (['--cutmix', 'nan'], '--cutmix'),
    (['--mixup', '0.2', '-b', '3'], '--batch-size 3 must be even'),
    (['--cutmix-minmax', '0.2'], '--cutmix-minmax'),
    (['--hflip', '2'], '--hflip'),
    (['--scale', '1', '0.5'], '--scale'),
    (['--aa', 'random'], '--aa'),
    (['--opt', 'adamm'], 'adam'),
    (['--sched', 'cosin'], '--sched'),
    (['--mean', '0.5', '0.5'], '--mean'),
    (['--bce-sum'], '--bce-loss'),
    (['--interpolation', 'cubic'], '--interpolation'),
    (['--aug-splits', '1'], '--aug-splits 1'),
    (['--aug-splits', '2', '--mixup', '0.1'], '--mixup'),
    (['--aug-splits', '2', '--no-prefetcher'], '--no-prefetcher'),
    (['--jsd-loss'], '--aug-splits 2'),
    (['--split-bn'], '--resplit'),
    (['--split-bn', '--resplit', '--sync-bn'], '--sync-bn'),
    (['--naflex-loader', '--train-img-sizes', '32'], '--train-img-sizes'),
    (['--naflex-loader', '--kd', 'norm', '--teacher', 'resnet50'], '--kd norm works without it'),
    (['--naflex-loader', '--naflex-patch-sizes', '8', '--naflex-patch-size-probs', '0.5', '0.5'], '2 values for 1'),
    (['--train-img-sizes', '24', '32', '--train-batch-sizes', '8'], '1 values for 2'),
    (['--train-img-sizes', '24', '--use-multi-epochs-loader'], '--use-multi-epochs-loader'),
    (['--sched', 'plateau', '--sched-on-updates'], '--sched-on-updates'),
    (['--stop-epoch', '5', '--epochs', '3'], '--stop-epoch 5'),
    (['--save-epochs', '0'], '--save-epochs 0'),
    (['--wandb-resume-id', 'x'], '--resume'),
    (['--target-format', 'multihot'], '--task multilabel'),
    (['--bce-loss', '--loss', 'asl'], '--bce-loss contradicts'),
    (['--eval-metric', 'map'], '--eval-metric'),
    (['--task', 'multilabel', '--eval-metric', 'top1'], 'map, micro_f1'),
    (['--fuser', 'old2'], '--fuser'),
])
def test_impossible_settings_are_usage_errors_that_name_the_flag(argv, words):
    with pytest.raises(UsageError) as error:
        check_train_args(parse(*argv))
    assert words in str(error.value)
    assert '\n' not in str(error.value)


def test_defaults_pass_the_checks():
    check_train_args(parse())
    check_validate_args(parse_args(create_validate_parser(), []))


def test_a_teacher_that_is_ignored_on_purpose_warns(caplog):
    with caplog.at_level(logging.WARNING):
        check_train_args(parse('--teacher', 'resnet50', '--task-loss-weight', '0.5', '--kd', 'none'))
    assert '--teacher, --task-loss-weight ignored' in caplog.text


def test_multilabel_has_timms_defaults_unless_others_are_given(tmp_path):
    args = parse('--task', 'multilabel')
    assert (args.smoothing, args.eval_metric) == (0., 'map')
    check_train_args(args)
    assert parse('--task', 'multilabel', '--smoothing', '0.2').smoothing == 0.2
    config = write_config(tmp_path, task='multilabel', eval_metric='loss')
    args = parse('-c', config)
    assert (args.smoothing, args.eval_metric) == (0., 'loss')
    validate_args = parse_args(create_validate_parser(), ['--task', 'multilabel'])
    check_validate_args(validate_args)


METHODS = ['kd', 'norm', 'token']


def test_timms_distillation_flags_become_ours():
    args = parse('--kd-model-name', 'resnet50', '--kd-temperature', '2', '--task-loss-weight', '0.3')
    translate_timm_distillation(args, METHODS)
    assert (args.teacher, args.kd, args.kd_kwargs) == ('resnet50', 'kd', {'kd.temperature': 2.})
    assert (args.task_loss_weight, args.distill_loss_weight) == (0.3, 0.7)
    args = parse('--kd-model-name', 'resnet50', '--kd-distill-type', 'token', '--kd-token-distill-type', 'hard')
    translate_timm_distillation(args, METHODS)
    assert (args.kd, args.kd_kwargs) == ('token', {'token.hard': True, 'token.temperature': 4.})
    untouched = parse('--teacher', 'resnet50', '--kd', 'norm')
    translate_timm_distillation(untouched, METHODS)
    assert untouched == parse('--teacher', 'resnet50', '--kd', 'norm')


def test_translated_flags_read_back_from_the_run_s_args_yaml(tmp_path):
    args = parse('--kd-model-name', 'resnet50')
    translate_timm_distillation(args, METHODS)
    (tmp_path / 'args.yaml').write_text(args_to_yaml(args))
    again = parse('-c', str(tmp_path / 'args.yaml'))
    translate_timm_distillation(again, METHODS)
    assert again == args


@pytest.mark.parametrize(('argv', 'words'), [
    (['--teacher', 'resnet18'], 'two teachers'),
    (['--kd', 'norm'], '--kd-distill-type'),
    (['--kd', 'none'], '--kd-distill-type'),
    (['--task-loss-weight', '1.5'], '--distill-loss-weight'),
    (['--kd-loss-type', 'mse'], 'kl alone'),
    (['--kd-distill-type', 'feature'], 'kd, norm, token'),
])
def test_timms_distillation_flags_that_cannot_be_followed_are_usage_errors(argv, words):
    with pytest.raises(UsageError, match=words):
        translate_timm_distillation(parse('--kd-model-name', 'resnet50', *argv), METHODS)


@pytest.mark.parametrize(('argv', 'weight'), [
    ([], None),
    (['--task-loss-weight', '0.3', '--distill-loss-weight', '2'], 2.),
    (['--task-loss-weight', '0.3', '--kd-weight', 'kd=4'], None),
])
def test_timms_complement_is_taken_only_where_the_label_weight_alone_is_given(argv, weight):
    args = parse('--kd-model-name', 'resnet50', *argv)
    translate_timm_distillation(args, METHODS)
    assert args.distill_loss_weight == weight


def test_our_flags_have_no_complement():
    args = parse('--teacher', 'resnet50', '--kd', 'kd', '--task-loss-weight', '0.3')
    translate_timm_distillation(args, METHODS)
    check_train_args(args, METHODS)
    assert args.distill_loss_weight is None


@pytest.mark.parametrize('argv', [
    ['--teacher', 'no_such_model'], ['--teacher-checkpoint', 'no-such-file'], ['--teacher', 'resnet50', '--dry-run']])
def test_a_teacher_without_a_method_is_an_error_that_lists_the_methods(argv):
    with pytest.raises(UsageError, match='without --kd: .*kd, norm, token.*--kd none') as error:
        check_train_args(parse(*argv), METHODS)
    assert argv[1] in str(error.value)
    check_train_args(parse(*argv, '--kd', 'none'), METHODS)


def test_no_method_and_no_teacher_train_the_student_alone(tmp_path):
    args = parse()
    check_train_args(args, METHODS)
    assert args.kd == 'none'
    check_train_args(parse('--teacher', 'resnet50', '-c', write_config(tmp_path, kd='none')), METHODS)


def test_timms_distillation_flags_without_a_teacher_are_ignored_with_a_warning(caplog):
    translate_timm_distillation(parse('--kd-temperature', '2'), METHODS)
    assert '--kd-temperature ignored' in caplog.text


def test_flags_without_effect_warn(caplog):
    check_train_args(parse('--drop-connect', '0.1', '--resplit', '--train-batch-sizes', '8'))
    assert '--drop-connect has no effect, as in timm: use --drop-path' in caplog.text
    assert '--resplit has no effect without --reprob' in caplog.text
    assert '--train-batch-sizes has no effect without --train-img-sizes' in caplog.text


@pytest.mark.parametrize('name', [
    'data_dir', 'train_split', 'class_map', 'output', 'experiment', 'resume', 'teacher', 'teacher_checkpoint',
    'student', 'initial_checkpoint', 'nd_class_means', 'demo_dir', 'kd_module'])
@pytest.mark.parametrize('value', ['a\0b', 300 * 'x', '/'.join(5000 * 'x')])
def test_name_that_no_file_system_takes_is_one_message(
        tmp_path: Path, capsys: pytest.CaptureFixture, name: str, value: str) -> None:
    given = [value] if name == 'kd_module' else value
    (tmp_path / 'config.yaml').write_text(yaml.safe_dump({name: given}))
    for argv in (['--config', str(tmp_path / 'config.yaml')], ['--' + name.replace('_', '-'), value]):
        with pytest.raises(SystemExit) as error:
            parse_args(create_train_parser(), argv)
        message = capsys.readouterr().err
        assert error.value.code == 2 and message.count('\n') == 1
        flag = '--model' if name == 'student' else '--' + name.replace('_', '-')
        assert flag in message and ('NUL' in message or 'too long' in message)


@pytest.mark.parametrize('value', ['a\0b', 300 * 'x'])
def test_config_of_such_a_name_is_one_message(capsys: pytest.CaptureFixture, value: str) -> None:
    with pytest.raises(SystemExit):
        parse_args(create_train_parser(), ['--config', value])
    assert 'cannot read --config' in capsys.readouterr().err


def test_addresses_and_texts_may_be_long() -> None:
    address = 'https://example.org/' + 300 * 'x'
    args = parse_args(create_train_parser(), ['--teacher-checkpoint', address, '--wandb-project', 300 * 'x'])
    assert args.teacher_checkpoint == address
