"""Messages of what a user can put right: flags for the scripts, arguments for callers from Python."""
import re
from typing import Any, Dict

import pytest
import timm

from timm_distill import UsageError, check_pair, create_distill_task, create_teacher
from timm_distill.errors import flags_in_messages, spell_arguments

SIZE = (3, 32, 32)
WRONG: Dict[str, Dict[str, Any]] = {
    'student takes a timm architecture': dict(student='test_resnett'),
    'kd takes': dict(kd='nrom'),
    'kd_tap takes': dict(kd='norm', kd_tap='nowhere'),
    'teacher_checkpoint no-such-file': dict(teacher='test_resnet', teacher_checkpoint='no-such-file'),
    'student or student_kwargs': dict(student_kwargs=dict(no_such_option=1)),
    'num_classes, or use .* (list_methods())': dict(num_classes=7),
}
FLAG = re.compile(r'(^|\W)--[a-z]')


def create(student: Any = 'test_resnet', teacher: Any = None, kd: str = 'kd', **kwargs: Any) -> Any:
    if teacher is None:
        teacher = timm.create_model('test_resnet', num_classes=5)
    options = {'num_classes': 5, 'input_size': SIZE, 'verbose': False, **kwargs}
    return create_distill_task(student, teacher, kd, **options)


@pytest.mark.parametrize('message, expected', [
    ('change --kd-tap or --img-size.', 'change kd_tap or input_size.'),
    ('--teacher-checkpoint FILE, or --no-teacher-pretrained.', 'teacher_checkpoint=FILE, or teacher_pretrained=False.'),
    ('--model-kwargs img_size=N builds some', 'student_kwargs img_size=N builds some'),
    ('a file a--b, 3 -- 4, and --', 'a file a--b, 3 -- 4, and --'),
])
def test_flags_are_spelled_as_arguments(message: str, expected: str) -> None:
    assert spell_arguments(message, {'img-size': 'input_size', 'model-kwargs': 'student_kwargs'}) == expected


@pytest.mark.parametrize('words', WRONG)
def test_python_callers_read_of_arguments_and_scripts_of_flags(words: str) -> None:
    with pytest.raises(UsageError) as python:
        create(**WRONG[words])
    assert not FLAG.search(str(python.value))
    assert re.search(words.replace('(', r'\(').replace(')', r'\)'), str(python.value))
    with pytest.raises(UsageError) as script, flags_in_messages():
        create(**WRONG[words])
    assert FLAG.search(str(script.value))


def test_arguments_are_those_of_the_function_that_was_called() -> None:
    with pytest.raises(UsageError, match='^checkpoint no-such-file'):
        create_teacher('test_resnet', SIZE, 5, 'no-such-file')
    with pytest.raises(UsageError, match='^teacher_checkpoint no-such-file'):
        create(teacher='test_resnet', teacher_checkpoint='no-such-file')
    assert 'kd_tap takes' in check_pair('test_resnet', 'test_resnet', kd_tap='nowhere', input_size=SIZE).reason
