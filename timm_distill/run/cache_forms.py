"""Forms in which a run's cached targets are stored: of every output that the methods read, as they read it."""
import argparse
import os
from typing import AbstractSet, Any, Dict, FrozenSet, List, Optional, Sequence, Tuple

import torch

from ..adapters import Match
from ..cache.codecs import Codec, Pool, feature_codec, logits_codec
from ..cache.header import Header
from ..cache.table import table_bytes
from ..errors import UsageError
from ..features.inputs import evaluation_mode, random_images
from ..features.spec import Features, FeatureSpec, Pooling, first_blocks
from ..task import DistillTask
from ..teacher.targets import standardized_outputs
from ..teacher.teacher import Teacher

NEW_VIEWS = 10
_NEW_TOPK = 10
Grid = Tuple[int, int]


def choose_codecs(
        args: argparse.Namespace,
        task: DistillTask,
        spec: FeatureSpec,
        header: Optional[Header] = None,
        folder: str = '',
) -> Dict[str, Codec]:
    """Return the form of every output that the methods read, by flags, else as the cache has it.

    Args:
        args: Flags.
        task: With its methods.
        spec: Of the teacher.
        header: Of the cache, None for a new one.
        folder: Of the cache; maps that are whole in it are read so.
    """
    forms = {**choose_forms(args, task), **((header or {}).get('forms') or {})}
    if args.cache_topk is not None:
        forms['topk'] = args.cache_topk
    precision = args.cache_precision or forms['precision']
    outputs = frozenset[str]().union(*(_outputs_of(method, task) for method in _methods(task)))
    codecs: Dict[str, Codec] = {}
    if 'logits' in outputs:
        known, temperature = known_classes(task), softmax_temperature(task)
        topk = forms['topk'] if args.cache_topk is not None or temperature is not None else 0
        codecs['logits'] = logits_codec(spec.num_classes if known is None else len(known), topk, temperature)
    if 'feature' in outputs:
        codecs['feature'] = _feature_codec(task, spec, precision, folder)
    if 'pre_logits' in outputs:
        codecs['pre_logits'] = feature_codec('pre_logits', (spec.pre_logits,), precision)
    for name, shape in _other_shapes(task, spec, outputs).items():
        codecs[name] = feature_codec(name, shape, precision)
    if args.train_img_sizes and any(_size_matters(name, codec) for name, codec in codecs.items()):
        raise UsageError(
            '--teacher-cache stores maps of one size: with --train-img-sizes it takes methods that read logits, '
            'pre-logits or the mean of the last map')
    return codecs


def known_classes(task: DistillTask) -> Optional[torch.Tensor]:
    """Return the student's classes that the teacher knows, [M]; None where it knows them all."""
    (teacher,) = task.teachers.values()
    return None if teacher.class_map is None else teacher.class_map.known


def _methods(task: DistillTask) -> List[Any]:
    return list(task.module.methods.values())


def _outputs_of(method: Any, task: DistillTask) -> AbstractSet[str]:
    """Return the outputs of the teacher that a method reads."""
    if 'tap' not in method.teacher_outputs:
        return method.teacher_outputs
    tap = task.module.tap
    inside = tap is not None and tap.point == 'pre_logits'
    return method.teacher_outputs - {'tap'} | {'pre_logits' if inside else 'feature'}


def _size_matters(name: str, codec: Codec) -> bool:
    """Whether an output has another shape on images of another size."""
    return name not in ('logits', 'pre_logits') and (codec.pool is None or codec.pool[0] != (1, 1))


def _feature_codec(task: DistillTask, spec: FeatureSpec, precision: str, folder: str) -> Codec:
    whole = feature_codec('feature', spec.feature, precision)
    pool = common_pool(task, spec)
    if pool is None:
        return whole
    pooled = feature_codec('feature', (spec.feature[0], *pool[0]), precision, pool)
    stored = [os.path.isdir(os.path.join(folder, codec.name)) for codec in (pooled, whole)] if folder else [False] * 2
    return whole if stored == [False, True] else pooled


def common_pool(task: DistillTask, spec: FeatureSpec) -> Optional[Pool]:
    """Return the pooling with which all methods that read the teacher's last map begin; None where they read it whole.
    """
    if 'feature' in standardized_outputs(task.module):  # whose statistics are those of all positions
        return None
    readers = [method for method in _methods(task) if 'feature' in _outputs_of(method, task)]
    pools = {_resolve_pool(task, spec, method) for method in readers}
    return pools.pop() if len(pools) == 1 else None


def _resolve_pool(task: DistillTask, spec: FeatureSpec, method: Any) -> Optional[Pool]:
    pooling: Optional[Pooling] = method.teacher_pooling()
    if pooling is None:
        return None
    height, width = spec.feature[1:]
    grids = [pooling.grid] if pooling.grid is not None else _student_grids(task, method)
    if pooling.grid is None:
        grids = [(min(grid[0], height), min(grid[1], width)) for grid in grids]
    if len(set(grids)) != 1 or grids[0] == (height, width) or grids[0][0] > height or grids[0][1] > width:
        return None
    return grids[0], pooling.mode


