"""Caches on the Hugging Face hub: what a value of --teacher-cache names, and what is downloaded."""
import inspect
import os
from pathlib import Path
from typing import Any, Dict, List

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from timm_distill.cache import location
from timm_distill.cache.location import HubFolder, locate_cache, parse_place
from timm_distill.errors import UsageError


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> List[Dict[str, Any]]:
    """A hub with one dataset, whose files come as links into a folder of contents; calls are noted."""
    calls: List[Dict[str, Any]] = []
    signature = inspect.signature(huggingface_hub.snapshot_download)
    files = ['cache.json', 'README.md', 'targets/cache.json', 'targets/logits/000001.rows']

    def download(*args: Any, **kwargs: Any) -> str:
        bound = signature.bind(*args, **kwargs).arguments
        calls.append(bound)
        root = tmp_path / 'snapshots' / str(bound['revision'] or 'main').replace('/', '-')
        for name in filter_repo_objects(files, allow_patterns=bound['allow_patterns']):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / 'blob').touch()
            os.symlink(tmp_path / 'blob', root / name)
        return str(root)

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    location._download.cache_clear()
    return calls


@pytest.mark.parametrize('place, folder', [
    ('hf://datasets/me/targets', HubFolder('me/targets')),
    ('hf://datasets/me/targets/', HubFolder('me/targets')),
    ('hf://datasets/me/targets@v1.0', HubFolder('me/targets', 'v1.0')),
    ('hf://datasets/me/targets@refs%2Fpr%2F1/a', HubFolder('me/targets', 'refs/pr/1', 'a')),
    ('hf://datasets/me/targets/vit/10 views', HubFolder('me/targets', '', 'vit/10 views')),
    ('hf://datasets/me/targets@main/vit', HubFolder('me/targets', 'main', 'vit')),
])
def test_owner_name_revision_and_folder_are_told_apart(place: str, folder: HubFolder) -> None:
    assert parse_place(place) == folder


@pytest.mark.parametrize('place', [
    'hf://datasets/', 'hf://datasets/targets', 'hf://datasets/me/@v1', 'hf://datasets/me/targets@',
    'hf://datasets/me@v1/targets', 'hf://datasets/me/targets/../..'])
def test_what_names_no_dataset_is_refused(place: str) -> None:
    with pytest.raises(UsageError, match='names no dataset of the hub: give hf://datasets/OWNER/NAME'):
        parse_place(place)


def test_a_dataset_is_downloaded_once_in_a_process_and_only_the_folder_that_is_named(
        downloads: List[Dict[str, Any]],
) -> None:
    whole = [Path(locate_cache('hf://datasets/me/targets@v1')) for _ in range(3)]
    assert len(set(whole)) == len(downloads) == 1 and (whole[0] / 'cache.json').exists()
    assert downloads[0]['repo_id'] == 'me/targets' and downloads[0]['repo_type'] == 'dataset'
    assert downloads[0]['revision'] == 'v1'
    part = Path(locate_cache('hf://datasets/me/targets/targets'))
    assert sorted(path.name for path in part.rglob('*.*')) == ['000001.rows', 'cache.json']
    assert not (part.parent / 'README.md').exists() and downloads[1]['revision'] is None
    assert locate_cache('cache') == 'cache' and locate_cache('') == '' and len(downloads) == 2


def test_without_a_network_the_message_says_what_to_give() -> None:
    location._download.cache_clear()
    with pytest.raises(UsageError, match='hf://datasets/me/targets cannot be downloaded: .*Without a network give'):
        locate_cache('hf://datasets/me/targets')  # the tests run offline
