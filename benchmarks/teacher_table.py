"""Table of timm's weights that make good teachers without labels, from timm's own configs -> docs/teacher_weights.md.

    python benchmarks/teacher_table.py                       # writes the page; downloads no weights
    python benchmarks/teacher_table.py --time 12             # and measures throughput here, of the 12 cheapest
    python benchmarks/teacher_table.py --train               # and lets each up to 100 M parameters teach one step

Architectures are built without memory to count parameters and to find the shape of their features. Throughput and
steps are those of random weights.
"""
import argparse
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import timm
import torch
from timm.models import get_pretrained_cfg
from tqdm import tqdm

import timm_distill
from timm_distill.features.inputs import CANNOT_RUN
from timm_distill.features.stages import last_stage_feature, resolve_feature_layout

PAGE = Path(__file__).resolve().parent.parent / 'docs' / 'teacher_weights.md'
_LARGEST = 700.  # million parameters
_TAUGHT = 100.
_SIZES = ((96, 96), (112, 112), (128, 128))  # tried before that of the weights, which costs more
# What the weights were trained to, by a part of timm's tag or name; a class head has none of these.
_FAMILIES = (
    ('EUPE', ('.eupe',)), ('DINOv3', ('dinov3',)), ('DINOv2', ('dinov2', 'lvd142m')), ('DINO', ('.dino',)),
    ('RADIO', ('radio',)), ('SigLIP 2', ('.v2_webli', 'siglip2')), ('SigLIP', ('siglip',)), ('TIPS', ('tips',)),
    ('Perception Encoder', ('pe_core', 'pe_lang', 'pe_spatial')), ('AIMv2', ('aimv2',)), ('SAM', ('.sa1b', 'sam2')),
    ('I-JEPA', ('ijepa',)), ('CLIP', ('clip', '_laion', '.openai', '.datacomp', '.metaclip', '.dfn')),
)
_NON_COMMERCIAL = ('-nc', 'noncommercial', 'amlr', 'research', 'cvnets')
_PERMISSIVE = ('apache-2.0', 'mit', 'bsd')


_LEGEND = """\
- **Licence**: what timm's config says of the weights, in one word. Read it before a student is given away.
- **Width**: channels of the pooled feature. **Tokens**: grid of the last feature at the input, + class token and
  registers, which are told from patches by the model's own `num_prefix_tokens` and never matched as patches.
- **Input**: of the weights. Most of these run at other sizes: `--teacher-img-size N`, grids then differ and are
  pooled to one another.""".splitlines()


@dataclass(frozen=True)
class Row:
    """Facts of one set of weights.

    Attributes:
        name: timm's name with the tag.
        family: What it was trained to.
        licence: As timm has it.
        params: Millions of parameters.
        width: Channels of its pooled feature.
        tokens: Grid of its last feature, and how many prefix tokens (class and registers) it has.
        input_size: Height and width.
    """
    name: str
    family: str
    licence: str
    params: float
    width: int
    tokens: str
    input_size: Tuple[int, int]


def family_of(name: str) -> str:
    """Return the family of weights, '' for those that are no general teachers."""
    return next((family for family, parts in _FAMILIES if any(part in name for part in parts)), '')


def licence_class(licence: Optional[str]) -> str:
    """Return what a licence allows, in one word, and its name."""
    if not licence:
        return 'unknown'
    text = licence.lower()
    if text in _PERMISSIVE:
        return f'free ({licence})'
    return f'{"non-commercial" if any(part in text for part in _NON_COMMERCIAL) else "own terms"} ({licence})'


def list_weights() -> List[str]:
    """Return the weights of the families that were not fine-tuned to ImageNet's classes."""
    return [
        name for name in timm.list_models(pretrained=True)
        if family_of(name) and not any(part in name for part in ('ft_in', '_in1k', 'in12k'))]


@torch.no_grad()
def describe(name: str) -> Optional[Row]:
    """Return the facts of weights; None where the model is larger than the table goes or gives no vector."""
    config = get_pretrained_cfg(name)
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=0).eval()
        params = sum(p.numel() for p in model.parameters()) / 1e6
        if params > _LARGEST:
            return None
        size = tuple(config.input_size[1:])
        layout = resolve_feature_layout(model, (3, *size))
        feature = last_stage_feature(model.forward_features(torch.empty(1, 3, *size)), model)
        width, *grid = layout.to_map(layout.to_positions(feature)).shape[1:]
    prefix = f' + {layout.num_prefix_tokens}' if layout.num_prefix_tokens else '' if layout.has_tokens else ' map'
    return Row(
        name, family_of(name), licence_class(config.license), params,
        getattr(model, 'head_hidden_size', None) or width, ' x '.join(map(str, grid)) + prefix, size)


