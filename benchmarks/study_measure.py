"""Measurements of a study's student: top-1, calibration, and probes of its frozen features."""
import json
import os
import subprocess
import sys
from typing import Dict

import timm
import torch
from study_parts import REPO_DIR

from timm_distill.export.release import load_release
from timm_distill.report.predictions import calibrate, collect_predictions


def measure_student(checkpoint: str, data_dir: str) -> 'tuple[float, float]':
    """Return top-1 in percent and expected calibration error of the student in a checkpoint."""
    release = load_release(checkpoint)
    config = release.data_config
    loader = timm.data.create_loader(
        timm.data.create_dataset('', data_dir, split='validation'),
        input_size=config['input_size'],
        batch_size=128,
        is_training=False,
        use_prefetcher=False,
        interpolation=config['interpolation'],
        mean=config['mean'],
        std=config['std'],
        crop_pct=config['crop_pct'],
        crop_mode=config['crop_mode'],
        num_workers=0,
        persistent_workers=False,
        device=torch.device('cpu'),
    )
    predictions = collect_predictions(release.model, loader, torch.device('cpu'))
    return predictions.top1, calibrate(predictions).error


def probe_student(model: str, checkpoint: str, data_dir: str, results_file: str) -> Dict[str, float]:
    """Return top-1 in percent of nearest neighbours and of a linear probe, as the ordinary script measures them."""
    command = [
        sys.executable, 'validate.py', '--model', model, '--checkpoint', checkpoint, '--data-dir', data_dir, '--knn',
        '--probe', '--device', 'cpu', '--workers', '1', '--results-file', results_file, '--results-format', 'json']
    subprocess.run(command, cwd=REPO_DIR, check=True, stdout=subprocess.DEVNULL)
    with open(os.path.join(REPO_DIR, results_file), encoding='utf-8') as f:
        return json.load(f)
