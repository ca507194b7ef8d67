"""The command lines: timm's flags under timm's names, our own, config files, and what is rejected early."""
import argparse
import json
import logging
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
)
from timm_distill.errors import UsageError

TIMM_FLAGS = Path(__file__).resolve().parents[2] / 'shared' / 'timm_flags.json'
PARSERS = {'train': create_train_parser, 'validate': create_validate_parser}

# Flags that differ from timm's on purpose, with the reason.
EXCEPTIONS = {
    '--device': 'without the flag the scripts take cuda where there is one and the CPU otherwise',
}
# timm's flags that neither script acts on yet, with the reason; a new one of timm's has to be added here or to args/.
LEFT_OUT = {
    'train': {
        'needs augmentation splits': ['aug_splits', 'jsd_loss', 'resplit', 'split_bn'],
        'replaced by --teacher, --kd and --kd-kwargs': [
            'kd_model_name', 'kd_distill_type', 'kd_loss_type', 'kd_temperature', 'kd_student_feature_dim',
            'kd_teacher_feature_dim', 'kd_token_distill_type'],
        'no effect in timm either': ['drop_connect'],
        'the loop never waits for the device, and writes no images': ['synchronize_step', 'save_images'],
        'no torchscript, fusers or device plugins': ['torchscript', 'fuser', 'device_modules'],
        'no wandb': ['log_wandb', 'wandb_project', 'wandb_tags', 'wandb_resume_id'],
        'no scheduled resolution': [
            'train_img_sizes', 'train_batch_sizes', 'train_size_probs', 'train_size_schedule',
            'train_size_schedule_spread', 'train_size_random_mix', 'train_batches_per_epoch',
            'variable_batch_loss_scale'],
        'no NaFlex': [
            'naflex_loader', 'naflex_train_seq_lens', 'naflex_max_seq_len', 'naflex_patch_sizes',
            'naflex_patch_size_probs', 'naflex_loss_scale', 'naflex_patchify_channels_first'],
    },
    'validate': {
        'one model on one device': ['num_gpu', 'retry'],
        'no torchscript, fusers or rewriting': ['torchscript', 'fuser', 'aot_autograd', 'reparam'],
        'ImageNet label sets': ['real_labels', 'valid_labels'],
        'other preprocessing and metrics': ['tf_preprocessing', 'crop_border_pixels', 'metrics_avg'],
        'no NaFlex': ['naflex_loader', 'naflex_max_seq_len'],
    },
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


def timm_flags(script: str) -> list:
    if not TIMM_FLAGS.exists():
        pytest.skip(f'no list of timm\'s flags at {TIMM_FLAGS}')
    return json.loads(TIMM_FLAGS.read_text())[script]


def describe(action: argparse.Action) -> dict:
    return {
        'dest': action.dest,
        'default': action.default,
        'type': type_name(action),
        'nargs': action.nargs,
        'choices': list(action.choices) if action.choices else None,
    }


@pytest.mark.parametrize('script', PARSERS)
def test_timm_flags_keep_name_default_type_and_choices(script):
    actions = {a.dest: a for a in PARSERS[script]()._actions}
    for flag in timm_flags(script):
        action = actions.get(flag['dest'])
        if action is None or flag['flags'][0] in EXCEPTIONS:
            continue
        assert set(flag['flags']) <= set(action.option_strings or [action.dest]), flag['flags']
        expected = {key: flag[key] for key in describe(action)}
        assert normalize(describe(action)) == normalize(expected), flag['flags']


@pytest.mark.parametrize('script', PARSERS)
def test_timm_flags_are_either_there_or_left_out_with_a_reason(script):
    ours = {a.dest for a in PARSERS[script]()._actions}
    left_out = [dest for dests in LEFT_OUT[script].values() for dest in dests]
    missing = [f['dest'] for f in timm_flags(script) if f['dest'] not in ours and f['dest'] not in left_out]
    assert not missing, f'add these flags to args/, or to LEFT_OUT here with the reason: {missing}'
    assert not ours & set(left_out), 'take flags that args/ has out of LEFT_OUT'


@pytest.mark.parametrize('script', PARSERS)
def test_every_flag_has_a_help_text(script):
    parser = PARSERS[script]()
    assert all(action.help for action in parser._actions), [a.dest for a in parser._actions if not a.help]
    assert 'usage' in parser.format_help()


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
        parse('--naflex-loader')
    assert exit_info.value.code == 2
    err = capsys.readouterr().err
    assert '--naflex-loader' in err
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
])
def test_impossible_settings_are_usage_errors_that_name_the_flag(argv, words):
    with pytest.raises(UsageError) as error:
        check_train_args(parse(*argv))
    assert words in str(error.value)
    assert '\n' not in str(error.value)


def test_defaults_pass_the_checks():
    check_train_args(parse())
    check_validate_args(parse_args(create_validate_parser(), []))


def test_ignored_teacher_warns(caplog):
    with caplog.at_level(logging.WARNING):
        check_train_args(parse('--teacher', 'resnet50', '--task-loss-weight', '0.5'))
    assert '--teacher, --task-loss-weight ignored' in caplog.text
