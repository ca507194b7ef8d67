"""Parsing a command line over the values of a `--config` file, and writing such a file."""
import argparse
import difflib
import re
from typing import Any, Dict, Iterable, Mapping, Optional, Sequence

import yaml
from timm.utils import ParseKwargs

from .per_teacher import StorePerTeacher, StoreTeachers

# Defaults that differ for multi-label targets, as in timm.
_MULTILABEL_DEFAULTS = {'smoothing': 0., 'eval_metric': 'map'}

# Flags that become the name of a file or a folder, and what the usual file systems take.
_PATHS = frozenset({
    'data', 'data_dir', 'train_split', 'val_split', 'split', 'class_map', 'class_stats', 'output', 'experiment',
    'resume', 'teacher', 'teacher_checkpoint', 'model', 'initial_checkpoint', 'pretrained_path', 'checkpoint',
    'nd_class_means', 'kd_module', 'demo_dir', 'results_file', 'valid_labels', 'real_labels', 'teacher_classes',
})
_NAME_BYTES, _PATH_BYTES = 255, 4095


def parse_args(parser: argparse.ArgumentParser, argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse a command line; a `--config` file replaces the parser's defaults first.

    Args:
        parser: A newly created parser; its defaults are changed where there is a config file.
        argv: Arguments without the program's name, `sys.argv[1:]` if None.
    """
    _complete(parser)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f'unrecognized arguments: {" ".join(unknown)}')
    config: Dict[str, Any] = {}
    if hasattr(args, 'config'):
        config = _read_config(parser, args.config)
        args = _reparse(parser, argv, config)
    if args.task == 'multilabel':
        known = {name: value for name, value in _MULTILABEL_DEFAULTS.items() if hasattr(args, name)}
        args = _reparse(parser, argv, {**known, **config})
    _check_names(parser, args)
    return args


def _check_names(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Reject names that no file system takes, before each of their users fails on them in its own way."""
    for name, value in vars(args).items():
        texts = value.values() if isinstance(value, dict) and name in _PATHS else value
        for text in texts if not isinstance(texts, str) and isinstance(texts, Iterable) else [texts]:
            if not isinstance(text, str):
                continue
            flag = '--' + name.replace('_', '-')
            if '\0' in text:
                parser.error(f'{flag} {text!r} holds a NUL character, which no name can')
            longest = max(len(part.encode(errors='surrogatepass')) for part in re.split(r'[/\\]', text))
            if name in _PATHS and '://' not in text and (longest > _NAME_BYTES or len(text) > _PATH_BYTES):
                parser.error(
                    f'{flag} {text[:40]!r}... is too long for a file system: a path has at most {_PATH_BYTES} '
                    f'letters and a name in it {_NAME_BYTES} bytes, here {len(text)} and {longest}')


def _reparse(
        parser: argparse.ArgumentParser,
        argv: Optional[Sequence[str]],
        defaults: Mapping[str, Any],
) -> argparse.Namespace:
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if hasattr(args, 'config'):
        del args.config
    return args


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks for completions, where argcomplete is installed."""
    try:
        import argcomplete
    except ImportError:
        return
    argcomplete.autocomplete(parser)


def args_to_yaml(args: argparse.Namespace) -> str:
    """YAML text that `--config` reads back to the same arguments. Call it before anything is added to `args`."""
    return yaml.safe_dump(vars(args), default_flow_style=False)


def _read_config(parser: argparse.ArgumentParser, path: str) -> Dict[str, Any]:
    """Values of a YAML file by argument name, each checked against its flag."""
    try:
        with open(path, encoding='utf-8') as f:
            config = yaml.safe_load(f)
    except (OSError, ValueError, yaml.YAMLError) as error:  # also for names with NUL and for text that is no UTF-8
        parser.error(f'cannot read --config {path}: {" ".join(str(error).split())}')
    if not isinstance(config, dict):
        parser.error(f'--config {path} must hold lines of the form name: value')
    actions = _config_actions(parser)
    unknown = [str(key) for key in config if key not in actions]
    if unknown:
        parser.error(f'unknown keys in --config {path}: {", ".join(_with_closest(k, actions) for k in unknown)}')
    return {actions[key].dest: _config_value(parser, actions[key], key, value) for key, value in config.items()}


def _config_actions(parser: argparse.ArgumentParser) -> Dict[str, argparse.Action]:
    """Every key that a config file may hold: each argument's name, and its other long flags (`student`)."""
    actions: Dict[str, argparse.Action] = {}
    for action in parser._actions:  # argparse has no public list
        if action.dest in ('help', 'config'):
            continue
        if action.nargs != 0:  # the second flag of a switch is its opposite
            actions.update({o[2:].replace('-', '_'): action for o in action.option_strings if o.startswith('--')})
        actions[action.dest] = action
    return actions


def _with_closest(key: str, valid: Dict[str, argparse.Action]) -> str:
    closest = difflib.get_close_matches(key.replace('-', '_'), list(valid), n=3)
    return f"'{key}' (closest: {', '.join(closest)})" if closest else f"'{key}'"


def _config_value(parser: argparse.ArgumentParser, action: argparse.Action, key: str, value: Any) -> Any:
    """Check and convert one value of a config file, which argparse does only for text."""
    if value is None and action.default is None:
        return None
    if isinstance(action, StorePerTeacher):
        return _config_per_teacher(parser, action, key, value)
    if action.nargs == 0:
        valid, words = isinstance(value, bool), 'true or false'
    elif isinstance(action, ParseKwargs):
        valid, words = isinstance(value, dict), 'a mapping'
    elif action.nargs == '+' or isinstance(action.nargs, int):
        length = action.nargs if isinstance(action.nargs, int) else None
        valid, words = isinstance(value, list) and length in (None, len(value)), f'a list of {length or "some"} values'
        if valid:
            return [_config_scalar(parser, action, key, item) for item in value]
    else:
        return _config_scalar(parser, action, key, value)
    if not valid:
        parser.error(f'--config: {key} must be {words}, got {value!r}')
    return value


def _config_per_teacher(parser: argparse.ArgumentParser, action: StorePerTeacher, key: str, value: Any) -> Any:
    """Return a value for all teachers, a list of numbers where it is one, or a mapping by the teachers' names."""
    def _convert(item: Any) -> Any:
        if action.many and isinstance(item, list):
            return [_config_scalar(parser, action, key, number) for number in item]
        return _config_scalar(parser, action, key, item)

    if isinstance(action, StoreTeachers) and isinstance(value, dict):
        return [f'{name}={_convert(item)}' for name, item in value.items()]
    if isinstance(action, StoreTeachers) and isinstance(value, list):
        return [_convert(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _convert(item) for name, item in value.items()}
    if action.many and not isinstance(value, list):
        parser.error(f'--config: {key} must be a list of some values, got {value!r}')
    return _convert(value)


def _config_scalar(parser: argparse.ArgumentParser, action: argparse.Action, key: str, value: Any) -> Any:
    kind: Any = action.type or str
    valid = isinstance(value, (int, float, str)) and not isinstance(value, bool)
    if valid:
        try:
            converted = kind(value)  # text too: YAML reads 1e-5, for want of a point, as text
            valid = kind is not int or isinstance(value, str) or converted == value
        except (ValueError, OverflowError):
            valid = False
    if not valid:
        words = {int: 'a whole number', float: 'a number'}.get(kind, 'text')
        parser.error(f'--config: {key} must be {words}, got {value!r}')
    if action.choices is not None and converted not in action.choices:
        parser.error(f'--config: {key} must be one of {", ".join(map(str, action.choices))}, got {value!r}')
    return converted
