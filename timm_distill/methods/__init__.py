"""Distillation methods: what of the teacher is matched. Each returns named, unweighted loss terms.

Each lives in one file of this package, which is imported when the names are first asked for. Other packages add methods
by entry points of the group `timm_distill.methods`, single files by `load_method_file`.
"""
import importlib.util
import os
import sys
from typing import Any, List

from ..errors import UsageError
from ..utils.ranges import OneOf, Range
from ._base import METHODS, DistillMethod, register_method
from ._composition import Recipe, create_by_name, methods_taken_by
from ._logits import LogitMethod
from ._presets import Preset, register_preset
from ._wrapper import WrapperMethod

__all__ = [
    'METHODS',
    'DistillMethod',
    'LogitMethod',
    'OneOf',
    'Preset',
    'Range',
    'Recipe',
    'WrapperMethod',
    'create_method',
    'describe_methods',
    'list_methods',
    'load_method_file',
    'register_method',
    'register_preset',
]


def list_methods() -> List[str]:
    """Return the names of all methods."""
    return METHODS.names()


def create_method(name: str, **options: Any) -> DistillMethod:
    """Create a method by name.

    Args:
        name: One of `list_methods()`, or of one that takes another and that, 'sdd:kd'.
        options: Options of the method; of one that is taken as `**{'kd.temperature': 2}` or `kd=dict(temperature=2)`.

    Raises:
        UsageError: If the name or an option is unknown or its value is not allowed.
    """
    return create_by_name(name, options)


def load_method_file(path: str) -> None:
    """Import a Python file that registers methods. A file that has been imported already is left as it is.

    Args:
        path: A file with classes under `@register_method`.

    Raises:
        UsageError: If it is missing, fails, or registers nothing.
    """
    name = 'timm_distill_method_file:' + os.path.realpath(path)
    if name in sys.modules:
        return
    known = list_methods()  # so that a name that is taken is the file's fault
    spec = importlib.util.spec_from_file_location(name, path) if path.endswith('.py') else None
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise UsageError(f'--kd-module {path} must be an existing Python file (.py).')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look the module up
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # whatever is wrong with the user's file
        del sys.modules[name]
        reason = f'{type(e).__name__}: {" ".join(str(e).split())}'
        raise UsageError(f'--kd-module {path} cannot be imported: {reason}') from e
    if list_methods() == known:
        raise UsageError(f"--kd-module {path} registers no method: put @register_method('name') above its class.")


def _describe_taken(name: str, cls: type) -> List[str]:
    """Return a line on the methods that a method takes."""
    if not issubclass(cls, WrapperMethod):
        return []
    first, *_ = taken = methods_taken_by(cls)
    return [f'    takes     one of {", ".join(taken)}: --kd {name}:{first}, with options {name}.{first}.OPTION']


def describe_methods() -> str:
    """Return a text that lists each method with its needs, options, paper and weight, and each preset."""
    blocks = []
    for name in list_methods():
        entry = METHODS.get(name)
        options = '\n              '.join(map(str, entry.options.values())) or 'none'
        blocks.append('\n'.join([
            f'{name}: {entry.description}',
            f'    needs     {entry.cls.describe_needs()}',
            *_describe_taken(name, entry.cls),
            f'    options   {options}',
            f'    paper     {entry.cls.paper}',
            f'    weight    {entry.cls.published_weight:g} (--kd-weight {name}={entry.cls.published_weight:g})'
            + (f', from: {entry.cls.weight_source}' if entry.cls.weight_source else ''),
        ]))
    blocks.append('Presets, published combinations under one name:')
    presets = {preset.name: preset for preset in METHODS.presets().values()}
    blocks += [presets[name].describe() for name in sorted(presets)]
    return '\n\n'.join(blocks)