@torch.no_grad()
def measure(row: Row, batch: int = 2, repeats: int = 3) -> float:
    """Return images per second of the frozen model at its own input size, on one thread of the CPU."""
    torch.set_num_threads(1)
    model = timm.create_model(row.name, pretrained=False, num_classes=0).eval()
    images = torch.randn(batch, 3, *row.input_size)
    model(images)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        model(images)
        times.append(time.perf_counter() - start)
    return batch / min(times)


def teach(name: str) -> str:
    """Let an architecture teach a student without a classifier one step; return why it cannot, '' where it can."""
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0).eval()
        size = next(size for size in (*_SIZES, own_size(name)) if size == own_size(name) or runs(model, size))
        task = timm_distill.create_distill_task(
            'test_resnet', model, kd='norm', num_classes=0, has_labels=False, input_size=(3, *size), verbose=False)
        result = task(torch.randn(2, 3, *size), torch.zeros(2, dtype=torch.int64))
        result['loss'].backward()
        reason = '' if result['loss'].isfinite() else f'loss {float(result["loss"])}'
    except Exception as e:  # whatever it is stands on the page
        reason = f'{type(e).__name__}: {" ".join(str(e).split())[:300]}'
    return reason


def own_size(name: str) -> Tuple[int, int]:
    """Return height and width of the input of an architecture's weights."""
    _, height, width = get_pretrained_cfg(name).input_size
    return height, width


@torch.no_grad()
def runs(model: torch.nn.Module, size: Tuple[int, int]) -> bool:
    """Whether a model takes images of a size."""
    try:
        model(torch.randn(1, 3, *size))
    except CANNOT_RUN:
        return False
    return True


def table(rows: Sequence[Row], speeds: Dict[str, float], taught: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of the page."""
    yield '# Teachers without labels'
    yield ''
    yield (
        f'Weights of timm {timm.__version__} that were trained to give features, not the classes of ImageNet, up to '
        f'{_LARGEST:.0f} M parameters, from')
    yield 'timm\'s own configs (`python benchmarks/teacher_table.py`). `--teacher NAME` takes each of them.'
    yield ''
    yield from _LEGEND
    if speeds:
        yield (
            f'- **Images/s**: frozen, at that input, on one thread of this CPU ({platform.machine()}, torch '
            f'{torch.__version__.split("+")[0]}), of the cheapest only; the')
        yield '  machine was shared, so that only the order of the figures says much.'
    if taught:
        failed = {name: reason for name, reason in taught.items() if reason}
        yield (
            f'- Each of the {len(taught)} architectures up to {_TAUGHT:.0f} M parameters below has taught a student '
            f'without a classifier one step of NORM, with random weights; {len(failed) or "none"} failed.')
        yield from (f'    - `{name}`: {reason}' for name, reason in failed.items())
    yield ''
    speed = ' Images/s |' if speeds else ''
    yield f'| weights | family | licence | params, M | width | tokens | input |{speed}'
    yield f'|---|---|---|---|---|---|---|{"---|" if speeds else ""}'
    for row in rows:
        value = f' {speeds[row.name]:.1f} |' if row.name in speeds else ' |' if speeds else ''
        yield (
            f'| `{row.name}` | {row.family} | {row.licence} | {row.params:.0f} | {row.width} | {row.tokens} | '
            f'{row.input_size[0]} x {row.input_size[1]} |{value}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--time', type=int, default=0, metavar='N', help='measure the throughput of the N cheapest')
    parser.add_argument('--train', action='store_true', help=f'let all up to {_TAUGHT:.0f} M parameters teach a step')
    parser.add_argument('--output', type=Path, default=PAGE, metavar='FILE', help='page to write')
    args = parser.parse_args()
    rows = [row for row in map(describe, list_weights()) if row is not None]
    families = [family for family, _ in _FAMILIES]
    rows.sort(key=lambda row: (families.index(row.family), row.params, row.input_size, row.name))
    cheapest = sorted(rows, key=lambda row: row.params * row.input_size[0] * row.input_size[1])[:args.time]
    speeds = {row.name: measure(row) for row in cheapest}
    small = dict.fromkeys(row.name.partition('.')[0] for row in rows if row.params <= _TAUGHT)
    taught = {name: teach(name) for name in tqdm(small)} if args.train else {}
    args.output.write_text('\n'.join(table(rows, speeds, taught)) + '\n', encoding='utf-8')
    print(f'{len(rows)} weights, {len(speeds)} measured, {len(taught)} taught: {args.output}')


if __name__ == '__main__':
    main()
