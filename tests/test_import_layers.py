"""Which file may import which: the layers of the package, read from the source without importing it."""
import ast
import re
from pathlib import Path
from typing import Iterator, List, Tuple

import pytest

REPO_DIR = Path(__file__).resolve().parent.parent
PACKAGE = 'timm_distill'
SCRIPTS = ('train_distill', 'validate')
# Programs that lie in the room that they are about, and use rooms above it.
PROGRAMS = (f'{PACKAGE}.cache.__main__',)

# A file imports only from rooms with a lower number, and from its own.
LAYERS = {
    'errors': 0,
    'utils': 1,
    'args': 2, 'features': 2, 'losses': 2, 'data': 2, 'checkpoint': 2, 'models': 2,
    'adapters': 3, 'cache': 3, 'methods': 3, 'engine': 3, 'export': 3, 'report': 3,
    'student': 4, 'teacher': 4,
    'task': 5,
    'factory': 6,
    'pair': 7,
    'run': 8,
    '__main__': 9, 'train_distill': 9, 'validate': 9,
}
# What the numbers would allow and the design does not: importer -> (imported names, reason).
FORBIDDEN = {
    'methods': (('args', 'engine', 'data', 'checkpoint'), 'a method knows no loop and no argparse'),
    'export': (('teacher',), 'exporting knows only the student'),
}
# Files inside these packages see only what is shared in their own package; the rest is found by discovery.
PLUGIN_PACKAGES = ('adapters', 'methods')


def module_name(path: Path) -> str:
    """Return the dotted name of a file; a package is its `__init__`: 'timm_distill.methods.__init__'."""
    return '.'.join(path.relative_to(REPO_DIR).with_suffix('').parts)


def iter_imports(module: str, source: str) -> Iterator[Tuple[int, str]]:
    """Yield line and absolute dotted name of every import in a file and of every use of argparse."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split('.')[:-node.level] if node.level else []
            base = '.'.join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f'{base}.{alias.name}') for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == 'argparse':
            yield node.lineno, f'argparse.{node.attr}'  # what counts is the use: a Namespace is only a type


def unit_of(name: str) -> str:
    """Return the layered unit of a dotted name: 'timm_distill.methods.kd.KD' is in 'methods'; '' is not ours."""
    parts = name.split('.')
    if name in PROGRAMS:
        return '__main__'
    if parts[0] in SCRIPTS:
        return parts[0]
    if parts[0] != PACKAGE:
        return ''
    return parts[1] if len(parts) > 1 else '__init__'


def find_violations(module: str, source: str) -> List[str]:
    """Return one message per import of `module` that breaks the layers."""
    unit = unit_of(module)
    if unit == '__init__':
        return []
    if unit not in LAYERS:
        return [
            f"'{unit}' ({module}) has no layer: give it one in LAYERS of {Path(__file__).name}, one above the "
            "highest that it imports, and list it in the layout tree."]
    messages = [(line, name, explain_import(module, name)) for line, name in iter_imports(module, source)]
    return [f'{module}, line {line}: imports {name}: {why}' for line, name, why in messages if why]


def explain_import(module: str, name: str) -> str:
    """Return why `module` must not import `name` and what to do, '' where it may."""
    importer, imported = unit_of(module), unit_of(name)
    if name.startswith('argparse.') and name != 'argparse.Namespace' and importer != 'args':
        return 'only args/ knows argparse; add the flag there.'
    if not imported:
        return ''
    if importer in SCRIPTS and imported not in LAYERS:
        return ''  # a script may use the public API of the package root
    if imported not in LAYERS:
        return 'the package root imports this file; import from the module that defines the name.'
    if importer == imported:
        return explain_plugin_import(module, name)
    if importer in FORBIDDEN and imported in FORBIDDEN[importer][0]:
        return f'{FORBIDDEN[importer][1]}; pass in what it needs.'
    if LAYERS[imported] >= LAYERS[importer]:
        return (
            f'{imported} is in layer {LAYERS[imported]}, {importer} in {LAYERS[importer]}, and imports only go '
            'down. Move what both need into a lower file, or pass it as an argument.')
    return ''


def explain_plugin_import(module: str, name: str) -> str:
    """Return why a file must not import `name` of its own package, '' where it may."""
    package, own, other = module.split('.')[1], *((*x.split('.'), '__init__')[2] for x in (module, name))
    if package not in PLUGIN_PACKAGES or own == '__init__' or own == other or is_shared(other) and own != 'base':
        return ''
    return (
        f'files of {package} import only what they share (base.py, _private files), never each other. Move what both '
        'need there, or into losses.py if it is math.')


def is_shared(name: str) -> bool:
    """Whether all files of a plugin package may import a file of it."""
    return name == 'base' or name.startswith('_') and name != '__init__'


def source_files() -> List[Path]:
    scripts = [REPO_DIR / f'{name}.py' for name in SCRIPTS]
    return sorted((REPO_DIR / PACKAGE).rglob('*.py')) + [path for path in scripts if path.exists()]


@pytest.mark.parametrize('path', source_files(), ids=module_name)
def test_file_imports_only_from_lower_layers(path: Path) -> None:
    violations = find_violations(module_name(path), path.read_text(encoding='utf-8'))
    assert not violations, '\n' + '\n'.join(violations)


@pytest.mark.parametrize('module, source', [
    ('timm_distill.task', 'from .methods import create_method'),
    ('timm_distill.task', 'from . import teacher'),
    ('timm_distill.methods.kd', 'from ..losses import kl_divergence\nfrom ._base import DistillMethod'),
    ('timm_distill.methods.__init__', 'from .base import METHODS\nfrom . import kd'),
    ('timm_distill.__init__', 'from .task import DistillTask'),
    ('timm_distill.args', 'import argparse\nargparse.ArgumentParser()'),
    ('validate', 'import argparse\ndef f(args: argparse.Namespace): pass'),
    ('train_distill', 'import timm_distill\nfrom timm_distill import __version__\nfrom timm_distill.task import X'),
    ('timm_distill.losses', 'import timm\nfrom timm.data import create_loader'),
])
def test_allowed_import_passes(module: str, source: str) -> None:
    assert find_violations(module, source) == []


@pytest.mark.parametrize('module, source, hint', [
    ('timm_distill.student.tap_search', 'from ..task import DistillTask', 'imports only go'),
    ('timm_distill.engine.train', 'from ..teacher import Teacher', 'imports only go'),
    ('timm_distill.engine.train', 'from .. import student', 'imports only go'),
    ('timm_distill.engine.train', 'def f():\n    import timm_distill.task', 'line 2'),
    ('timm_distill.task', 'from timm_distill import DistillTask', 'the package root'),
    ('timm_distill.task', 'from train_distill import main', 'imports only go'),
    ('timm_distill.methods.kd', 'from .norm import NORM', 'never each other'),
    ('timm_distill.methods.kd', 'from ..methods import norm', 'never each other'),
    ('timm_distill.methods._base', 'from .kd import KD', 'never each other'),
    ('timm_distill.methods.kd', 'from ..engine import evaluate', 'no loop'),
    ('timm_distill.methods.kd', 'import argparse\nargparse.ArgumentParser()', 'only args'),
    ('validate', 'from argparse import ArgumentParser', 'only args'),
    ('timm_distill.export', 'from .teacher import Teacher', 'only the student'),
    ('timm_distill.novelty', 'import torch', 'give it one in LAYERS'),
])
def test_wrong_import_is_named_with_what_to_do(module: str, source: str, hint: str) -> None:
    violations = find_violations(module, source)
    assert len(violations) == 1
    assert re.search(hint, violations[0])
