"""Texts of the repository: nothing of the machine they were written on, complete, with links and flags that exist."""
import re
import subprocess
from pathlib import Path
from typing import Dict, Iterator, List, Set

import pytest

from timm_distill import list_methods
from timm_distill.args import create_export_parser, create_train_parser, create_validate_parser
from timm_distill.methods import METHODS

REPO_DIR = Path(__file__).resolve().parent.parent
PAGES = ['README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', *sorted(
    path.relative_to(REPO_DIR).as_posix() for path in (REPO_DIR / 'docs').rglob('*.md'))]
# of pip, pytest, mkdocs, torchrun
OTHER_FLAGS = {'--strict', '--nproc-per-node', '--signal', '--extra'}

MACHINE_PATH = re.compile(r'(?<![\w.:/~-])(?:/(?:home|root|Users|work|opt|mnt)/[\w.]|[A-Z]:\\(?!n)\w)')
REGISTRY_HOST = re.compile(r'\b(?:py(?:pi)\.org|python(?:hosted)\.org|download\.(?:pytorch)\.org|index-(?:url)\b)')


def list_files() -> List[Path]:
    """Return the tracked files and those not ignored; all files where this is no git checkout."""
    command = ['git', 'ls-files', '--cached', '--others', '--exclude-standard', '-z']
    try:
        listed = subprocess.run(command, cwd=REPO_DIR, check=True, capture_output=True).stdout.decode().split('\0')
        paths = [REPO_DIR / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        paths = [path for path in REPO_DIR.rglob('*') if '.egg-info' not in str(path)]
    return [path for path in paths if path.is_file()]


def iter_text_lines() -> Iterator[str]:
    """Yield every line of every text file as 'path:line: text'."""
    for path in list_files():
        data = path.read_bytes()
        if b'\0' in data:
            continue
        for number, line in enumerate(data.decode('utf-8', errors='replace').splitlines(), 1):
            yield f'{path.relative_to(REPO_DIR)}:{number}: {line}'


def find_lines(pattern: 're.Pattern[str]') -> str:
    return '\n'.join(line for line in iter_text_lines() if pattern.search(line.split(': ', 1)[1]))


def test_no_file_holds_a_path_of_one_machine() -> None:
    found = find_lines(MACHINE_PATH)
    assert not found, f'Write these paths relative to the repository, or as DIR:\n{found}'


def test_no_file_names_a_package_registry() -> None:
    found = find_lines(REGISTRY_HOST)
    assert not found, f'Where packages come from is the business of each machine, remove:\n{found}'


@pytest.mark.parametrize('line', ['see /' + 'home/me/x', '"/' + 'mnt/disk/x"', 'C:' + '\\Users'])
def test_machine_path_is_recognised(line: str) -> None:
    assert MACHINE_PATH.search(line)


@pytest.mark.parametrize('line', ['https://host/home/x', '#!/usr/bin/env python', './data/x', 'and/or', "'a:\\nb'"])
def test_other_text_is_no_machine_path(line: str) -> None:
    assert not MACHINE_PATH.search(line)


def read(name: str) -> str:
    return (REPO_DIR / name).read_text(encoding='utf-8')


def files_of_tree(text: str) -> Set[str]:
    """Return the Python files of an indented layout tree, by path; 'norm/moments.py' may stand on one line."""
    folders: Dict[int, str] = {}
    files = set()
    for spaces, name in re.findall(r'^( {4,})([\w./]+)(?: {2,}|$)', text, re.M):
        depth = len(spaces)
        folders = {level: folder for level, folder in folders.items() if level < depth}
        path = ''.join(folder for _, folder in sorted(folders.items())) + name
        if name.endswith('/'):
            folders[depth] = name
        elif name.endswith('.py'):
            files.add(path)
    return files


def test_tree_of_contributing_has_one_line_for_every_module_and_none_more() -> None:
    named = files_of_tree(read('CONTRIBUTING.md').partition('## Layout')[2].partition('## Import order')[0])
    modules = [*(REPO_DIR / 'timm_distill').rglob('*.py'), *(REPO_DIR / 'benchmarks').glob('*.py')]
    modules += [*REPO_DIR.glob('*.py'), *(REPO_DIR / 'recipes').rglob('*.py')]
    actual = {path.relative_to(REPO_DIR).as_posix() for path in modules if path.name != '__init__.py'}
    missing, gone = sorted(actual - named), sorted(named - actual)
    assert not missing and not gone, f"CONTRIBUTING.md's layout needs a line for {missing}, and none for {gone}"


def test_tree_is_read_by_its_indentation() -> None:
    tree = '    a/   x\n      b.py   y\n      c/\n        d/e.py  z\n    f.py   w\n'
    assert files_of_tree(tree) == {'a/b.py', 'a/c/d/e.py', 'f.py'}


def test_readme_is_for_five_minutes() -> None:
    text = read('README.md')
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 1200, 'Move details from README.md to docs/.'


@pytest.mark.parametrize('page', PAGES)
def test_links_to_files_of_the_repository_lead_somewhere(page: str) -> None:
    links = [link.partition('#')[0] for link in re.findall(r'\]\(([^)\s]+)\)', read(page)) if '://' not in link]
    targets = [((REPO_DIR / page).parent / link) for link in links if link]
    broken = [str(path) for path in targets if not path.exists() and path.name != 'results.md']  # the study writes it
    assert not broken, f'{page}: {broken}'


def known_flags() -> Set[str]:
    parsers = (create_train_parser(), create_validate_parser(), create_export_parser())
    return {option for parser in parsers for action in parser._actions for option in action.option_strings}


@pytest.mark.parametrize('page', [page for page in PAGES if page != 'CHANGELOG.md'])  # it names what is gone
def test_flags_in_the_documents_exist(page: str) -> None:
    text = re.sub(r'(?m)^.*(?:benchmarks/\w+\.py|cifar100/run\.py|mkdocs|torchrun|SLURM).*$', '', read(page))
    flags = {flag for flag in re.findall(r'(?<![\w-])--[a-z][a-z0-9-]+', text) if flag not in OTHER_FLAGS}
    assert not flags - known_flags(), f'{page}: {sorted(flags - known_flags())}'


def test_the_command_of_the_readme_is_a_recipe() -> None:
    (recipe,) = set(re.findall(r'--config (\S+)', read('README.md')))
    assert recipe.startswith('recipes/') and (REPO_DIR / recipe).is_file()


def test_every_method_has_its_row_with_a_paper() -> None:
    rows = dict(re.findall(r'^\| \[`(\w+)`\]\(#\1\) \|.*\| (.*) \|$', read('docs/methods.md'), re.M))
    assert set(rows) == set(list_methods())
    assert not [name for name, paper in rows.items() if not re.fullmatch(r'\[.+\]\(https://.+\)', paper)]


def test_every_method_and_preset_is_documented_with_its_cost() -> None:
    text = read('docs/methods.md')
    documented = {section.split('\n', 1)[0]: section for section in re.split(r'(?m)^## ', text)}
    assert set(list_methods()) <= set(documented)
    costs = re.compile(r'\bCost \d\.\d\d|\bCosts the forward|measure of the costs')
    assert not [name for name in list_methods() if not costs.search(documented[name].split('\n\n')[1])]
    assert not [preset.name for preset in METHODS.presets().values() if f'`{preset.name}`' not in text]
