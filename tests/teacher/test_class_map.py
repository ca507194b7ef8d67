"""The class map: names, files, sums of probabilities, and what cannot be mapped."""
from pathlib import Path
from typing import Any, Dict, List, Sequence

import pytest
import torch
from timm.data import ImageNetInfo

from timm_distill import UsageError
from timm_distill.teacher.class_map import (
    ClassMap,
    ClassMatch,
    create_class_map,
    report_class_map,
)
from timm_distill.teacher.label_set import LabelSet, imagenet_labels, recorded_labels

IMAGENETTE = [
    'n01440764', 'n02102040', 'n02979186', 'n03000684', 'n03028079',
    'n03394916', 'n03417042', 'n03425413', 'n03445777', 'n03888257']
INDICES = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]


def imagenet(count: int = 1000) -> LabelSet:
    labels = imagenet_labels(count)
    assert labels is not None
    return labels


def sources(choice: Any, names: Sequence[str], count: int = 1000, labels: Any = 'imagenet') -> List[List[int]]:
    labels = imagenet(count) if labels == 'imagenet' else labels
    return [list(classes) for classes in create_class_map(ClassMatch(names, choice), count, labels).sources]


def write(folder: Path, text: str) -> str:
    path = folder / 'map.txt'
    path.write_text(text, encoding='utf-8')
    return str(path)


def test_wordnet_ids_of_folders_are_the_classes_of_that_id() -> None:
    assert sources('auto', IMAGENETTE) == [[index] for index in INDICES]


@pytest.mark.parametrize('name, index', [
    ('tench', 0), ('Tinca tinca', 0), ('tench, Tinca tinca', 0), ('English_springer', 217), ('french-horn', 566),
    ('n02102040-English_springer', 217), ('n02102040', 217), ('maillot', 638), ('maillot, tank suit', 639),
])
def test_folders_may_be_named_by_words_in_any_spelling(name: str, index: int) -> None:
    assert sources('auto', ['n03888257', name]) == [[701], [index]]


@pytest.mark.parametrize('count', [11821, 21841])
def test_larger_imagenet_sets_teach_imagenet_1k(count: int) -> None:
    names = ImageNetInfo().label_names()
    larger = imagenet(count)
    found = sources('auto', names, count)
    assert 990 < sum(map(bool, found)) <= 1000
    assert all([larger.names[i] for i in classes] in ([name], []) for name, classes in zip(names, found))


def test_ids_meet_words_either_way() -> None:
    words = recorded_labels({'1': 'tench, Tinca tinca', '0': 'English springer'}, 2, 'a config')
    assert words is not None
    assert sources('auto', ['n01440764', 'n02102040'], 2, words) == [[1], [0]]
    ids = LabelSet(['n02102040', 'n01440764'], 'folders')
    assert sources('auto', ['tench', 'English springer'], 2, ids) == [[1], [0]]


def test_an_ambiguous_name_is_refused_with_the_classes_it_may_mean() -> None:
    with pytest.raises(UsageError, match=r"'crane' may be n02012849 \(134, crane\) or n03126707 \(517, crane\)"):
        sources('auto', ['crane', 'n01440764'])


def test_a_file_settles_what_is_ambiguous_and_leaves_the_rest_to_names(tmp_path: Path) -> None:
    path = write(tmp_path, 'crane\tn02012849\n')
    assert sources(path, ['crane', 'n01440764']) == [[134], [0]]


def test_a_file_gives_several_classes_and_none(tmp_path: Path) -> None:
    path = write(tmp_path, 'dog\tn02102040\t208\nfish\ttench\n\nn03888257\t\n')
    assert sources(path, ['dog', 'fish', 'n03888257', 'n03445777']) == [[217, 208], [0], [], [574]]


def test_a_file_of_indices_follows_the_students_labels(tmp_path: Path) -> None:
    assert sources(write(tmp_path, '5\n3\n'), ['', ''], 7, None) == [[5], [3]]


def test_a_file_of_names_is_that_of_the_teachers_classes(tmp_path: Path) -> None:
    path = write(tmp_path, 'cat\ndog\nbird\n')
    assert sources(path, ['Bird', 'cat'], 3, None) == [[2], [0]]


def test_a_mapping_says_what_a_file_says() -> None:
    assert sources({'dog': ['n02102040', 208], 1: 0}, ['dog', 'fish']) == [[217, 208], [0]]


