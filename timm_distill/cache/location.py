"""Folder of a cache: given, or a dataset of the Hugging Face hub, which is downloaded."""
import os
from dataclasses import dataclass
from functools import cache

from ..errors import UsageError

HUB = 'hf://datasets/'


@dataclass(frozen=True)
class HubFolder:
    """Folder of a dataset of the Hugging Face hub.

    Attributes:
        name: 'OWNER/NAME'.
        revision: Branch, tag or commit; '' for the default branch.
        path: Of the folder in it; '' for all.
    """
    name: str
    revision: str = ''
    path: str = ''


def is_remote(place: str) -> bool:
    """Whether a value of `--teacher-cache` names a dataset of the hub, which is read and never written."""
    return place.startswith(HUB)


def parse_place(place: str) -> HubFolder:
    """Return what 'hf://datasets/OWNER/NAME[@REVISION][/FOLDER]' names.

    Raises:
        UsageError: If it names none.
    """
    owner, _, rest = place[len(HUB):].strip('/').partition('/')
    name, _, path = rest.partition('/')
    name, at, revision = name.partition('@')
    if not owner or not name or '@' in owner or bool(at) != bool(revision) or '..' in path.split('/'):
        raise UsageError(
            f'--teacher-cache {place} names no dataset of the hub: give {HUB}OWNER/NAME, {HUB}OWNER/NAME@REVISION for '
            f'a branch, tag or commit, or {HUB}OWNER/NAME/FOLDER for a folder in it')
    return HubFolder(f'{owner}/{name}', revision.replace('%2F', '/'), path)


def locate_cache(place: str) -> str:
    """Return the folder of a value of `--teacher-cache`; '' of ''.

    Raises:
        UsageError: If it cannot be downloaded.
    """
    return _download(place) if is_remote(place) else place


@cache  # a run asks several times: a branch that moves on in between shall not mix two caches
def _download(place: str) -> str:
    folder = parse_place(place)
    try:
        from huggingface_hub import snapshot_download
        root = snapshot_download(
            folder.name,
            repo_type='dataset',
            revision=folder.revision or None,
            allow_patterns=f'{folder.path}/*' if folder.path else None,
        )
    except Exception as e:  # the hub's client raises many kinds
        raise UsageError(
            f'--teacher-cache {place} cannot be downloaded: {" ".join(str(e).split())[:300]}. Without a network give '
            'the folder of a cache that was downloaded before.') from e
    return os.path.join(root, *folder.path.split('/')) if folder.path else root
