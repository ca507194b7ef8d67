"""Reference numbers of the methods' official code, for the golden tests.

The folder is `TIMM_DISTILL_GOLDEN`, else `../shared/golden` beside the repository, else `tests/golden` (small copies).
Case names, shapes and hyper-parameters come from the files alone.
"""
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import AbstractSet, Any, Dict, List, Optional, Sequence, Tuple

import pytest
import torch
import torch.nn as nn
from safetensors import safe_open

from timm_distill.adapters import Adapter, AdapterOutput, Match, create_adapter
from timm_distill.features.layouts import FeatureLayout
from timm_distill.features.spec import Features
from timm_distill.losses import match_grids, n_to_one_loss
from timm_distill.student.folding import Consumer
from timm_distill.student.tap import StudentTap, TapSite
from timm_distill.utils.affine import AffineMap

_TESTS = Path(__file__).resolve().parent
RTOL = 1e-9


@dataclass(frozen=True)
class GoldenCase:
    """One case of a golden file.

    Attributes:
        name: Name of the case.
        hparams: Its hyper-parameters.
        tensors: Its tensors, float64 and int64.
    """
    name: str
    hparams: Dict[str, Any]
    tensors: Dict[str, torch.Tensor]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def under(self, prefix: str) -> Dict[str, torch.Tensor]:
        """Return the tensors whose names start with `prefix`, without it."""
        return {name[len(prefix):]: value for name, value in self.tensors.items() if name.startswith(prefix)}

    def stages(self, name: str) -> List[torch.Tensor]:
        """Return the numbered entries `name.0`, `name.1`, ..."""
        entries = {k: v for k, v in self.under(f'{name}.').items() if k.isdigit()}
        return [entries[key] for key in sorted(entries, key=int)]


def golden_folder() -> Path:
    """Return the folder of the golden files."""
    if os.environ.get('TIMM_DISTILL_GOLDEN'):
        return Path(os.environ['TIMM_DISTILL_GOLDEN'])
    shared = _TESTS.parent.parent / 'shared' / 'golden'
    return shared if shared.is_dir() else _TESTS / 'golden'


def golden_cases(method: str, having: Optional[str] = None, lacking: Optional[str] = None) -> List[GoldenCase]:
    """Return the cases of a method's file.

    Args:
        method: Stem of the file.
        having: Only cases with a tensor of this name.
        lacking: Only cases without a tensor of this name.
    """
    with safe_open(str(golden_folder() / f'{method}.safetensors'), framework='pt') as file:
        metadata = file.metadata()
        keys = list(file.keys())
        cases = [
            GoldenCase(
                name,
                json.loads(metadata.get(f'{name}.hparams', '{}')),
                {key[len(name) + 1:]: file.get_tensor(key) for key in keys if key.startswith(f'{name}.')},
            )
            for name in json.loads(metadata['cases'])
        ]
    return [c for c in cases if (having is None or having in c) and (lacking is None or lacking not in c)]


def case_id(case: GoldenCase) -> str:
    """Name of a case, for test ids."""
    return case.name


def assert_golden(actual: torch.Tensor, expected: torch.Tensor, rtol: float = RTOL) -> None:
    """Compare with a golden tensor: relative to each entry, and to the largest where entries nearly cancel."""
    scale = expected.abs().max().item() if expected.numel() else 0.
    torch.testing.assert_close(actual.detach(), expected, rtol=rtol, atol=rtol * scale)


class NoTransform(Adapter):
    """The official students' FT with one segment: there is none."""
    segments = 1

    def forward(self, x: torch.Tensor, match: Optional[Match] = None) -> AdapterOutput:
        if match is None:
            return AdapterOutput(x)
        return AdapterOutput(x, n_to_one_loss(*match_grids(match.to_map(x), match.teacher, 'max'), 1))

    def expand_contract(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        return x, x

    def affine(self) -> AffineMap:
        eye = torch.eye(self.student_channels, dtype=torch.float64)
        return AffineMap(eye, eye.new_zeros(self.student_channels))


def golden_forms(cases: Sequence[GoldenCase]) -> List[Any]:
    """Return (case, form) parameters: every case directly, and from moments where these can compute it.

    They cannot where the student's side is max-pooled, and need not where the official student has no transform.
    """
    parameters = []
    for case in cases:
        moments = 'expand.conv.weight' in case and not _pools_student(case)
        forms = ('direct', 'moments') if moments else ('direct',)
        parameters += [pytest.param(case, form, id=f'{case.name}-{form}') for form in forms]
    return parameters


def _pools_student(case: GoldenCase) -> bool:
    return any(s > t for s, t in zip(case['x'].shape[2:], case['t'].shape[2:]))


def golden_match(case: GoldenCase) -> Match:
    """Return what the adapter of a case is matched with."""
    return Match(case['t'], lambda positions: positions)


def create_golden_adapter(case: GoldenCase, form: str = 'direct') -> Adapter:
    """Create the adapter of a case with its stored weights; none where the official student has none."""
    channels = case['x'].shape[1]
    if 'expand.conv.weight' not in case:
        return NoTransform(channels, channels)
    segments = case.hparams['co_sponge']
    adapter = create_adapter('norm', channels, case['t'].shape[1], segments=segments, pool='max', form=form).double()
    adapter.load_state_dict(adapter_state(case), strict=False)  # batch counters start at 0
    return adapter


def adapter_state(case: GoldenCase, prefix: str = '') -> Dict[str, torch.Tensor]:
    """Return a case's tensors `prefix + expand.bn.weight` etc. under the adapter's own names."""
    renamed: Dict[str, torch.Tensor] = {}
    for half in ('expand', 'contract'):
        renamed.update({f'{half}.{k}': v for k, v in case.under(f'{prefix}{half}.conv.').items()})
        renamed.update({f'{half}_bn.{k}': v for k, v in case.under(f'{prefix}{half}.bn.').items()})
    return renamed


class GoldenStudent(nn.Module):
    """A student whose backbone is the identity: its input is its last-stage feature."""

    def __init__(self, case: GoldenCase):
        super().__init__()
        self.num_features = case['x'].shape[1]
        self.num_classes = case['fc.weight'].shape[0]
        self.fc = nn.Linear(self.num_features, self.num_classes, dtype=torch.float64)
        self.fc.load_state_dict(case.under('fc.'))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.fc(pooled)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


class GoldenTeacher(nn.Module):
    """A teacher that returns a case's stored feature and logits."""

    def __init__(self, case: GoldenCase):
        super().__init__()
        self.case = case

    def forward(self, images: torch.Tensor, outputs: AbstractSet[str] = frozenset()) -> Features:
        return Features(logits=self.case.tensors.get('logit_t'), feature=self.case.tensors.get('t'))


def golden_tap(channels: int) -> StudentTap:
    """Return the insertion point of `GoldenStudent`."""
    site = TapSite(None, FeatureLayout('NCHW', channels), (channels, 1, 1), (Consumer('fc'),))
    return StudentTap('features', (site,))
