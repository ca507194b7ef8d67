"""Models that are not timm's, by name: a function of a Python file, or an architecture of torchvision.

A file is run because the user named it, never because a checkpoint does.
"""
import difflib
import hashlib
import importlib.util
import inspect
import os
import re
import sys
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, Mapping, Tuple

import torch.nn as nn
import torchvision
from timm.models import load_checkpoint

from ..errors import UsageError

_TORCHVISION = 'torchvision:'
_FUNCTION = re.compile(r'(?P<path>.*\.py):(?P<function>\w+)$', re.DOTALL)
# What timm's constructors take and a function need not; whether the model does it is looked at afterwards.
_OPTIONAL = ('num_classes', 'in_chans', 'img_size')
_SETTINGS = ('mean', 'std', 'size', 'interpolation', 'crop_pct')


def is_external(name: str) -> bool:
    """Whether a name stands for a model that timm does not build."""
    return name.startswith(_TORCHVISION) or is_code(name)


def is_code(name: str) -> bool:
    """Whether a name is that of a function in a file, `FILE.py:FUNCTION`."""
    return _FUNCTION.match(name) is not None


def code_digest(name: str) -> str:
    """Return the SHA-256 of the file with a model's code, '' for a model of a library."""
    match = _FUNCTION.match(name or '')
    if match is None or not os.path.isfile(match['path']):
        return ''
    with open(match['path'], 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()


def pretrained_classes(name: str) -> int:
    """Return the class count of the weights of an architecture of torchvision."""
    architecture, _, tag = name[len(_TORCHVISION):].partition('.')
    _check_architecture(architecture, name, 'teacher')
    return len(_find_weights(architecture, tag, name, 'teacher').meta['categories'])


def create_external(name: str, role: str, **kwargs: Any) -> nn.Module:
    """Create a model that is not timm's.

    It gets a `pretrained_cfg` with what is said of its input, as timm's models have it.

    Args:
        name: `FILE.py:FUNCTION`, whose function returns a module, or a pair of a module and a mapping with any of
            mean, std, size, interpolation and crop_pct; or `torchvision:NAME`, `torchvision:NAME.WEIGHTS`.
        role: What it is for, by the flag that named it.
        kwargs: Arguments of timm's constructors. A function gets those that it takes.

    Raises:
        UsageError: If there is no such file, function or architecture, or it gives no module.
    """
    # what timm's flags leave at nothing asks for nothing
    kwargs = {key: value for key, value in kwargs.items() if value or key == 'num_classes' and value is not None}
    checkpoint = kwargs.pop('checkpoint_path', '')
    if kwargs.pop('pretrained_cfg_overlay', None):
        raise UsageError(f"--pretrained-path is for timm's models: {name} takes weights by --initial-checkpoint.")
    create = _call_function if is_code(name) else _create_torchvision
    model, config = create(name, role, kwargs)
    described: Any = model
    described.pretrained_cfg = {**(getattr(model, 'pretrained_cfg', None) or {}), **config}
    if checkpoint:
        try:
            load_checkpoint(model, checkpoint)
        except (RuntimeError, OSError, ValueError) as e:
            raise UsageError(
                f'--initial-checkpoint {checkpoint} does not fit {name}: {" ".join(str(e).split())[:300]}') from e
    return model


def _call_function(name: str, role: str, kwargs: Dict[str, Any]) -> Tuple[nn.Module, Dict[str, Any]]:
    match = _FUNCTION.match(name)
    assert match is not None
    function = _load_function(match['path'], match['function'], role)
    if role == 'teacher' and not _takes(function, 'pretrained'):
        kwargs.pop('pretrained', None)  # it comes as the function gives it
    refused = [key for key in kwargs if key not in _OPTIONAL and not _takes(function, key)]
    if refused:
        raise UsageError(
            f'--{role} {name}: the function takes no {", ".join(refused)}: leave the flag out, or add the argument.')
    with _folder_on_path(match['path']):
        try:
            result = function(**{key: value for key, value in kwargs.items() if _takes(function, key)})
        except Exception as e:  # the user's code
            reason = ' '.join(str(e).split())[:300]
            raise UsageError(f'--{role} {name}: the function fails: {type(e).__name__}: {reason}') from e
    model, settings = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(model, nn.Module) or not isinstance(settings, Mapping):
        raise UsageError(
            f'--{role} {name}: the function returns a {type(result).__name__}: it has to be a torch.nn.Module, or a '
            f'module and a mapping with any of {", ".join(_SETTINGS)}.')
    return model, _read_settings(settings, name, role)


def _read_settings(settings: Mapping[str, Any], name: str, role: str) -> Dict[str, Any]:
    """Return what a function says of its model's input, under timm's names."""
    unknown = [str(key) for key in settings if key not in _SETTINGS]
    if unknown:
        raise UsageError(
            f'--{role} {name}: the function says {", ".join(unknown)} of its model, which is none of '
            f'{", ".join(_SETTINGS)}.')
    config = {key: value for key, value in settings.items() if key != 'size'}
    size = settings.get('size')
    if size is not None:
        sides = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        config.update(input_size=(len(tuple(config.get('mean', (0, 0, 0)))), *sides), fixed_input_size=True)
    return config


def _load_function(path: str, function: str, role: str) -> Callable[..., Any]:
    if not os.path.isfile(path):
        raise UsageError(f'--{role} {path}:{function}: there is no file {path}.')
    name = 'timm_distill_model_file:' + os.path.realpath(path)
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # a .py file
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickle look the module up
        with _folder_on_path(path):
            try:
                spec.loader.exec_module(module)
            except Exception as e:  # whatever is wrong with the user's file
                del sys.modules[name]
                reason = ' '.join(str(e).split())[:300]
                raise UsageError(f'--{role} {path} cannot be imported: {type(e).__name__}: {reason}') from e
    found = getattr(sys.modules[name], function, None)
    if callable(found):
        return found
    known = [key for key, value in vars(sys.modules[name]).items() if callable(value) and key[:1] != '_']
    raise UsageError(f'--{role} {path}:{function}: the file has no such function, it has {", ".join(known) or "none"}.')


@contextmanager
def _folder_on_path(path: str) -> Iterator[None]:
    """Let a file import those beside it, as a script can."""
    folder = os.path.dirname(os.path.realpath(path))
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _takes(function: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # built in
        return True
    return name in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())


def _create_torchvision(name: str, role: str, kwargs: Dict[str, Any]) -> Tuple[nn.Module, Dict[str, Any]]:
    architecture, _, tag = name[len(_TORCHVISION):].partition('.')
    _check_architecture(architecture, name, role)
    if kwargs.pop('in_chans', 3) != 3:
        raise UsageError(f"--{role} {name}: torchvision's models take images of 3 channels: leave out --in-chans.")
    weights = _find_weights(architecture, tag, name, role)
    pretrained = kwargs.pop('pretrained', False)
    try:
        model = torchvision.models.get_model(architecture, weights=None, **kwargs)
    except Exception as e:  # each constructor checks its arguments in its own way
        reason = ' '.join(str(e).split())[:300]
        raise UsageError(f'--{role} {name} cannot be built: {type(e).__name__}: {reason}') from e
    if pretrained:
        _load_weights(model, weights, name, role)
    return model, _describe_weights(weights)


def _check_architecture(architecture: str, name: str, role: str) -> None:
    known = torchvision.models.list_models(module=torchvision.models)
    if architecture not in known:
        similar = ', '.join(difflib.get_close_matches(architecture, known)) or 'none'
        raise UsageError(f'--{role} {name}: torchvision has no such classifier; similar ones: {similar}.')


def _find_weights(architecture: str, tag: str, name: str, role: str) -> Any:
    weights = torchvision.models.get_model_weights(architecture)
    if tag and tag not in weights.__members__:
        raise UsageError(f'--{role} {name}: the weights of {architecture} are {", ".join(weights.__members__)}.')
    return weights[tag] if tag else weights.DEFAULT


def _load_weights(model: nn.Module, weights: Any, name: str, role: str) -> None:
    """Load weights; a classifier of another class count stays as it was built."""
    try:
        state_dict = weights.get_state_dict(progress=False, check_hash=True)
    except Exception as e:  # no connection, no disk
        reason = ' '.join(str(e).split())[:300]
        raise UsageError(
            f'--{role} {name}: its weights cannot be loaded ({type(e).__name__}: {reason}): give --teacher-checkpoint '
            'or --initial-checkpoint FILE.') from e
    own = model.state_dict()
    fitting = {key: value for key, value in state_dict.items() if key not in own or own[key].shape == value.shape}
    model.load_state_dict({**{key: own[key] for key in state_dict.keys() - fitting.keys()}, **fitting})


def _describe_weights(weights: Any) -> Dict[str, Any]:
    """Return what weights say of their input, under timm's names."""
    transform = weights.transforms()
    crop, resize = transform.crop_size[0], transform.resize_size[0]
    return dict(
        input_size=(3, crop, crop), mean=tuple(transform.mean), std=tuple(transform.std),
        interpolation=transform.interpolation.value, crop_pct=crop / resize)