BAD_FILES: Dict[str, Any] = {
    'unknown class of the student': ('owl\tn01440764\n', "'owl' is no class of the student"),
    'unknown class of the teacher': ('dog\tn99999999\n', "'n99999999' is no class of the teacher"),
    'index out of range': ('dog\t1000\n', "'1000' is no class of the teacher"),
    'class twice': ('dog\t1\ndog\t2\n', 'line 2 names its class twice'),
    'line without tab': ('dog\t1\nfish\n', 'line 2 has no tab'),
    'line without class': ('dog\t1\n\t2\n', 'line 2 names no class'),
    'class by name and index': ('dog\t1\n0\t2\n', 'names the class dog of the student twice'),
    'one class for two': ('dog\t5\nfish\t5\n', 'is given to dog and to fish'),
    'too few indices': ('1\n', 'has 1 lines of indices, but the student has 2 classes'),
    'too few names': ('a\nb\nc\n', 'has 3 lines without a tab, but the teacher has 1000 classes'),
    'nothing': ('', 'has 0 lines without a tab'),
    'no class left': ('dog\t\nfish\t\n', "leaves no class of the student's 2"),
    'one class left': ('dog\t5\nfish\t\n', "leaves only dog of the student's 2"),
    'binary': ('a\0b', 'is no text'),
}


@pytest.mark.parametrize('case', BAD_FILES)
def test_a_file_that_is_no_map_is_one_message(case: str, tmp_path: Path) -> None:
    text, message = BAD_FILES[case]
    with pytest.raises(UsageError, match='--teacher-classes') as error:
        sources(write(tmp_path, text), ['dog', 'fish'])
    assert message in str(error.value)


def test_a_missing_file_and_a_folder_are_one_message(tmp_path: Path) -> None:
    for path in (tmp_path / 'none.txt', tmp_path):
        with pytest.raises(UsageError, match='--teacher-classes'):
            sources(str(path), ['dog', 'fish'])


def test_names_that_nobody_knows_are_one_message() -> None:
    with pytest.raises(UsageError, match="nothing names the teacher's 37 classes"):
        sources('auto', IMAGENETTE, 37, None)
    with pytest.raises(UsageError, match='the data do not name their classes'):
        sources('auto', ['', ''])
    with pytest.raises(UsageError, match='leaves no class'):
        sources('auto', ['left', 'right'])


def test_an_index_that_is_another_classs_name_is_ambiguous() -> None:
    labels = LabelSet(['1', '0'], 'folders')
    with pytest.raises(UsageError, match="'0' is ambiguous"):
        create_class_map(ClassMatch(['a', 'b'], {'a': ['0'], 'b': ['1']}), 2, labels)


def test_recorded_names_of_another_class_count_are_none() -> None:
    assert recorded_labels(['a', 'b'], 3, 'a config') is None
    assert recorded_labels({'5': 'a'}, 3, 'a config') is None
    assert recorded_labels(None, 3, 'a config') is None
    partial = recorded_labels({2: 'a'}, 3, 'a config')
    assert partial is not None and partial.names == ('', '', 'a')


def test_the_mapped_distribution_is_the_restricted_one() -> None:
    logits = torch.randn(6, 9, dtype=torch.float64)
    mapped = ClassMap([[4], [0], [7]], 9)(logits)
    restricted = logits.softmax(1)[:, [4, 0, 7]]
    torch.testing.assert_close(mapped.softmax(1), restricted / restricted.sum(1, keepdim=True))
    assert torch.equal(mapped, logits[:, [4, 0, 7]])


def test_many_classes_to_one_sum_their_probabilities() -> None:
    groups = [[4, 1, 2], [0], [], [7, 8], [3, 5, 6, 9, 10]]
    logits = (20 * torch.randn(6, 11, dtype=torch.float64)).requires_grad_()
    class_map = ClassMap(groups, 11)
    mapped = class_map(logits)
    sums = torch.stack([logits.softmax(1)[:, group].sum(1) for group in groups], 1)
    torch.testing.assert_close(mapped.softmax(1), sums)
    assert class_map.known is not None and class_map.known.tolist() == [0, 1, 3, 4]
    assert bool((mapped[:, 2] == -torch.inf).all())
    gradient, = torch.autograd.grad(mapped[:, class_map.known].square().sum(), logits)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_sums_are_taken_in_full_precision(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 600).to(dtype)
    mapped = ClassMap([list(range(300)), list(range(300, 600))], 600)(logits)
    expected = logits.double().unflatten(1, (2, 300)).logsumexp(2)
    assert mapped.dtype == dtype
    torch.testing.assert_close(mapped.double(), expected, rtol=torch.finfo(dtype).eps, atol=0.)


def test_the_log_names_the_map_and_what_it_leaves_out(caplog: Any) -> None:
    caplog.set_level('INFO')
    class_map = create_class_map(ClassMatch([*IMAGENETTE[:2], 'wug']), 1000, imagenet())
    report_class_map(class_map)
    assert "2 of 1000 (imagenet-1k, which has 1000 classes) for 2 of the student's 3" in caplog.text
    assert ': n01440764 (0, tench); n02102040 (217, English springer); wug: none that' in caplog.text
    assert "1 of the student's 3 classes are none that the teacher knows: wug" in caplog.text
    assert class_map.describe()[2] == 'wug: none that the teacher knows'
