"""Fixtures that all tests share: a small folder of real images, the golden files, one thread, no network."""
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Generator, Iterator

import pytest

# Before huggingface_hub and torch are imported, and for the processes that tests start. A second thread gains nothing
# on models this small and waits long where the cores are busy.
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('OMP_NUM_THREADS', '1')

from timm.layers import is_fast_norm, set_fast_norm  # noqa: E402

from timm_distill.run.demo import write_digits  # noqa: E402

REPO_DIR = Path(__file__).resolve().parent.parent


def find_golden_dir() -> Path:
    """Return the folder of golden files: TIMM_DISTILL_GOLDEN, else ../shared/golden, else tests/golden."""
    named = os.environ.get('TIMM_DISTILL_GOLDEN')
    if named:
        if not Path(named).is_dir():
            raise pytest.UsageError(f'TIMM_DISTILL_GOLDEN={named!r} is not a folder.')
        return Path(named)
    shared = REPO_DIR.parent / 'shared' / 'golden'
    return shared if shared.is_dir() else REPO_DIR / 'tests' / 'golden'


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """Escape names that are no UTF-8 in what a test printed: reports are sent between processes as UTF-8."""
    report = yield
    report.sections = [
        (name, text.encode(errors='backslashreplace').decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def _log_handlers_end_with_their_test() -> Iterator[None]:
    """Take handlers away that a script of this test gave the root logger: their stream is the test's."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(autouse=True)
def _fast_norm_ends_with_its_test() -> Iterator[None]:
    """Take back what --fast-norm sets for the whole process."""
    before = is_fast_norm()
    yield
    set_fast_norm(before)


@pytest.fixture(scope='session')
def golden_dir() -> Path:
    """Folder of the golden files."""
    return find_golden_dir()


@pytest.fixture(scope='session')
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of real images, train (300) and validation (100), ten classes. Do not write into it."""
    pytest.importorskip('sklearn')
    root = tmp_path_factory.mktemp('images') / 'digits'
    write_digits(root, train_per_class=30, validation_per_class=10)
    return root


@pytest.fixture(scope='session')
def few_digits_dir(digits_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten training and two validation images of each class of `digits_dir`. Do not write into it."""
    root = tmp_path_factory.mktemp('images') / 'few'
    for split, count in (('train', 10), ('validation', 2)):
        for folder in sorted((digits_dir / split).iterdir()):
            (root / split / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:count]:
                shutil.copy(path, root / split / folder.name)
    return root
