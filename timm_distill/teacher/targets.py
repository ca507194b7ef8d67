"""Outputs of teachers that the methods of a task read, and which of them are standardised.

`module` is what trains: it has `methods`, `tap`, and in `standardized` the names of what gets standardised features.
"""
from typing import Any, Dict, FrozenSet, Iterable, List, Mapping, Optional

from ..errors import UsageError
from ..features.spec import TARGETS, TeacherFeatures, by_teacher
from ..methods._scopes import units_of


def teacher_outputs(module: Any, teacher: str = '') -> FrozenSet[str]:
    """Return what a teacher must compute: the union of what the methods read of it.

    Args:
        module: Has the methods.
        teacher: Which of several.
    """
    outputs = _outputs_of(module, units_of(module.methods, teacher).values())
    if 'stages' in outputs:
        outputs = outputs | {'feature'}  # the one stage of a teacher that gives no intermediate features
    return outputs


def standardized_outputs(module: Any, teacher: str = '') -> FrozenSet[str]:
    """Return which features of a teacher are standardised: those that the methods read that get such targets."""
    units = units_of(module.methods, teacher)
    return _outputs_of(module, [name for unit, name in units.items() if unit in module.standardized]) & TARGETS


def _outputs_of(module: Any, names: Iterable[str]) -> FrozenSet[str]:
    outputs = frozenset[str]().union(*(module.methods[name].teacher_outputs for name in names))
    if 'tap' in outputs:
        point = module.tap.point if module.tap is not None else 'features'
        outputs = outputs - {'tap'} | {'pre_logits' if point == 'pre_logits' else 'feature'}
    return outputs


def standardized_units(module: Any, teacher: str) -> List[str]:
    """Return what gets standardised features of a teacher: methods by name, METHOD@TEACHER for one of several."""
    return sorted(module.standardized & units_of(module.methods, teacher).keys())


def lacks_statistics(module: Any, teachers: Mapping[str, Any]) -> bool:
    """Whether features are standardised whose statistics have not been measured."""
    return any(
        not standardized_outputs(module, name) <= teacher.standardizer.measured
        for name, teacher in teachers.items() if standardized_units(module, name))


def check_statistics(module: Any, features: TeacherFeatures) -> None:
    """Raise a UsageError where a method gets standardised features and there are none yet."""
    for name, own in by_teacher(features).items() if module.standardized else ():
        if own.standardized is None and standardized_units(module, name):
            raise UsageError(
                f'--kd {"+".join(sorted(module.standardized))} gets standardised targets, whose statistics have not '
                'been measured: train_distill.py does it; in Python call task.standardize_targets(loader) before '
                "training, or give teacher_standardize='none'.")


def add_to_statistics(module: Any, teachers: Mapping[str, Any], features: TeacherFeatures, count: int) -> None:
    """Add the features of a batch to what the statistics are measured on, of `count` images from its start on."""
    for name, own in by_teacher(features).items():
        teachers[name].standardizer.add(own, standardized_outputs(module, name), max(count, 0))


def finish_statistics(teachers: Mapping[str, Any], distributed: bool = False) -> None:
    """Measure the statistics of what was added, over all processes.

    Raises:
        UsageError: If a teacher's features are not finite or all the same; says whose.
    """
    for name, teacher in teachers.items():
        try:
            teacher.standardizer.finish(distributed)
        except UsageError as e:
            e.args = (f"Teacher '{name}': {e}",) if name else e.args
            raise


def statistics_state(module: Any, teachers: Mapping[str, Any]) -> Dict[str, Any]:
    """Return what a checkpoint keeps of standardised targets, by teacher; {} where there are none."""
    units = {name: standardized_units(module, name) for name in teachers}
    state = {name: teacher.standardizer.state(units[name]) for name, teacher in teachers.items() if units[name]}
    return {'standardized': state} if state else {}


def load_statistics(module: Any, teachers: Mapping[str, Any], state: Optional[Mapping[str, Any]]) -> None:
    """Take from a checkpoint what `statistics_state` returned.

    Raises:
        UsageError: If other targets are standardised there, or otherwise.
    """
    for name, teacher in teachers.items():
        saved, units = (state or {}).get(name), standardized_units(module, name)
        if saved or units:
            teacher.standardizer.load(saved, units)
