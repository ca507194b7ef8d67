"""Code of the documents, run as it stands: plain loops, Lightning, Accelerate, the Python API, the site itself."""
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Dict, List

import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

import timm_distill
from timm_distill import DistillTask, create_distill_task

REPO_DIR = Path(__file__).resolve().parent.parent
SIZE = (3, 32, 32)
CLASSES = 3
STUDENT = 'test_resnet'


def blocks_of(heading: str, page: str = 'frameworks.md') -> List[str]:
    """Return the code blocks under a heading of a page."""
    text = (REPO_DIR / 'docs' / page).read_text(encoding='utf-8')
    (section,) = [part for part in re.split(r'(?m)^##? ', text) if re.match(heading + r'[^\n,]*\n', part)]
    return re.findall(r'```python\n(.*?)```', section, flags=re.S)


def create_task(seed: int = 0) -> DistillTask:
    torch.manual_seed(7)
    teacher = timm.create_model('test_convnext', num_classes=CLASSES)
    torch.manual_seed(seed)
    return create_distill_task(
        timm.create_model(STUDENT, num_classes=CLASSES), teacher, kd='norm+kd', kd_kwargs={'norm.segments': 2},
        kd_schedule={'kd': 'stop:1'}, input_size=SIZE, verbose=False)


@pytest.fixture
def given(tmp_path: Path) -> Dict[str, Any]:
    """What the page takes as given."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(12, *SIZE, generator=generator), torch.randint(CLASSES, (12,), generator=generator))
    loader = DataLoader(data, batch_size=4)
    return dict(task=create_task(), loader=loader, val_loader=loader, num_epochs=2, folder=tmp_path)


def run(block: str, names: Dict[str, Any]) -> Dict[str, Any]:
    exec(compile(block, 'docs', 'exec'), names)
    return names


def parameters_of(task: DistillTask) -> Dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in task.get_trainable_module().state_dict().items()}


def assert_timm_loads_the_student(file: Path, model: torch.nn.Module) -> None:
    loaded = timm.create_model(STUDENT, num_classes=CLASSES, checkpoint_path=str(file)).eval()
    images = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(loaded(images), model(images), rtol=1e-5, atol=1e-5)


def assert_trained(task: DistillTask) -> None:
    """The student has moved, the teacher has not."""
    fresh = create_task()
    before, after = parameters_of(fresh), parameters_of(task)
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith('student'))
    teacher = fresh.teacher.state_dict()
    assert all(torch.equal(teacher[name], tensor) for name, tensor in task.teacher.state_dict().items())
    assert not task.teacher.training


def test_the_page_has_the_blocks_that_are_run_here() -> None:
    assert [len(blocks_of(heading)) for heading in ('A plain loop', 'Lightning', 'Accelerate')] == [3, 1, 1]


def test_the_plain_loop_trains_saves_goes_on_and_gives_a_plain_model(given: Dict[str, Any]) -> None:
    loop, resume, evaluate = blocks_of('A plain loop')
    names = run(loop, dict(given))
    assert_trained(names['task'])
    other = {**given, 'task': create_task(seed=5), 'torch': torch}
    other['optimizer'] = timm.optim.create_optimizer_v2(
        other['task'].get_trainable_module(), 'sgd', lr=0.05, momentum=0.9)
    run(resume, other)
    expected = parameters_of(names['task'])
    actual = parameters_of(other['task'])
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    run(evaluate, names)
    assert 0 <= names['correct'] <= 12
    assert_timm_loads_the_student(given['folder'] / 'last.pth.tar', names['model'])


def test_lightning_trains_saves_no_teacher_and_goes_on(given: Dict[str, Any]) -> None:
    lightning = pytest.importorskip('lightning')
    names = run(blocks_of('Lightning')[0], dict(given))
    assert_trained(names['task'])
    assert_timm_loads_the_student(given['folder'] / 'student.pth.tar', names['model'])
    saved = torch.load(given['folder'] / 'last.ckpt', weights_only=False)
    assert not any('teacher' in name for name in saved['state_dict'])
    other = names['Distillation'](create_task(seed=5))
    trainer = lightning.Trainer(max_epochs=2, default_root_dir=given['folder'], accelerator='cpu', logger=False)
    trainer.fit(other, given['loader'], ckpt_path=given['folder'] / 'last.ckpt')  # nothing is left to train
    expected = parameters_of(names['task'])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parameters_of(other.task).items())


def test_accelerate_trains_saves_no_teacher_and_goes_on(given: Dict[str, Any]) -> None:
    accelerate = pytest.importorskip('accelerate')
    names = run(blocks_of('Accelerate')[0], dict(given))
    assert_trained(names['task'])
    assert_timm_loads_the_student(given['folder'] / 'student.pth.tar', names['model'])
    other = create_task(seed=5)
    optimizer = timm.optim.create_optimizer_v2(other.get_trainable_module(), 'sgd', lr=0.05, momentum=0.9)
    accelerator = accelerate.Accelerator()
    accelerator.prepare(other, optimizer)
    accelerator.load_state(given['folder'] / 'state')
    expected = parameters_of(names['task'])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parameters_of(other).items())


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models without weights stand for the two names on the page."""
    def _create(student: str, teacher: str, **kwargs: Any) -> DistillTask:
        assert (student, teacher) == ('mobilenetv2_100', 'resnet50')
        models = [timm.create_model(name, num_classes=CLASSES) for name in (STUDENT, 'test_convnext')]
        return create_distill_task(*models, input_size=SIZE, verbose=False, **kwargs)
    monkeypatch.setattr(timm_distill, 'create_distill_task', _create)


