"""Parts of a study's plan: teachers, students, settings, and the runs that they make."""
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

REPO_DIR = str(Path(__file__).resolve().parent.parent)
_SCRIPT = 'train_distill.py'


def to_flags(flags: Mapping[str, Any]) -> List[str]:
    """Spell flags as a command line: a list is several values, True a flag without a value, None and False none."""
    parts: List[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        parts.append(f'--{name}')
        if isinstance(value, (list, tuple)):
            parts += [str(item) for item in value]
        elif value is not True:
            parts.append(str(value))
    return parts


@dataclass
class Teacher:
    """Teacher of a plan: weights that are given, or a run that comes first.

    Attributes:
        name: Its name in the plan.
        model: timm architecture.
        checkpoint: Its weights; written by `command` where it is trained.
        flags: Flags of its training, None for weights that are given.
        run_flags: Flags of the runs that it teaches.
    """
    name: str
    model: str
    checkpoint: str
    flags: Optional[Dict[str, Any]] = None
    run_flags: Dict[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        """Whether the study trains it."""
        return self.flags is not None

    def command(self, output: str) -> List[str]:
        """Return script and flags of its training."""
        return [
            _SCRIPT, '--model', self.model, *to_flags(self.flags or {}), '--output', output,
            '--experiment', f'teacher-{self.name}', '--resume', 'auto', '--recovery-interval', '50', '--no-report']


@dataclass
class Student:
    """Student of a plan.

    Attributes:
        model: timm architecture.
        flags: Flags of its runs, such as model-kwargs.
    """
    model: str
    flags: Dict[str, Any]


@dataclass
class Cache:
    """Cached targets of a teacher, which settings, students and seeds share.

    Attributes:
        folder: Where it lies.
        flags: Flags of the runs on it, such as cache-views.
    """
    folder: str
    flags: Dict[str, Any] = field(default_factory=dict)


@dataclass
class Setting:
    """Setting of a plan.

    Attributes:
        teacher: Name of its teacher, '' for the student alone.
        flags: Its own flags, over those of the plan.
        students: Students that are trained in it.
        seeds: Seeds that it is run with.
        start: Setting whose student it starts from, '' for none.
        labels: Share of the training images that it has.
        cache: Name of the cache that its runs share with others, '' for none.
    """
    teacher: str
    flags: Dict[str, Any]
    students: List[str]
    seeds: List[int]
    start: str = ''
    labels: float = 1.
    cache: str = ''


@dataclass
class Run:
    """One student in one setting with one seed."""
    student: str
    setting: str
    seed: int
    teacher: str
    model: str
    flags: Dict[str, Any]
    teacher_flags: Dict[str, Any] = field(default_factory=dict)
    start: str = ''
    labels: float = 1.
    cache_flags: Dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f'{self.student}-{self.setting}-{self.seed}'

    @property
    def start_name(self) -> str:
        """Name of the run whose student it starts from, '' for none."""
        return f'{self.student}-{self.start}-{self.seed}' if self.start else ''

    @property
    def classifies(self) -> bool:
        """Whether its student has a classifier that has been trained."""
        return bool(self.flags['num-classes']) and not self.flags.get('no-labels')

    def data_dir(self, output: str) -> str:
        """Return the folder of its images."""
        if self.labels == 1:
            return str(self.flags['data-dir'])
        return os.path.join(output, f'labels-{self.labels:g}-{self.seed}')

    @property
    def epochs(self) -> int:
        return int(self.flags['epochs'])

    @property
    def batch_size(self) -> int:
        return int(self.flags['batch-size'])

    def command(self, output: str, pretend_teacher: bool = False, cached: bool = True) -> List[str]:
        """Return script and flags.

        Args:
            output: Folder of the study's runs.
            pretend_teacher: Take a teacher without weights, to time steps before it is trained.
            cached: Use the setting's cache, if it has one.
        """
        teacher = {**self.teacher_flags, **(self.cache_flags if cached else {})}
        if pretend_teacher:
            teacher.update({'teacher-checkpoint': None, 'no-teacher-pretrained': True})
        flags = {**self.flags, 'data-dir': self.data_dir(output)}
        if self.start:
            weights = os.path.join(output, self.start_name, 'hub', 'model.safetensors')
            flags.update({'pretrained': True, 'pretrained-path': weights})
        return [
            _SCRIPT, '--student', self.model, *to_flags(teacher), *to_flags(flags), '--seed', str(self.seed),
            '--output', output, '--experiment', self.name, '--resume', 'auto', '--recovery-interval', '50',
            '--no-report']

    def spelled(self, output: str) -> str:
        """Return the command as one types it."""
        return shlex.join(['python', *self.command(output)])


@dataclass
class Plan:
    """A study.

    Attributes:
        name: Name of the file.
        about: What it is for.
        data_dir: Class folders, train and validation.
        data_about: Where the data comes from.
        classes: Class folders in it.
        train_images: Images of the training set.
        validation_images: Likewise.
        teachers: By name.
        students: By name.
        seeds: Seeds that settings run with.
        settings: By name.
        baselines: Settings that the others are compared with, seed by seed.
        probe: Whether frozen features are probed at the end of each run, which those without a classifier always are.
        caches: Cached targets that settings name, by name.
    """
    name: str
    about: str
    data_dir: str
    data_about: str
    classes: int
    train_images: int
    validation_images: int
    teachers: Dict[str, Teacher]
    students: Dict[str, Student]
    seeds: List[int]
    settings: Dict[str, Setting]
    baselines: List[str]
    flags: Dict[str, Any]
    probe: bool = False
    caches: Dict[str, Cache] = field(default_factory=dict)
    _keep: Callable[[Run], bool] = lambda run: True

    def keep(self, wanted: Callable[[Run], bool]) -> None:
        """Leave out the runs that are not wanted."""
        self._keep = wanted  # type: ignore[method-assign]

    def run(self, student: str, setting: str, seed: int) -> Run:
        """Return one run."""
        of_setting = self.settings[setting]
        teacher = self.teachers.get(of_setting.teacher)
        of_student = self.students[student]
        teacher_flags = {} if teacher is None else {
            'teacher': teacher.model, 'teacher-checkpoint': teacher.checkpoint, **teacher.run_flags}
        flags = {
            'data-dir': self.data_dir, 'num-classes': self.classes, **self.flags, **of_student.flags,
            **of_setting.flags}
        cache = self.caches.get(of_setting.cache)
        cache_flags = {} if cache is None else {'teacher-cache': cache.folder, **cache.flags}
        return Run(
            student, setting, seed, of_setting.teacher, of_student.model, flags, teacher_flags, of_setting.start,
            of_setting.labels, cache_flags)

    def runs(self) -> List[Run]:
        """Return the runs, all settings with the first seed first; one that starts from another comes behind it."""
        seeds = list(dict.fromkeys(seed for setting in self.settings.values() for seed in setting.seeds))
        runs = [
            self.run(student, name, seed) for seed in seeds for student in self.students
            for name, setting in self.settings.items() if seed in setting.seeds and student in setting.students]
        return [run for run in runs if self._keep(run)]

    def depth(self, setting: str) -> int:
        """Return how many settings have to be run before a setting, because it starts from their students."""
        start = self.settings[setting].start
        return 1 + self.depth(start) if start else 0

    def teachers_of(self, runs: Sequence[Run]) -> List[str]:
        """Return the names of the teachers that some runs need."""
        return list(dict.fromkeys(run.teacher for run in runs if run.teacher))