def _student_grids(task: DistillTask, method: Any) -> Sequence[Grid]:
    """Return the grids on which the student meets the teacher's last map."""
    if 'tap' in method.teacher_outputs:
        return _matched_grids(task)
    spec = task.module.spec.features
    return [] if spec is None else [spec.feature[1:]]


@torch.no_grad()
def _matched_grids(task: DistillTask) -> List[Grid]:
    """Measure the grid of the student's map at each adapter."""
    grids: List[Grid] = []

    def note(adapter: Any, inputs: Tuple[Any, ...]) -> None:
        x, match = inputs
        assert isinstance(match, Match)
        height, width = match.to_map(x).shape[-2:]
        grids.append((height, width))

    module = task.module
    images = random_images(module, task.input_size)
    adapter: Any = module.adapters[0]
    target = images.new_zeros(len(images), adapter.teacher_channels, 1, 1)
    handles = [adapter.register_forward_pre_hook(note) for adapter in module.adapters]
    try:
        with evaluation_mode(module):
            module.forward_with_features(images, Features(tap=target))
    finally:
        for handle in handles:
            handle.remove()
    return grids


def _other_shapes(task: DistillTask, spec: FeatureSpec, outputs: FrozenSet[str]) -> Dict[str, Tuple[int, ...]]:
    """Return the shapes of the stages, the first blocks and the tail's prefix tokens that the methods read, by name."""
    shapes: Dict[str, Tuple[int, ...]] = {}
    if 'stages' in outputs:
        read = [method.teacher_stages() for method in _methods(task) if 'stages' in method.teacher_outputs]
        every = frozenset(range(len(spec.stages)))
        read += [None] if 'stages' in standardized_outputs(task.module) else []  # the statistics are taken of all
        wanted = frozenset[int]().union(*(every if stages is None else stages for stages in read))
        shapes.update({f'stage{i}': spec.stages[i].shape for i in sorted(wanted)})
    if 'blocks' in outputs:
        shapes.update({f'block{i}': block.shape for i, block in enumerate(first_blocks(spec.stages))})
    tail = task.teacher.spec.tail if isinstance(task.teacher, Teacher) and 'tail' in outputs else None
    if tail is not None and tail.prefix_of is not None:
        shapes['prefix'] = (tail.layout.num_prefix_tokens, tail.stage.shape[0])
    return shapes


def softmax_temperature(task: DistillTask) -> Optional[float]:
    """Return the one temperature at which all methods read the teacher's softmax; None where one of them reads more."""
    methods = _methods(task)
    readers = [method for method in methods if 'logits' in method.teacher_outputs]
    probe = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    changed = any(not torch.equal(method.transform_logits(probe), probe) for method in methods)
    temperatures = {float(method.temperature) for method in readers if method.reads_softmax}
    if changed or len(temperatures) != 1 or not all(method.reads_softmax for method in readers):
        return None
    return temperatures.pop()


def choose_forms(args: argparse.Namespace, task: DistillTask) -> Dict[str, Any]:
    """Return what a new cache is filled in where no flag says otherwise."""
    topk = args.cache_topk
    if topk is None:
        reads_logits = 'logits' in task.teacher_outputs
        topk = 0 if reads_logits and softmax_temperature(task) is None else _NEW_TOPK
    return {'topk': topk, 'precision': args.cache_precision or 'float16'}


def report_cache_size(args: argparse.Namespace, task: DistillTask, num_samples: int) -> List[str]:
    """Return one line on the size of a cache for each method, as `--dry-run` prints it."""
    (teacher,) = task.teachers.values()
    views = args.cache_views or NEW_VIEWS
    codecs = choose_codecs(args, task, teacher.feature_spec)
    slots = num_samples * views * max(1, args.aug_splits) * len(args.train_img_sizes or [0])
    sizes = {name: table_bytes(slots, codec.row_bytes) for name, codec in codecs.items()}
    lines = []
    for name, method in task.module.methods.items():
        shapes = _other_shapes(task, teacher.feature_spec, frozenset(_outputs_of(method, task)))
        read = [output for output in codecs if output in _outputs_of(method, task) or output in shapes]
        total = sum(sizes[output] for output in read)
        words = ', '.join(f'{codecs[output].name} {codecs[output].row_bytes} bytes a view' for output in read)
        lines.append(f'cache for {name}: {describe_bytes(total)} ({words})')
    lines.append(f'cache of {views} views of {num_samples} images: {describe_bytes(sum(sizes.values()))}')
    return lines


def describe_bytes(count: float) -> str:
    """Return a size in words, in units of thousands."""
    units = ['bytes', 'kB', 'MB', 'GB', 'TB']
    while count >= 1000 and len(units) > 1:
        count /= 1000
        del units[0]
    return f'{count:.4g} {units[0]}'
