"""Plan of a study: data, teachers, students, caches, settings, seeds and flags, checked before anything runs."""
import os
from argparse import Namespace
from typing import Any, Dict, List, Sequence

import timm
import yaml
from study_parts import Cache, Plan, Setting, Student, Teacher

from timm_distill import UsageError
from timm_distill.args import check_train_args, create_train_parser, parse_args
from timm_distill.cache.header import VIEW_FLAGS
from timm_distill.methods._composition import Recipe, create_composition

# What all runs on a cache have alike, by the names of parsed flags.
_SHARED = (*VIEW_FLAGS, 'img_size', 'input_size', 'in_chans', 'teacher_dtype', 'teacher_kwargs', 'amp', 'cache_views')
_KEYS = {
    'plan': {'about', 'data', 'flags', 'teachers', 'students', 'seeds', 'settings', 'baselines', 'probe', 'caches'},
    'data': {'about', 'dir', 'classes', 'train', 'validation'},
    'teacher': {'about', 'model', 'checkpoint', 'flags', 'run_flags'},
    'student': {'about', 'model', 'flags'},
    'setting': {'about', 'teacher', 'flags', 'students', 'seeds', 'start', 'labels', 'cache'},
    'cache': {'about', 'flags'},
}


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
        _read_students(content['students'], path), seeds, {}, list(content.get('baselines') or ['alone']), dict(flags),
        bool(content.get('probe')))
    common = {'data-dir': data_dir, 'num-classes': plan.classes, **flags}
    for key, value in (content.get('teachers') or {}).items():
        plan.teachers[key] = _read_teacher(key, value, common, data_root, os.path.join(output, name), path)
    for key, value in (content.get('caches') or {}).items():
        _check_keys(value or {}, 'cache', path)
        folder = os.path.join(output, name, f'cache-{key}')
        plan.caches[str(key)] = Cache(folder, dict((value or {}).get('flags') or {}))
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
    start, labels = str(content.get('start') or ''), content.get('labels', 1.)
    if start and start not in plan.settings:
        raise UsageError(
            f'{path}: the setting {name} starts from {start!r}, which must be a setting above it; '
            f'there are: {", ".join(plan.settings) or "none"}.')
    if isinstance(labels, bool) or not isinstance(labels, (int, float)) or not 0 < labels <= 1:
        raise UsageError(f'{path}: the setting {name} has labels: {labels!r}: a share above 0, at most 1.')
    seeds = _seeds(content.get('seeds', plan.seeds), path)
    if start:
        first = plan.settings[start]
        students = [student for student in students if student in first.students]
        seeds = [seed for seed in seeds if seed in first.seeds]
    cache = _read_cache_name(name, content, plan, path)
    return Setting(teacher, dict(content.get('flags') or {}), students, seeds, start, float(labels), cache)


def _read_cache_name(name: str, content: Any, plan: Plan, path: str) -> str:
    """Return the name of a setting's cache, '' for none."""
    cache = str(content.get('cache') or '')
    if cache and cache not in plan.caches:
        raise UsageError(
            f'{path}: the setting {name} has the unknown cache {cache!r}; there are: '
            f'{", ".join(plan.caches) or "none"}.')
    if cache and not content.get('teacher'):
        raise UsageError(f'{path}: the setting {name} has the cache {cache!r} and no teacher.')
    if cache and content.get('labels', 1) != 1:
        raise UsageError(
            f'{path}: the setting {name} has the cache {cache!r} and labels: every seed has other images.')
    return cache


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
        if not (setting.students and setting.seeds):
            continue
        commands[f'setting {name}'] = plan.run(setting.students[0], name, setting.seeds[0]).command(output)
    for what, command in commands.items():
        _check_command(command, f'{path}, {what}')
    for cache in plan.caches:
        _check_cache(plan, cache, path, output)


def _check_cache(plan: Plan, name: str, path: str, output: str) -> None:
    """Check that all runs on a cache have one teacher and the same views."""
    sharing = {key: setting for key, setting in plan.settings.items() if setting.cache == name and setting.seeds}
    if not sharing:
        raise UsageError(f'{path}: no setting names the cache {name}: give one of them "cache: {name}".')
    first: Dict[str, Any] = {}
    for key, setting in sharing.items():
        for student in setting.students:
            what = f'{path}, setting {key} with {student}'
            args = _check_command(plan.run(student, key, setting.seeds[0]).command(output), what)
            views = {'teacher': setting.teacher, **{flag: getattr(args, flag) for flag in _SHARED}}
            first = first or {**views, 'what': f'{key} with {student}'}
            flag = next((flag for flag in views if views[flag] != first[flag]), '')
            if flag:
                raise UsageError(
                    f'{what}: the cache {name} is shared with {first["what"]}, which has another '
                    f'{flag.replace("_", "-")} ({first[flag]}, here {views[flag]}): give it a cache of its own.')


def _check_command(command: Sequence[str], what: str) -> Namespace:
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
    return args
