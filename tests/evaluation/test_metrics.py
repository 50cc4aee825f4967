"""Predictions of a split, and the metrics computed from them."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import get_args

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import (
    balanced_accuracy_score,
    classification_report,
    confusion_matrix,
    f1_score,
    log_loss,
    matthews_corrcoef,
    top_k_accuracy_score,
)

from pipeline.config.train import Metric
from pipeline.errors import RunError
from pipeline.evaluation.metrics import METRICS, evaluate_predictions
from pipeline.evaluation.predictor import Predictions, Predictor
from pipeline.tasks import SINGLE_LABEL

RESOLUTION, CLASSES = 8, 7


def small_model() -> keras.Model:
    """Logits that differ from image to image, by untrained but seeded weights."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((RESOLUTION, RESOLUTION, 3))
    x = keras.layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    x = keras.layers.Conv2D(8, 3, activation="relu")(x)
    x = keras.layers.Dropout(0.5)(keras.layers.Flatten()(x))
    return keras.Model(inputs, keras.layers.Dense(CLASSES)(x))


def images_and_labels(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (n, RESOLUTION, RESOLUTION, 3), dtype=np.uint8), rng.integers(0, CLASSES, n).astype(
        np.int32
    )


def stream(n: int, batch: int, *, offset: int = 100) -> tf.data.Dataset:
    """Shaped as the evaluation stream: the last batch padded with weight 0 and index -1, in shuffled order."""
    images, labels = images_and_labels(n)
    order = np.random.default_rng(2).permutation(n)
    pad = -n % batch
    index = np.concatenate([order + offset, np.full(pad, -1)]).astype(np.int64)
    images = np.concatenate([images[order], np.zeros((pad, *images.shape[1:]), np.uint8)])
    onehot = np.concatenate([np.eye(CLASSES, dtype=np.float32)[labels[order]], np.zeros((pad, CLASSES), np.float32)])
    return tf.data.Dataset.from_tensor_slices((images, onehot, (index >= 0).astype(np.float32), index)).batch(
        batch, drop_remainder=True
    )


def check_1009_images(strategy: tf.distribute.Strategy) -> None:
    """Every one of 1,009 images once, and the figures scikit-learn's."""
    with strategy.scope():
        model = small_model()
    predictions = Predictor(model, strategy, SINGLE_LABEL)(stream(1009, 32))
    images, labels = images_and_labels(1009)
    logits = model(images.astype(np.float32), training=False).numpy()
    assert predictions.index.dtype == np.int64
    assert predictions.labels.dtype == np.int32
    assert predictions.logits.dtype == np.float32
    np.testing.assert_array_equal(predictions.index, np.arange(100, 1109))
    np.testing.assert_array_equal(predictions.labels, labels)
    np.testing.assert_allclose(predictions.logits, logits, atol=1e-5)
    assert logits.std() > 0.1
    evaluation = evaluate_predictions(predictions, [f"c{i}" for i in range(CLASSES)], "test")
    assert evaluation.num_images == 1009
    assert evaluation.accuracy == pytest.approx((logits.argmax(1) == labels).mean(), abs=0)
    assert evaluation.metrics["top5_accuracy"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5), abs=0)


def test_one_device_predicts_each_of_1009_images_once() -> None:
    check_1009_images(tf.distribute.get_strategy())


@pytest.mark.slow
def test_two_replicas_predict_each_of_1009_images_once() -> None:
    code = (
        "import tensorflow as tf\n"
        "cpu = tf.config.list_physical_devices('CPU')[0]\n"
        "tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)\n"
        "import test_metrics\n"
        "strategy = tf.distribute.MirroredStrategy(['CPU:0', 'CPU:1'])\n"
        "assert strategy.num_replicas_in_sync == 2\n"
        "test_metrics.check_1009_images(strategy)\n"
        "print('checked')\n"
    )
    tests = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parents[1]}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("checked")


def test_second_call_traces_nothing_and_sees_new_weights() -> None:
    traces = []

    class Counted(keras.layers.Layer):
        def call(self, x: tf.Tensor) -> tf.Tensor:
            traces.append(x.shape)
            return x

    inputs = keras.Input((RESOLUTION, RESOLUTION, 3))
    model = keras.Model(inputs, keras.layers.Dense(CLASSES)(keras.layers.Flatten()(Counted()(inputs))))
    predict = Predictor(model, tf.distribute.get_strategy(), SINGLE_LABEL)
    first = predict(stream(20, 8))
    count = len(traces)
    model.layers[-1].bias.assign_add(tf.ones(CLASSES))
    second = predict(stream(20, 8))
    assert len(traces) == count
    np.testing.assert_allclose(second.logits, first.logits + 1, rtol=1e-4, atol=1e-3)


def test_a_repeated_image_is_an_error() -> None:
    twice = stream(20, 8).concatenate(stream(20, 8).take(1))
    with pytest.raises(RuntimeError, match="8 images were predicted more than once"):
        Predictor(small_model(), tf.distribute.get_strategy(), SINGLE_LABEL)(twice)


def test_no_images_is_an_error() -> None:
    predict = Predictor(small_model(), tf.distribute.get_strategy(), SINGLE_LABEL)
    with pytest.raises(RuntimeError, match="yields no images"):
        predict(stream(20, 8).take(0))
    padding = stream(20, 8).map(
        lambda images, labels, weights, index: (images, labels, 0 * weights, -tf.ones_like(index))
    )
    with pytest.raises(RuntimeError, match="nothing but padding"):
        predict(padding)


