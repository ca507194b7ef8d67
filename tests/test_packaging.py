"""What an installation brings: metadata, extras, types, scripts."""
import configparser
import importlib
import os
import sys
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import List

import pytest

REPO_DIR = Path(__file__).resolve().parent.parent
SCRIPTS = ['train_distill.py', 'validate.py']


@pytest.fixture(scope='module')
def distribution() -> metadata.Distribution:
    """The installed one: the .egg-info that building leaves beside the source has no RECORD."""
    installed = [found for found in metadata.distributions(name='timm_distill') if found.read_text('RECORD')]
    if not installed:
        pytest.skip('timm_distill is not installed: pip install -e ".[test]"')
    return installed[0]


@pytest.fixture(scope='module')
def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(REPO_DIR / 'setup.cfg', encoding='utf-8')
    return parser


def test_metadata_names_the_package(distribution: metadata.Distribution) -> None:
    assert distribution.metadata['Name'].replace('-', '_') == 'timm_distill'
    assert distribution.metadata['Requires-Python'] == '>=3.10'
    assert 'Apache-2.0' in (distribution.metadata['License'], distribution.metadata['License-Expression'])


def test_version_is_that_of_the_package(distribution: metadata.Distribution) -> None:
    import timm_distill
    assert distribution.version == timm_distill.__version__


@pytest.mark.parametrize('extra, requirement', [
    ('test', 'pytest'), ('test', 'scikit-learn'), ('demo', 'scikit-learn'),
    ('report', 'matplotlib'), ('export', 'onnx'), ('export', 'onnxscript'),
])
def test_extra_brings_its_requirement(distribution: metadata.Distribution, extra: str, requirement: str) -> None:
    requires = [line.replace("'", '"') for line in distribution.requires or []]
    assert any(line.startswith(requirement) and line.endswith(f'extra == "{extra}"') for line in requires)


def test_requirements_admit_every_torch_since_2_8(config: configparser.ConfigParser) -> None:
    requires = config['options']['install_requires'].split()
    assert 'torch>=2.8' in requires
    assert 'timm>=1.0.31' in requires


def test_package_is_typed(config: configparser.ConfigParser) -> None:
    assert files('timm_distill').joinpath('py.typed').is_file()
    assert 'py.typed' in config['options.package_data']['timm_distill'].split()


def test_the_template_of_the_report_is_installed(config: configparser.ConfigParser) -> None:
    assert files('timm_distill.report').joinpath('templates/report.html').is_file()
    assert 'templates/*.html' in config['options.package_data']['timm_distill.report'].split(', ')
    assert 'jinja2' in config['options']['install_requires'].split()


def test_the_command_is_declared_and_its_module_is_installed(config: configparser.ConfigParser) -> None:
    assert config['options.entry_points']['console_scripts'].split('\n')[1:] == ['timm-distill = timm_distill_cli:main']
    assert config['options']['py_modules'] == 'timm_distill_cli'
    assert callable(importlib.import_module('timm_distill_cli').main)


def test_scripts_are_declared(config: configparser.ConfigParser) -> None:
    assert config['options']['scripts'].split() == SCRIPTS


@pytest.mark.parametrize('name', SCRIPTS)
def test_script_can_run(name: str) -> None:
    path = REPO_DIR / name
    assert path.read_text(encoding='utf-8').startswith(('#!/usr/bin/env python\n', '#!/usr/bin/env python3\n'))
    assert os.access(path, os.X_OK), f'{name} must be executable: chmod +x {name}'


@pytest.mark.parametrize('name', SCRIPTS)
def test_installation_puts_script_on_the_path(distribution: metadata.Distribution, name: str) -> None:
    assert name in installed_scripts(distribution)
    if sys.prefix != sys.base_prefix:
        assert (Path(sys.executable).parent / name).is_file()


def installed_scripts(distribution: metadata.Distribution) -> List[str]:
    return [path.name for path in distribution.files or [] if path.parent.name in ('bin', 'Scripts')]
