"""Private names of torch and timm stand in one file."""
import ast
from pathlib import Path
from typing import Iterator, List, Set, Tuple

import pytest

REPO_DIR = Path(__file__).resolve().parent.parent.parent
COMPAT = REPO_DIR / 'timm_distill' / 'utils' / '_compat.py'
SOURCES = [*sorted((REPO_DIR / 'timm_distill').rglob('*.py')), REPO_DIR / 'train_distill.py', REPO_DIR / 'validate.py']
STDLIB = {'_exit', '_actions', '_group_actions'}  # of os and argparse


def is_private(name: str) -> bool:
    return name.startswith('_') and not name.endswith('__')


def own_names(tree: ast.AST) -> Set[str]:
    """Return the private names that a file defines: functions, classes, and attributes set on `self`."""
    names = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    return {name for name in names if is_private(name)}


def read_attributes(tree: ast.AST) -> Iterator[Tuple[int, str]]:
    """Yield line and name of every private attribute that is read of something other than self, cls or super()."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if ast.unparse(node.value) not in ('self', 'cls', 'super()'):
                yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ('getattr', 'hasattr', 'setattr', 'delattr'):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)):
                yield node.lineno, str(name.value)


def foreign_names(tree: ast.AST, own: Set[str]) -> List[str]:
    """Return what a file uses of other packages' private names, one line for each."""
    found = [f'line {line}: {name}' for line, name in read_attributes(tree) if name not in own | STDLIB]
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and str(node.module).split('.')[0] != 'timm_distill':
            names = [f'{node.module}.{alias.name}' for alias in node.names]
        found += [f'line {node.lineno}: {name}' for name in names if any(map(is_private, name.split('.')))]
    return found


def parse(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding='utf-8'))


def test_private_names_of_torch_and_timm_stand_in_one_file() -> None:
    own = set().union(*(own_names(parse(path)) for path in SOURCES if path != COMPAT))
    found = {path.name: foreign_names(parse(path), own) for path in SOURCES if path != COMPAT}
    found = {name: names for name, names in found.items() if names}
    assert not found, f'move these into {COMPAT.name}, each with the reason why no public name does: {found}'
    assert foreign_names(parse(COMPAT), set())


@pytest.mark.parametrize('source, count', [
    ('from timm.models._registry import x', 1),
    ('from torch.nn.modules.batchnorm import _BatchNorm', 1),
    ('def f():\n    import torch._dynamo', 1),
    ('torch._foreach_add_(a, b)', 1),
    ("getattr(model, '_model_args', None)", 1),
    ('self.loader._iterator', 1),
    ('self._iterator', 0),
    ('super()._load_from_state_dict(state)', 0),
    ('from ._blocks import x', 0),
    ('import torch.nn\nmodule.__dict__', 0),
])
def test_private_names_are_found(source: str, count: int) -> None:
    assert len(foreign_names(ast.parse(source), set())) == count