def made_predictions(labels: np.ndarray, logits: np.ndarray) -> Predictions:
    return Predictions(np.arange(len(labels)), labels.astype(np.int32), logits.astype(np.float32))


@settings(deadline=None, max_examples=30)
@given(data=st.data(), n=st.integers(1, 60), k=st.integers(2, 12))
def test_metrics_equal_those_of_scikit_learn(data: st.DataObject, n: int, k: int) -> None:
    labels = data.draw(hnp.arrays(np.int32, n, elements=st.integers(0, k - 1)))
    logits = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))).normal(0, 3, (n, k)).astype(np.float32)
    names = [f"c{i}" for i in range(k)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = evaluate_predictions(made_predictions(labels, logits), names, "val")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probabilities = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(1, keepdims=True)
        predicted = logits.argmax(1)
        assert got.metrics["loss"] == pytest.approx(
            log_loss(labels, probabilities, labels=range(k)), rel=1e-5, abs=1e-6
        )
        assert got.accuracy == pytest.approx((predicted == labels).mean())
        assert got.metrics["top5_accuracy"] == pytest.approx(
            top_k_accuracy_score(labels, logits, k=5, labels=range(k)) if k > 5 else 1.0
        )
        assert got.metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
        assert got.metrics["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))
        assert got.metrics["matthews_corrcoef"] == pytest.approx(matthews_corrcoef(labels, predicted))
        np.testing.assert_array_equal(got.confusion, confusion_matrix(labels, predicted, labels=range(k)))
        report = classification_report(
            labels, predicted, labels=range(k), target_names=names, output_dict=True, zero_division=np.nan
        )
    for _, row in got.per_class.iterrows():
        expected = report[row["class"]]
        got_row = [row["precision"], row["recall"], row["f1"], row["support"]]
        np.testing.assert_allclose(got_row, [expected[key] for key in ("precision", "recall", "f1-score", "support")])


def test_undefined_metrics_are_nan_and_leave_the_means_alone() -> None:
    logits = np.array([[2, 1, 0, 0], [2, 1, 0, 0], [0, 3, 0, 0]])
    got = evaluate_predictions(made_predictions(np.array([0, 1, 1]), logits), ["a", "b", "c", "d"], "test")
    assert got.per_class["support"].tolist() == [1, 2, 0, 0]
    np.testing.assert_allclose(got.per_class["precision"], [0.5, 1, np.nan, np.nan])
    np.testing.assert_allclose(got.per_class["recall"], [1, 0.5, np.nan, np.nan])
    assert got.metrics["balanced_accuracy"] == pytest.approx(0.75)
    assert got.metrics["macro_f1"] == pytest.approx(2 / 3)
    assert got.scalar_metrics() == {f"test/{name}": got.metrics[name] for name in METRICS}
    assert got.scalar_metrics()["test/accuracy"] == pytest.approx(2 / 3)
    assert got.scalar_metrics()["test/top5_accuracy"] == 1.0


def test_the_config_may_name_exactly_the_metrics_that_may_be_best() -> None:
    assert set(get_args(Metric)) == {name for name, spec in METRICS.items() if spec.may_be_best}
    assert all(METRICS[name].higher_is_better is not None for name in get_args(Metric))


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_one_form_that_defines_it(name: str) -> None:
    assert (METRICS[name].per_image is None) != (METRICS[name].from_counts is None)


def test_matthews_correlation_is_0_where_it_is_undefined() -> None:
    one_class = made_predictions(np.array([0, 1, 1]), np.array([[1, 0], [1, 0], [1, 0]]))
    assert evaluate_predictions(one_class, ["a", "b"], "val").metrics["matthews_corrcoef"] == 0
    right = made_predictions(np.array([0, 1, 1]), np.array([[1, 0], [0, 1], [0, 1]]))
    assert evaluate_predictions(right, ["a", "b"], "val").metrics["matthews_corrcoef"] == 1


def test_of_equal_logits_the_first_class_wins() -> None:
    got = evaluate_predictions(made_predictions(np.arange(8), np.zeros((8, 8))), list("abcdefgh"), "test")
    assert got.accuracy == 1 / 8
    assert got.metrics["top5_accuracy"] == 5 / 8
    assert got.confusion[:, 0].tolist() == [1] * 8
    assert got.metrics["loss"] == pytest.approx(np.log(8))


def test_confusion_has_true_classes_in_its_rows() -> None:
    got = evaluate_predictions(
        made_predictions(np.array([0, 0]), np.array([[0, 1, 0], [0, 1, 0]])), ["a", "b", "c"], "test"
    )
    assert got.confusion.dtype == np.int64
    assert got.confusion.tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 0]]


def test_extreme_logits_give_the_exact_loss() -> None:
    got = evaluate_predictions(made_predictions(np.array([0, 1]), np.array([[1e4, 0], [1e4, 0]])), ["a", "b"], "test")
    assert got.metrics["loss"] == pytest.approx(5000)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_diverged_model_gets_no_score(bad: float) -> None:
    with pytest.raises(RunError, match="not finite for 1 of the 2 images of the split val"):
        evaluate_predictions(made_predictions(np.array([0, 1]), np.array([[bad, 0], [1, 0]])), ["a", "b"], "val")
