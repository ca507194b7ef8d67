"""Distillation methods: what of the teacher is matched. Each returns named, unweighted loss terms.

Each lives in one file of this package, which is imported when the names are first asked for.
"""
from typing import Any, List

from .base import METHODS, DistillMethod, register_method

__all__ = ['METHODS', 'DistillMethod', 'create_method', 'describe_methods', 'list_methods', 'register_method']


def list_methods() -> List[str]:
    """Return the names of all methods."""
    return METHODS.names()


def create_method(name: str, **options: Any) -> DistillMethod:
    """Create a method by name.

    Args:
        name: One of `list_methods()`.
        options: Options of the method.

    Raises:
        UsageError: If the name or an option is unknown or its value is not allowed.
    """
    return METHODS.create(name, **options)


def describe_methods() -> str:
    """Return a text that lists each method with its defaults, what it needs and its paper."""
    blocks = []
    for name in list_methods():
        entry = METHODS.get(name)
        defaults = ' '.join(f'{name}.{key}={value}' for key, value in entry.defaults.items()) or 'none'
        blocks.append('\n'.join([
            f'{name}: {entry.description}',
            f'    needs     {entry.cls.describe_needs()}',
            f'    defaults  {defaults}',
            f'    paper     {entry.cls.paper}',
        ]))
    return '\n\n'.join(blocks)
