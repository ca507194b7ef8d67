"""The released student as a backbone at other sizes: its maps are those that were trained."""
from pathlib import Path
from typing import Any, Dict, List

import pytest
import timm
import torch
from timm.models import save_for_hf

from timm_distill import create_distill_task, merge_student
from timm_distill.features.inspection import inspect
from timm_distill.features.reader import read

TRAINED, DENSE = 32, 640
STUDENTS: Dict[str, Dict[str, Any]] = {
    'test_efficientnet': {},  # maps, channels first
    'mobilenetv3_small_050': {},  # with a layer behind the pool, into which the transform is merged
    'test_vit': dict(img_size=TRAINED, dynamic_img_size=True),  # tokens with a class token
    'test_mambaout': {},  # maps, channels last
}


def release(name: str, num_classes: int, folder: Path) -> torch.nn.Module:
    """Train a step without labels at a small size, write a hub folder and return the merged student."""
    torch.manual_seed(0)
    student = timm.create_model(name, num_classes=num_classes, **STUDENTS[name])
    size = (3, TRAINED, TRAINED)
    task = create_distill_task(
        student, timm.create_model('test_resnet', num_classes=3), kd='norm', has_labels=False, input_size=size,
        kd_kwargs={'norm.segments': 1, 'norm.init': 'official'}, verbose=False)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01)
    task.train()
    task(torch.randn(4, *size), torch.zeros(4, dtype=torch.int64))['loss'].backward()
    optimizer.step()
    merged = merge_student(task)
    save_for_hf(merged, str(folder), model_args=STUDENTS[name], safe_serialization=True)
    return merged


def channels_first(maps: List[torch.Tensor], channels: List[int]) -> List[torch.Tensor]:
    return [each if each.shape[1] == width else each.permute(0, 3, 1, 2) for each, width in zip(maps, channels)]


@torch.no_grad()
@pytest.mark.parametrize('num_classes', [0, 3])
@pytest.mark.parametrize('name', STUDENTS)
def test_maps_of_the_released_student_at_640_px_are_those_that_were_trained(
        name: str, num_classes: int, tmp_path: Path) -> None:
    with torch.enable_grad():
        trained = release(name, num_classes, tmp_path)
    backbone = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, features_only=True).eval()
    images = torch.randn(1, 3, DENSE, DENSE)
    maps = channels_first(backbone(images), backbone.feature_info.channels())
    stages = read(trained, inspect(trained, (3, TRAINED, TRAINED)), images, frozenset({'stages'})).stages
    same = [any(m.shape == s.shape and torch.allclose(m, s, rtol=1e-4, atol=1e-4) for s in stages) for m in maps]
    assert same[-1] and sum(same) >= min(len(stages), len(maps)) - 1
