"""Texts of the repository: nothing of the machine they were written on, and a layout tree that is complete."""
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Iterator, List

import pytest

from timm_distill import list_methods
from timm_distill.methods._presets import list_presets

REPO_DIR = Path(__file__).resolve().parent.parent
README = REPO_DIR / 'README.md'

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


def test_readme_layout_tree_lists_every_module() -> None:
    if not README.exists():
        pytest.skip('README.md is not written yet')
    named = Counter(re.findall(r'^[\s│├└─|`+-]*(?:[\w.]+/)*(\w+\.py)\b', README.read_text(encoding='utf-8'), re.M))
    modules = [path for path in (REPO_DIR / 'timm_distill').rglob('*.py') if path.name != '__init__.py']
    modules += [REPO_DIR / 'train_distill.py', REPO_DIR / 'validate.py']
    wanted = Counter(path.name for path in modules)
    missing = sorted((wanted - named).elements())
    assert not missing, f"README's layout tree needs one line for each of: {', '.join(missing)}"


def test_every_method_and_preset_is_documented_with_its_cost() -> None:
    text = (REPO_DIR / 'docs' / 'methods.md').read_text(encoding='utf-8')
    documented = {section.split('\n', 1)[0]: section for section in re.split(r'(?m)^## ', text)}
    assert set(list_methods()) <= set(documented)
    costs = re.compile(r'\bCost \d\.\d\d|\bCosts the forward|measure of the costs')
    assert not [name for name in list_methods() if not costs.search(documented[name].split('\n\n')[1])]
    assert not [preset.name for preset in list_presets() if f'`{preset.name}`' not in text]
