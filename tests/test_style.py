"""Rules of the house style that ruff has none for."""
import ast
import io
import re
import tokenize
from pathlib import Path
from typing import Iterator, List

import pytest

REPO_DIR = Path(__file__).resolve().parent.parent
FOLDERS = ('timm_distill', 'benchmarks', 'tests')


def source_files() -> List[Path]:
    scripts = [REPO_DIR / 'train_distill.py', REPO_DIR / 'validate.py']
    return sorted(path for folder in FOLDERS for path in (REPO_DIR / folder).rglob('*.py')) + scripts


def find_aligned_brackets(source: str) -> Iterator[int]:
    """Yield the lines of brackets with text behind them whose next line is aligned with that text."""
    lines = source.splitlines()
    stack: List[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.OP:
            continue
        if token.string in '([{':
            stack.append(token)
        elif token.string in ')]}':
            opening = stack.pop()
            row, column = opening.end
            text = lines[row - 1][column:].strip()
            if row == token.start[0] or not text or text.startswith('#'):
                continue
            following = lines[row]
            if following.strip() and len(following) - len(following.lstrip()) == column:
                yield row


@pytest.mark.parametrize('folder', [*FOLDERS, '.'])
def test_brackets_have_hanging_indents(folder: str) -> None:
    wanted = [
        path for path in source_files() if path.relative_to(REPO_DIR).parts[0] == folder or folder == '.'
        and path.parent == REPO_DIR]
    found = [
        f'{path.relative_to(REPO_DIR)}:{line}' for path in wanted for line in find_aligned_brackets(path.read_text())]
    assert wanted and not found, 'Break the line behind the bracket and indent what follows:\n' + '\n'.join(found)


def parameters_of(function: ast.FunctionDef) -> List[str]:
    """Return the parameters of a function, those of a method without the object; `ctx` is autograd's."""
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    names += [a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return names[1:] if names[:1] in (['self'], ['cls'], ['ctx']) else names


def test_no_function_takes_more_than_twelve_parameters() -> None:
    found = [
        f'{path.relative_to(REPO_DIR)}:{node.lineno}: {node.name} takes {len(parameters_of(node))}'
        for path in source_files() if path.relative_to(REPO_DIR).parts[0] != 'tests'
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and len(parameters_of(node)) > 12]
    assert not found, 'Give it a frozen dataclass, as UpdateSpec in engine/train.py:\n' + '\n'.join(found)


@pytest.mark.parametrize('source, lines', [
    ('f(a,\n  b)\n', [1]),
    ('f(\n    a,\n    b)\n', []),
    ('x = g(f(a,\n        b))\n', [1]),
    ('x = {  # text\n    1: 2}\n', []),
])
def test_aligned_bracket_is_found(source: str, lines: List[int]) -> None:
    assert list(find_aligned_brackets(source)) == lines


RIDDLE = re.compile(r'(What|Whatever|Where|Whether|How|Which|Who|Why|When|All that|Everything)\b')


def opening_lines(source: str) -> Iterator[str]:
    """Yield the first docstring line of a file and of each of its classes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef)):
            yield (ast.get_docstring(node) or '').split('\n')[0]


def test_docstrings_of_modules_and_classes_open_with_a_noun_phrase() -> None:
    riddles = {
        path.name: [line for line in opening_lines(path.read_text(encoding='utf-8')) if RIDDLE.match(line)]
        for path in source_files() if 'tests' not in path.parts}
    riddles = {name: lines for name, lines in riddles.items() if lines}
    assert not riddles, f'open these with the noun that a timm user would search for: {riddles}'
    assert RIDDLE.match(next(opening_lines('\'\'\'What this does.\'\'\'')))


def test_the_package_keeps_the_type_checker_on() -> None:
    ignored = sum(
        path.read_text(encoding='utf-8').count('# type: ignore') for path in (REPO_DIR / 'timm_distill').rglob('*.py'))
    assert ignored < 20, 'mend the type, or cast it'


def test_flags_are_written_in_one_place_alone() -> None:
    written = re.compile(r'(^|[\s,(.])args\.\w+(, \w*\.?args\.\w+)* = |setattr\(\w*\.?args\b|vars\(\w*\.?args\)\[')
    found = {
        str(path.relative_to(REPO_DIR)) for path in source_files() if path.is_relative_to(REPO_DIR / 'timm_distill')
        if path.parent.name != 'args' and any(written.search(line) for line in path.read_text('utf-8').splitlines())}
    assert found == {'timm_distill/utils/settings.py'}, 'settle() writes what a run makes of its flags'
