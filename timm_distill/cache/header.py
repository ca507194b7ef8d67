"""Header of a cache: teacher, data, augmentation, precision and library versions that its targets depend on.

Whoever opens a cache says what it would write itself; what differs is named.
"""
import json
import os
import platform
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Dict, List, Mapping, Optional

from ..checkpoint.file import write_text
from ..data import describe_changes
from ..data.views import ViewGrid
from ..errors import UsageError

Header = Dict[str, Any]
FORMAT = 1
_FILE = 'cache.json'
_PACKAGES = ('timm', 'torch', 'torchvision', 'pillow', 'numpy')
# Flags that a view depends on. What erasing alone reads follows below.
VIEW_FLAGS = (
    'no_aug', 'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'color_jitter_prob',
    'grayscale_prob', 'gaussian_blur_prob', 'aa', 'aug_splits', 'reprob', 'remode', 'recount', 'resplit',
    'train_interpolation', 'mixup', 'cutmix', 'cutmix_minmax', 'mixup_prob', 'mixup_switch_prob', 'mixup_mode',
    'train_img_sizes', 'no_prefetcher', 'input_img_mode')


def describe_views(args: Namespace, data_config: Mapping[str, Any], grid: ViewGrid) -> Dict[str, Any]:
    """Return what the views of a run depend on beside the data."""
    flags = {name: _plain(getattr(args, name)) for name in VIEW_FLAGS}
    if not (args.mixup or args.cutmix or args.cutmix_minmax):
        flags = {name: value for name, value in flags.items() if 'mix' not in name}
    config = {'input_size': _plain(data_config['input_size'])}
    if args.no_aug or not args.train_interpolation or args.train_crop_mode == 'pad':
        config['interpolation'] = data_config['interpolation']
    if args.train_crop_mode == 'pad':
        config.update(crop_pct=data_config['crop_pct'], crop_mode=data_config['crop_mode'])
    if args.reprob or args.train_crop_mode:  # what is erased, or filled up, is so in terms of these
        config.update(mean=_plain(data_config['mean']), std=_plain(data_config['std']))
    return {'cache_views': grid.num_views, **flags, **config}


def describe_versions() -> Dict[str, str]:
    """Return the versions of the libraries that decode, transform and compute."""
    versions = {'python': '.'.join(platform.python_version_tuple()[:2])}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = ''
    return versions


def read_header(folder: str) -> Optional[Header]:
    """Return the header of a cache, None where there is none.

    Raises:
        UsageError: If it cannot be read.
    """
    try:
        with open(os.path.join(folder, _FILE), encoding='utf-8') as file:
            header = json.load(file)
        if header['format'] != FORMAT:
            raise UsageError(
                f'--teacher-cache {folder} has format {header["format"]}, this version reads {FORMAT}: fill another')
        return header
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        if isinstance(e, UsageError):
            raise
        raise UsageError(f'{os.path.join(folder, _FILE)} of --teacher-cache cannot be read: {e}') from e


def create_header(folder: str, header: Header) -> Header:
    """Write the header of a cache unless another process was faster; returns what counts."""
    os.makedirs(folder, exist_ok=True)
    path, own = os.path.join(folder, _FILE), os.path.join(folder, f'cache-{platform.node()}-{os.getpid()}.json')
    write_text(json.dumps(header, indent=1, sort_keys=True), own)
    try:
        os.link(own, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not os.path.exists(path):
            os.replace(own, path)
    if os.path.exists(own):
        os.remove(own)
    found = read_header(folder)
    assert found is not None
    return found


def differences(cached: Header, here: Header) -> List[str]:
    """Return in what a cache differs from what a run would write, in words; only what both of them say is compared."""
    words: List[str] = []
    for section in ('teacher', 'views', 'versions'):
        old, new = cached.get(section, {}), here.get(section, {})
        names = sorted({*old, *new})
        if section == 'teacher':  # flags say less of it than a live one does
            names = [name for name in new if name in old or name == 'classes']
        words += [
            f'{_title(section, name)} {_text(old.get(name))} in the cache, {_text(new.get(name))} here'
            for name in names if _plain(old.get(name)) != _plain(new.get(name))]
    changes = describe_changes(_fingerprint(cached['data']), _fingerprint(here['data']))
    return words + [f'training data: {change.replace(" before", " in the cache")}' for change in changes]


def check_header(folder: str, cached: Header, here: Header) -> None:
    """Refuse a cache of something else.

    Raises:
        UsageError: Names what differs.
    """
    words = differences(cached, here)
    if words:
        raise UsageError(
            f'--teacher-cache {folder} holds targets of something else: {"; ".join(words)}. Give the flags, data, '
            'teacher and versions that it was filled with, or another folder.')


def _fingerprint(value: Mapping[str, Any]) -> Dict[str, Any]:
    return {**value, 'groups': {name: list(group) for name, group in value['groups'].items()}}


def _title(section: str, name: str) -> str:
    if section == 'versions':
        return name
    if section == 'teacher':
        return f"the teacher's {name.replace('_', ' ')}"
    return f'--{name.replace("_", "-")}'


def _plain(value: Any) -> Any:
    """Return what JSON makes of a value."""
    return json.loads(json.dumps(value, default=str))


def _text(value: Any) -> str:
    return ' '.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)[:80]
