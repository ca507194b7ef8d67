"""Predictions, calibration and confusion, against sums written out."""
import pytest
import torch

from timm_distill.report.predictions import (
    PredictionRecorder,
    Predictions,
    agreement,
    calibrate,
    class_accuracies,
    collect_predictions,
    confusion,
)


@pytest.fixture()
def predictions() -> Predictions:
    return Predictions(
        classes=torch.tensor([0, 1, 1, 2, 0]),
        confidences=torch.tensor([0.95, 0.91, 0.55, 0.52, 1.0]),
        labels=torch.tensor([0, 1, 0, 2, 1]),
    )


def test_top1_and_agreement_count_equal_classes(predictions: Predictions) -> None:
    assert predictions.top1 == pytest.approx(60.)
    assert agreement(predictions.classes, torch.tensor([0, 1, 1, 1, 1])) == pytest.approx(60.)


def test_calibration_error_is_the_weighted_distance_of_confidence_and_accuracy(predictions: Predictions) -> None:
    calibration = calibrate(predictions, bins=10)
    # bin 5: 0.55 wrong, 0.52 right; bin 9: 0.95 and 0.91 right, 1.0 wrong
    assert calibration.count.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0, 3]
    expected = 2 / 5 * abs(0.5 - 0.535) + 3 / 5 * abs(2 / 3 - (0.95 + 0.91 + 1.0) / 3)
    assert calibration.error == pytest.approx(expected)
    assert calibration.accuracy[5].item() == pytest.approx(0.5) and calibration.confidence[0].isnan()


def test_class_accuracies_are_percentages_of_each_class_and_nan_without_images(predictions: Predictions) -> None:
    accuracies = class_accuracies(predictions, 4)
    assert accuracies[:3].tolist() == pytest.approx([50., 50., 100.]) and accuracies[3].isnan()


def test_confusion_counts_pairs() -> None:
    matrix = confusion(torch.tensor([0, 0, 2]), torch.tensor([0, 1, 2]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_predictions_are_collected_in_the_order_of_the_set_without_padding() -> None:
    images = torch.randn(7, 4)
    loader = [(images[:4], torch.tensor([0, 1, 2, 3])), (images[4:], torch.tensor([0, 1, 2]))]
    predictions = collect_predictions(torch.nn.Identity(), loader, torch.device('cpu'), num_samples=6)
    confidences, classes = images[:6].softmax(1).max(1)
    assert torch.equal(predictions.classes, classes) and predictions.labels.tolist() == [0, 1, 2, 3, 0, 1]
    torch.testing.assert_close(predictions.confidences, confidences)


def test_a_recorder_changes_nothing_of_what_it_records() -> None:
    output = (torch.randn(3, 5), 'more')
    recorder = PredictionRecorder(torch.nn.Identity())
    assert recorder(output) is output
    assert torch.equal(recorder.read()[0], output[0].argmax(1))
