"""Methods that others write: files given by --kd-module, and entry points of installed packages."""
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator

import pytest
import timm
import torch

import train_distill
from timm_distill import UsageError, list_methods
from timm_distill.methods import METHODS, load_method_file
from timm_distill.utils import registry

REPO_DIR = Path(__file__).resolve().parent.parent.parent
METHOD = '''
from timm_distill.methods import DistillMethod, register_method

@register_method('{name}')
class Method(DistillMethod):
    """Nothing."""
'''


@pytest.fixture(autouse=True)
def same_methods_afterwards() -> Iterator[None]:
    before, modules = dict(METHODS._entries), set(sys.modules)
    list_methods()
    before = dict(METHODS._entries)
    yield
    METHODS._entries = before
    for name in set(sys.modules) - modules:
        if name.startswith('timm_distill_method_file:'):
            del sys.modules[name]


def example_of_the_docs() -> str:
    text = (REPO_DIR / 'docs' / 'adding_a_method.md').read_text(encoding='utf-8')
    (example,) = re.findall(r'```python\n(.*?)```', text, flags=re.S)
    return example


def test_example_of_the_docs_trains_as_a_method_of_the_command_line(few_digits_dir: Path, tmp_path: Path) -> None:
    example = example_of_the_docs()
    assert 25 <= len(example.splitlines()) <= 40
    file = tmp_path / 'spread.py'
    file.write_text(example)
    result = train_distill.main([
        '--data-dir', str(few_digits_dir), '--output', str(tmp_path), '--num-classes', '10', '--img-size', '64',
        '-b', '100', '--epochs', '1', '--sched', 'none', '--device', 'cpu', '-j', '0', '--student', 'test_efficientnet',
        '--teacher', 'test_resnet', '--no-teacher-pretrained', '--no-teacher-eval', '--kd-module', str(file),
        '--kd', 'spread+kd', '--kd-kwargs', 'spread.eps=1e-5', '--no-report'])
    assert result.history[0]['train']['spread_loss'] > 0
    saved = torch.load(Path(result.output_dir) / 'last.pth.tar', weights_only=False)
    assert list(saved['task_state']['methods']) == ['spread.connector.weight']
    assert list(saved['state_dict']) == list(timm.create_model('test_efficientnet', num_classes=10).state_dict())


def test_own_method_is_listed_with_its_options(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / 'spread.py').write_text(example_of_the_docs())
    train_distill.main(['--kd-module', str(tmp_path / 'spread.py'), '--list-kd'])
    assert 'spread.eps=1e-06' in capsys.readouterr().out


def test_file_is_imported_once(tmp_path: Path) -> None:
    (tmp_path / 'mine.py').write_text(METHOD.format(name='mine'))
    load_method_file(str(tmp_path / 'mine.py'))
    load_method_file(str(tmp_path / '.' / 'mine.py'))
    assert 'mine' in list_methods()


@pytest.mark.parametrize('source, message', [
    (None, 'existing Python file'),
    ('x = 1 / 0', 'ZeroDivisionError'),
    ('x = ', 'SyntaxError'),
    ('x = 1', 'registers no method'),
    (METHOD.format(name='kd'), 'registered already'),
])
def test_wrong_file_is_one_message(source: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / 'wrong.py'
    if source is not None:
        path.write_text(source)
    with pytest.raises(UsageError, match=message) as error:
        load_method_file(str(path))
    assert str(path) in str(error.value) and '\n' not in str(error.value)


def _entry_point(name: str, load: Any) -> SimpleNamespace:
    return SimpleNamespace(value=f'{name}.methods', load=load, dist=SimpleNamespace(name=name))


def test_plugins_are_found_and_a_broken_one_is_named_without_stopping(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / 'good.py').write_text(METHOD.format(name='good'))
    points = [
        _entry_point('broken', lambda: exec("import no_such_module_of_the_plugin")),
        _entry_point('working', lambda: load_method_file(str(tmp_path / 'good.py')))]
    monkeypatch.setattr(registry, 'entry_points', lambda group: points if group == 'timm_distill.methods' else [])
    METHODS._load_entry_points()
    assert 'good' in list_methods()
    (warning,) = [record.message for record in caplog.records if record.levelname == 'WARNING']
    assert 'broken' in warning and 'no_such_module_of_the_plugin' in warning and '\n' not in warning
