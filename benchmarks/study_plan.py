"""Plan of a study: data, teachers, students, settings, seeds and flags, checked before anything runs."""
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

import timm
import yaml

from timm_distill import UsageError
from timm_distill.args import check_train_args, create_train_parser, parse_args
from timm_distill.methods._composition import Recipe, create_composition

REPO_DIR = str(Path(__file__).resolve().parent.parent)
_SCRIPT = 'train_distill.py'
_KEYS = {
    'plan': {'about', 'data', 'flags', 'teachers', 'students', 'seeds', 'settings', 'baselines'},
    'data': {'about', 'dir', 'classes', 'train', 'validation'},
    'teacher': {'about', 'model', 'checkpoint', 'flags', 'run_flags'},
    'student': {'about', 'model', 'flags'},
    'setting': {'about', 'teacher', 'flags', 'students', 'seeds'},
}


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
class Setting:
    """Setting of a plan.

    Attributes:
        teacher: Name of its teacher, '' for the student alone.
        flags: Its own flags, over those of the plan.
        students: Students that are trained in it.
        seeds: Seeds that it is run with.
    """
    teacher: str
    flags: Dict[str, Any]
    students: List[str]
    seeds: List[int]


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

    @property
    def name(self) -> str:
        return f'{self.student}-{self.setting}-{self.seed}'

    @property
    def epochs(self) -> int:
        return int(self.flags['epochs'])

    @property
    def batch_size(self) -> int:
        return int(self.flags['batch-size'])

    def command(self, output: str, pretend_teacher: bool = False) -> List[str]:
        """Return script and flags.

        Args:
            output: Folder of the study's runs.
            pretend_teacher: Take a teacher without weights, to time steps before it is trained.
        """
        teacher = dict(self.teacher_flags)
        if pretend_teacher:
            teacher.update({'teacher-checkpoint': None, 'no-teacher-pretrained': True})
        return [
            _SCRIPT, '--student', self.model, *to_flags(teacher), *to_flags(self.flags), '--seed', str(self.seed),
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
        return Run(student, setting, seed, of_setting.teacher, of_student.model, flags, teacher_flags)

    def runs(self) -> List[Run]:
        """Return the runs, all settings with the first seed first."""
        seeds = list(dict.fromkeys(seed for setting in self.settings.values() for seed in setting.seeds))
        runs = [
            self.run(student, name, seed) for seed in seeds for student in self.students
            for name, setting in self.settings.items() if seed in setting.seeds and student in setting.students]
        return [run for run in runs if self._keep(run)]

    def teachers_of(self, runs: Sequence[Run]) -> List[str]:
        """Return the names of the teachers that some runs need."""
        return list(dict.fromkeys(run.teacher for run in runs if run.teacher))


def read_plan(path: str, data_root: str = 'data', output: str = 'output/study') -> Plan:
    """Read and check a plan.

    Args:
        path: YAML file.
        data_root: Folder of data sets and weights, as runs will spell it.
        output: Folder of all studies' runs, where trained teachers are.

    Raises:
        UsageError: For what is wrong in it: names the key, what is allowed and, where it can, the nearest.
    """
    try:
        with open(path, encoding='utf-8') as f:
            content = yaml.safe_load(f)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UsageError(f'The plan {path} cannot be read: {" ".join(str(e).split())}') from e
    name = os.path.splitext(os.path.basename(path))[0]
    _check_keys(content, 'plan', path)
    for key in ('data', 'students', 'seeds', 'settings'):
        if not content.get(key):
            raise UsageError(f'{path}: {key} is missing or empty.')
    data = content['data']
    _check_keys(data, 'data', path)
    data_dir = os.path.join(data_root, str(data.get('dir', '')))
    flags = content.get('flags') or {}
    seeds = _seeds(content['seeds'], path)
    plan = Plan(
        name, str(content.get('about', '')).strip(), data_dir, str(data.get('about', '')).strip(),
        int(data['classes']), int(data['train']), int(data['validation']), {},
        _read_students(content['students'], path), seeds, {}, list(content.get('baselines') or ['alone']), dict(flags))
    common = {'data-dir': data_dir, 'num-classes': plan.classes, **flags}
    for key, value in (content.get('teachers') or {}).items():
        plan.teachers[key] = _read_teacher(key, value, common, data_root, os.path.join(output, name), path)
    for key, value in content['settings'].items():
        plan.settings[key] = _read_setting(key, value or {}, plan, path)
    _check_plan(plan, path, os.path.join(output, name))
    return plan


def _check_keys(content: Any, kind: str, path: str) -> None:
    if not isinstance(content, dict):
        raise UsageError(f'{path}: a {kind} must be a mapping, not {content!r}.')
    unknown = sorted(set(map(str, content)) - _KEYS[kind])
    if unknown:
        known = ', '.join(sorted(_KEYS[kind]))
        raise UsageError(f'{path}: unknown key {unknown[0]!r} of a {kind}; there are: {known}.')


def _seeds(seeds: Any, path: str) -> List[int]:
    if not isinstance(seeds, list) or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise UsageError(f'{path}: seeds must be a list of numbers from 0, not {seeds!r}.')
    if len(set(seeds)) < len(seeds):
        raise UsageError(f'{path}: a seed stands twice in {seeds}: the second run would be the first one again.')
    return seeds


def _read_students(content: Any, path: str) -> Dict[str, Student]:
    """Return the students of a list of architectures, or of a mapping from names to model and flags."""
    if isinstance(content, list):
        if len(set(map(str, content))) < len(content):
            raise UsageError(f'{path}: a student is named twice.')
        content = {str(name): {} for name in content}
    if not isinstance(content, dict):
        raise UsageError(f'{path}: students must be a list or a mapping, not {content!r}.')
    students = {}
    for name, value in content.items():
        _check_keys(value or {}, 'student', path)
        students[str(name)] = Student(str((value or {}).get('model', name)), dict((value or {}).get('flags') or {}))
    return students


def _read_teacher(
        name: str, content: Any, common: Dict[str, Any], data_root: str, output: str, path: str) -> Teacher:
    _check_keys(content, 'teacher', path)
    model = str(content.get('model', ''))
    if not timm.is_model(model):
        raise UsageError(f'{path}: the teacher {name} has the unknown model {model!r}.')
    if ('checkpoint' in content) == ('flags' in content):
        raise UsageError(f'{path}: the teacher {name} needs either a checkpoint or the flags of its training.')
    run_flags = dict(content.get('run_flags') or {})
    if 'checkpoint' in content:
        return Teacher(name, model, os.path.join(data_root, str(content['checkpoint'])), None, run_flags)
    flags = {**common, **(content['flags'] or {})}
    if 'pretrained-path' in flags:
        flags['pretrained-path'] = os.path.join(data_root, str(flags['pretrained-path']))
    return Teacher(name, model, os.path.join(output, f'teacher-{name}', 'last.pth.tar'), flags, run_flags)


def _read_setting(name: str, content: Any, plan: Plan, path: str) -> Setting:
    _check_keys(content, 'setting', path)
    teacher = str(content.get('teacher') or '')
    if teacher and teacher not in plan.teachers:
        raise UsageError(
            f'{path}: the setting {name} has the unknown teacher {teacher!r}; '
            f'there are: {", ".join(plan.teachers) or "none"}.')
    students = list(content.get('students') or plan.students)
    unknown = [student for student in students if student not in plan.students]
    if unknown:
        raise UsageError(f'{path}: the setting {name} has the unknown student {unknown[0]!r}.')
    return Setting(teacher, dict(content.get('flags') or {}), students, _seeds(content.get('seeds', plan.seeds), path))


def _check_plan(plan: Plan, path: str, output: str) -> None:
    """Let the script's own parser read every command."""
    for baseline in plan.baselines:
        if baseline not in plan.settings:
            raise UsageError(f'{path}: the baseline {baseline!r} is no setting.')
    unknown = [student.model for student in plan.students.values() if not timm.is_model(student.model)]
    if unknown:
        raise UsageError(f'{path}: unknown student {unknown[0]!r}; timm.list_models() has them.')
    for key in ('epochs', 'batch-size'):
        if key not in plan.flags:
            raise UsageError(f'{path}: flags need {key}.')
    commands = {f'teacher {t.name}': t.command(output) for t in plan.teachers.values() if t.trained}
    for name, setting in plan.settings.items():
        if not setting.students:
            continue
        commands[f'setting {name}'] = plan.run(setting.students[0], name, setting.seeds[0]).command(output)
    for what, command in commands.items():
        _check_command(command, f'{path}, {what}')


def _check_command(command: Sequence[str], what: str) -> None:
    parser = create_train_parser()

    def refuse(message: str) -> None:
        raise UsageError(f'{what}: {message}')

    parser.error = refuse  # type: ignore[method-assign, assignment]
    try:
        args = parse_args(parser, [part for part in command[1:]])
        check_train_args(args)
        create_composition(Recipe(args.kd, args.kd_weight, args.kd_kwargs, args.kd_schedule, num_epochs=args.epochs))
    except UsageError as e:
        raise e if str(e).startswith(what) else UsageError(f'{what}: {e}') from e


def check_data(plan: Plan) -> None:
    """Compare the folders with what the plan says of them.

    Raises:
        UsageError: If data or given weights are missing, or other data is there.
    """
    hint = f' {plan.data_about}' if plan.data_about else ''
    for split, expected in (('train', plan.train_images), ('validation', plan.validation_images)):
        folder = os.path.join(plan.data_dir, split)
        if not os.path.isdir(folder):
            raise UsageError(f'The data of {plan.name} is not in {folder} (--data-root).{hint}')
        classes = [entry.path for entry in os.scandir(folder) if entry.is_dir()]
        if len(classes) != plan.classes:
            raise UsageError(f'{folder} has {len(classes)} class folders, the plan says {plan.classes}.{hint}')
        images = sum(len(files) for path in classes for _, _, files in os.walk(path))
        if images != expected:
            raise UsageError(f'{folder} has {images} files, the plan says {expected}.{hint}')
    wanted = [teacher.checkpoint for teacher in plan.teachers.values() if not teacher.trained]
    wanted += [
        str(teacher.flags['pretrained-path']) for teacher in plan.teachers.values()
        if teacher.flags and teacher.flags.get('pretrained-path')]
    missing = [file for file in wanted if not os.path.isfile(file)]
    if missing:
        raise UsageError(f'The weights {missing[0]} are missing: benchmarks/pretrained.py writes them (--data-root).')
