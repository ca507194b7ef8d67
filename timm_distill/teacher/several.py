"""Several teachers under names: one forward each, and whatever is asked of a teacher asked of each of them."""
import keyword
from typing import Any, Callable, Dict, List, Mapping, Sequence, TypeVar, Union, cast

import torch.nn as nn

from ..errors import UsageError
from .stored import StoredTeacher
from .teacher import Teacher

AnyTeacher = Union[Teacher, StoredTeacher]
Value = TypeVar('Value')


class Teachers(nn.Module):
    """Frozen teachers under names, in the order that they were named in.

    Args:
        teachers: Two or more by name.

    Raises:
        UsageError: If a name is none.
    """

    def __init__(self, teachers: Mapping[str, Teacher]):
        super().__init__()
        check_teacher_names(list(teachers))
        self.names = tuple(teachers)
        self.members = nn.ModuleList(teachers.values())

    def by_name(self) -> Dict[str, Teacher]:
        """Return the teachers by name."""
        return dict(zip(self.names, cast(List[Teacher], self.members)))

    def train(self, mode: bool = True) -> 'Teachers':
        """Stay in eval mode."""
        return super().train(False)

    def compile(self, **kwargs: Any) -> None:
        """Compile each with `torch.compile`'s arguments."""
        for teacher in self.by_name().values():
            teacher.compile(**kwargs)


def check_teacher_names(names: Sequence[Any]) -> None:
    """Raise a UsageError for a teacher's name that is not an identifier."""
    for name in names:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise UsageError(
                f'--teacher {name}=...: a teacher is called by letters, digits and underscores, e.g. '
                '--teacher dino=NAME sup=NAME.')


def teachers_by_name(teacher: Union[AnyTeacher, Teachers, None]) -> Dict[str, Any]:
    """Return teachers by name; one without others under '', none for None."""
    if isinstance(teacher, Teachers):
        return dict(teacher.by_name())
    return {} if teacher is None else {'': teacher}


def ask_each(teacher: Union[AnyTeacher, Teachers, None], question: Callable[[Any], Value]) -> Any:
    """Return what a function gives for the teacher; by name for several, None for none."""
    if isinstance(teacher, Teachers):
        return {name: question(member) for name, member in teacher.by_name().items()}
    return None if teacher is None else question(teacher)


def live_teachers(teacher: Union[AnyTeacher, Teachers, None]) -> Dict[str, Teacher]:
    """Return the teachers that can be run, by name: all but one that is known by its cache alone."""
    return {name: member for name, member in teachers_by_name(teacher).items() if isinstance(member, Teacher)}


def describe_name(name: str) -> str:
    """Return how messages call a teacher by name, '' for the only one."""
    return f"the teacher '{name}'" if name else 'the teacher'