class LabelledImages(List[Any]):
    """A dataset that tells its labels as torchvision's do."""

    @property
    def targets(self) -> List[int]:
        return [label for _, label in self]


def test_the_first_block_of_the_python_page_and_of_the_readme_train(
        given: Dict[str, Any], small_models: None) -> None:
    (block,) = blocks_of('Python', 'python.md')
    readme = (REPO_DIR / 'README.md').read_text(encoding='utf-8').partition('## From Python\n')[2]
    readme = readme.partition('\nThe task')[0]
    assert textwrap.dedent(readme).strip() == block.strip()
    names = run(block, dict(given))
    assert set(names['result']) == {'loss', 'output', 'task_loss', 'norm_loss', 'kd_loss'}
    assert type(names['model']) is type(timm.create_model(STUDENT))


def test_methods_that_need_more_of_the_data_get_it_as_the_page_says(
        given: Dict[str, Any], small_models: None) -> None:
    crd, nd, tokens = blocks_of('Methods that need more', 'python.md')
    images, labels = given['loader'].dataset.tensors
    dataset = LabelledImages([(image, int(label)) for image, label in zip(images, labels)])
    names = run(crd, dict(given, dataset=dataset, torch=torch, timm_distill=timm_distill))
    for batch, target in names['loader']:
        assert torch.isfinite(names['task'](batch, target)['crd_loss'])
    task = timm_distill.create_distill_task('mobilenetv2_100', 'resnet50', kd='nd')
    run(nd, dict(given, task=task, num_classes=CLASSES, timm_distill=timm_distill))
    assert torch.isfinite(task(images, labels)['nd_loss'])
    names = run(tokens, dict(given, timm_distill=timm_distill))
    assert torch.isfinite(names['task'](images, labels)['tokens_patch_loss'])


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip('mkdocs')
    pytest.importorskip('mkdocstrings')
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--quiet', '--site-dir', str(tmp_path / 'site')]
    result = subprocess.run(command, cwd=REPO_DIR, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 'Parameters' in (tmp_path / 'site' / 'api' / 'index.html').read_text(encoding='utf-8')
