"""Predictions of a classifier on a labelled set, and of two compared: tensors in, numbers out."""
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Callable, List, Optional, Tuple

import torch
import torch.nn as nn

from ..utils.distributed import gather_in_order


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
        num_samples: Optional[int] = None,
) -> Predictions:
    """Run a model over a loader of (images, class indices).

    Args:
        model: Gives logits, [B, K], or a tuple that begins with them; is put in eval mode.
        loader: Batches, moved to the device where they are elsewhere.
        device: Where the model lives.
        amp_autocast: Makes the context of each forward pass.
        dtype: Input dtype, where the loader does not set it.
        num_samples: Images of the set, over all ranks.
    """
    model.eval()
    recorder, labels = PredictionRecorder(model), []
    for images, target in loader:
        with amp_autocast():
            recorder(images.to(device=device, dtype=dtype))
        labels.append(target.to(device))
    return Predictions(*recorder.read(num_samples), gather_in_order(
        torch.cat(labels), device, num_samples).cpu())


class PredictionRecorder(nn.Module):
    """A classifier that notes what it predicts while something else evaluates it.

    Args:
        model: Gives logits, [B, K], or a tuple that begins with them.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._classes: List[torch.Tensor] = []
        self._confidences: List[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> Any:
        output = self.model(images)
        logits = output[0] if isinstance(output, (tuple, list)) else output
        confidences, classes = logits.detach().float().softmax(dim=1).max(dim=1)
        self._classes.append(classes)
        self._confidences.append(confidences)
        return output

    def read(self, num_samples: Optional[int] = None) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return classes and confidences, [n] each, of all ranks in the order of the set.

        Args:
            num_samples: Images of the set; what a distributed sampler repeats to fill its last batch is cut off.
        """
        columns = (torch.cat(self._classes), torch.cat(self._confidences))
        classes, confidences = (gather_in_order(column, column.device, num_samples).cpu() for column in columns)
        return classes, confidences


def agreement(student: torch.Tensor, teacher: torch.Tensor) -> float:
    """Return the percentage of images for which two classifiers predict the same class, from their classes, [n]."""
    return 100 * (student == teacher).double().mean().item()


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
