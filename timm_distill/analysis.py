"""What a classifier says about a labelled set, and how two classifiers compare: tensors in, numbers out."""
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Callable, List, Optional, Tuple

import torch
import torch.nn as nn


@dataclass(frozen=True)
class Predictions:
    """Top-1 predictions over a set of n images.

    Attributes:
        classes: Predicted class of each image, [n].
        confidences: Softmax probability of it, [n].
        labels: True class, [n].
    """
    classes: torch.Tensor
    confidences: torch.Tensor
    labels: torch.Tensor

    @property
    def top1(self) -> float:
        """Accuracy in percent."""
        return 100 * (self.classes == self.labels).double().mean().item()


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy in bins of equal width.

    Attributes:
        confidence: Mean confidence of each bin, [bins]; nan where it is empty.
        accuracy: Share of right predictions, likewise.
        count: Images in each bin, [bins].
        error: Expected calibration error: mean distance of the two, weighted by count.
    """
    confidence: torch.Tensor
    accuracy: torch.Tensor
    count: torch.Tensor
    error: float


@torch.inference_mode()
def collect_predictions(
        model: nn.Module,
        loader: Any,
        device: torch.device,
        amp_autocast: Callable[[], Any] = nullcontext,
        dtype: Optional[torch.dtype] = None,
) -> Predictions:
    """Run a model over a loader of (images, class indices).

    Args:
        model: Gives logits, [B, K], or a tuple that begins with them; is put in eval mode.
        loader: Batches, moved to the device where they are elsewhere.
        device: Where the model lives.
        amp_autocast: Makes the context of each forward pass.
        dtype: Input dtype, where the loader does not set it.
    """
    model.eval()
    parts: List[Tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for images, labels in loader:
        with amp_autocast():
            output = model(images.to(device=device, dtype=dtype))
        logits = output[0] if isinstance(output, (tuple, list)) else output
        confidences, classes = logits.float().softmax(dim=1).max(dim=1)
        parts.append((classes, confidences, labels.to(device)))
    return Predictions(*(torch.cat(column).cpu() for column in zip(*parts)))


def agreement(student: Predictions, teacher: Predictions) -> float:
    """Return the percentage of images on which two classifiers predict the same class."""
    return 100 * (student.classes == teacher.classes).double().mean().item()


def calibrate(predictions: Predictions, bins: int = 15) -> Calibration:
    """Return the calibration of a classifier.

    On Calibration of Modern Neural Networks (Guo et al., ICML 2017), https://arxiv.org/abs/1706.04599.
    """
    index = (predictions.confidences.double() * bins).long().clamp(max=bins - 1)
    right = (predictions.classes == predictions.labels).double()
    count = torch.bincount(index, minlength=bins).double()
    accuracy = torch.bincount(index, right, minlength=bins) / count
    confidence = torch.bincount(index, predictions.confidences.double(), minlength=bins) / count
    error = ((accuracy - confidence).abs().nan_to_num() * count).sum() / count.sum()
    return Calibration(confidence, accuracy, count.long(), error.item())


def class_accuracies(predictions: Predictions, num_classes: int) -> torch.Tensor:
    """Return the accuracy of every class in percent, [K]; nan for a class without images."""
    right = (predictions.classes == predictions.labels).double()
    total = torch.bincount(predictions.labels, minlength=num_classes)
    return 100 * torch.bincount(predictions.labels, right, minlength=num_classes) / total


def confusion(rows: torch.Tensor, columns: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Count pairs of classes, e.g. the teacher's prediction and the student's, [K, K]."""
    return torch.bincount(rows * num_classes + columns, minlength=num_classes ** 2).view(num_classes, num_classes)
