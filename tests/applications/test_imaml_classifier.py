"""The estimator: answers those of the algorithm, scikit-learn's conventions, and what it refuses."""

import pickle
from unittest import SkipTest

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import estimator_checks_generator
from sklearn.utils.validation import check_is_fitted, validate_data

from applications.imaml.algorithms import adapt, query_logits
from applications.imaml.checkpoint import CheckpointError
from applications.imaml.classifier import FewShotClassifier
from applications.imaml.config import ConfigError
from applications.imaml.episodes import Tasks, TaskSampler, generator_for
from applications.imaml.evaluate import load_network
from applications.imaml.fewshot import Learner
from tests.helpers.runs import SMALL


@pytest.fixture(scope="module")
def task(characters):
    """Support and query images of five characters, bytes, with names for labels."""
    labels = np.array(["e", "b", "a", "d", "c"])
    images = characters.images[30:35].numpy()
    return (
        images[:, :3].reshape(-1, 1, 28, 28),
        labels.repeat(3),
        images[:, 3:13].reshape(-1, 1, 28, 28),
        labels.repeat(10),
    )


@pytest.mark.parametrize("batch_norm", ["support", "transductive"])
def test_answers_are_those_of_the_algorithm(run, task, batch_norm):
    support, labels, query, _ = task
    classifier = FewShotClassifier.load(run, batch_norm=batch_norm, device="cpu")
    assert classifier.fit(support, labels) is classifier
    assert classifier.classes_.tolist() == ["a", "b", "c", "d", "e"]
    places = torch.from_numpy(np.searchsorted(classifier.classes_, labels))
    theta = load_network(run, torch.device("cpu")).theta
    given = Tasks(torch.from_numpy(support) / 255, places, torch.from_numpy(query) / 255, places)
    with torch.no_grad():
        expected = query_logits(adapt(theta, given, SMALL).value, given, batch_norm).softmax(-1)
    np.testing.assert_allclose(classifier.predict_proba(query), expected.numpy(), rtol=1e-4, atol=1e-6)
    assert (classifier.predict(query) == classifier.classes_[expected.argmax(-1).numpy()]).all()


def test_it_learns(run, task):
    support, labels, query, truth = task
    classifier = FewShotClassifier.load(run, inner_steps=20).fit(support, labels)
    # Chance is 0.2, and the standard deviation of 50 guesses 0.06.
    assert classifier.score(query, truth) > 0.5
    # The order in which classes come must not matter to which is which.
    order = np.random.default_rng(0).permutation(len(labels))
    shuffled = clone(classifier).fit(support[order], labels[order])
    np.testing.assert_allclose(shuffled.predict_proba(query), classifier.predict_proba(query), rtol=1e-2, atol=1e-3)


def test_a_task_of_the_sampler_is_answered_as_in_evaluation(run, characters):
    sampled = TaskSampler(characters, 5, 1, 4, generator_for(0, "it")).sample(1)
    first = Tasks(*(part[0] for part in sampled))
    learner = Learner.load(run, device="cpu")
    found = learner.learn(first.support_images, first.support_labels).probabilities(first.query_images)
    with torch.no_grad():
        expected = query_logits(adapt(learner.theta, first, SMALL).value, first, SMALL.batch_norm).softmax(-1)
    torch.testing.assert_close(found, expected)


def test_every_form_of_the_images_gives_the_same(run, task):
    support, labels, query, _ = task
    expected = FewShotClassifier(run).fit(support, labels).predict_proba(query)
    for form in (
        lambda images: images / np.float32(255),
        lambda images: images / 255.0,
        lambda images: images[:, 0],
        lambda images: images.reshape(len(images), -1),
        lambda images: np.moveaxis(images, 1, -1),
        lambda images: torch.from_numpy(images),
        lambda images: (images / 255.0).tolist(),
    ):
        found = FewShotClassifier(run).fit(form(support), labels).predict_proba(form(query))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_fewer_classes_and_unequal_numbers_of_images(run, task):
    support, labels, query, truth = task
    some = np.isin(labels, ["a", "b", "c"]) & ~((labels == "a") & (np.arange(len(labels)) % 3 > 0))
    classifier = FewShotClassifier(run, batch_norm="support").fit(support[some], labels[some])
    assert classifier.classes_.tolist() == ["a", "b", "c"]
    probabilities = classifier.predict_proba(query)
    assert probabilities.shape == (50, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert set(classifier.predict(query)) <= {"a", "b", "c"}
    assert classifier.score(query[np.isin(truth, ["a", "b", "c"])], truth[np.isin(truth, ["a", "b", "c"])]) > 0.4


def test_only_with_support_statistics_is_an_image_judged_alone(run, task):
    support, labels, query, _ = task
    alone, together = (
        FewShotClassifier(run, batch_norm=mode).fit(support, labels) for mode in ("support", "transductive")
    )
    np.testing.assert_allclose(alone.predict_proba(query[:1]), alone.predict_proba(query)[:1], rtol=1e-4)
    assert not np.allclose(together.predict_proba(query[:1]), together.predict_proba(query)[:1], rtol=0.05)


def test_a_fitted_estimator_needs_the_run_no_more(run, task, tmp_path):
    support, labels, query, _ = task
    classifier = FewShotClassifier(run).fit(support, labels)
    copied = pickle.loads(pickle.dumps(classifier))
    copied.run = tmp_path / "gone"
    np.testing.assert_array_equal(copied.predict_proba(query), classifier.predict_proba(query))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda X, y: (X[:, :, :14], y),
            r"shape \[15, 1, 14, 28\], but the network takes \['count', 1, 28, 28\].*resize",
        ),
        (lambda X, y: (X.reshape(15, -1)[:, :100], y), r"shape \[15, 100\]"),
        (lambda X, y: (X.repeat(3, 1), y), r"shape \[15, 3, 28, 28\]"),
        (lambda X, y: (X.astype(np.float32), y), r"range from 0 to 255, but .* 0 \(black\) to 1 \(white\); pass bytes"),
        (lambda X, y: (X.astype(np.int64), y), "range from 0 to 255"),
        (lambda X, y: (X / 255 - 0.5, y), "range from -0.5"),
        (lambda X, y: (np.full(X.shape, np.nan), y), "NaN"),
        (lambda X, y: (X, y[:-1]), r"inconsistent numbers of samples: \[15, 14\]"),
        (lambda X, y: (X, np.full(15, "a")), "y has 1 class, .*'a'"),
        (lambda X, y: (X, np.arange(15)), "there are 15 classes, .* trained to tell 5 apart.*--ways 15"),
        (lambda X, y: (X, np.linspace(0, 1, 15)), "Unknown label type"),
        (lambda X, y: (X[:0], y[:0]), "0 sample"),
    ],
)
def test_what_cannot_be_learnt_from(run, task, change, message):
    support, labels, _, _ = task
    with pytest.raises(ValueError, match=message):
        FewShotClassifier(run).fit(*change(support, labels))


def test_images_that_cannot_be_classified(run, task):
    support, labels, query, _ = task
    with pytest.raises(NotFittedError):
        FewShotClassifier(run).predict(query)
    with pytest.raises(ValueError, match=r"shape \[50, 1, 27, 28\]"):
        FewShotClassifier(run).fit(support, labels).predict(query[:, :, 1:])


def test_runs_that_cannot_be_read(tmp_path, run):
    with pytest.raises(ConfigError, match="there is no run"):
        FewShotClassifier.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"run=None has no network; pass the folder"):
        FewShotClassifier().fit([[0.0]], [0])
    with pytest.raises(ConfigError, match="inner_steps=0 cannot be"):
        FewShotClassifier.load(run, inner_steps=0)
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="has no readable checkpoint"):
        FewShotClassifier.load(tmp_path)


class OnFeatures(ClassifierMixin, BaseEstimator):
    """The estimator behind images that show a few features, as scikit-learn's checks have them, as grey stripes."""

    run = None

    def __init__(self, inner_steps=1):
        self.inner_steps = inner_steps

    def fit(self, X, y):
        X, y = validate_data(self, X, y)
        self.classifier_ = FewShotClassifier(self.run, self.inner_steps, "support", "cpu").fit(self.drawn(X), y)
        self.classes_ = self.classifier_.classes_
        return self

    def predict(self, X):
        check_is_fitted(self)
        return self.classifier_.predict(self.drawn(validate_data(self, X, reset=False)))

    def predict_proba(self, X):
        check_is_fitted(self)
        return self.classifier_.predict_proba(self.drawn(validate_data(self, X, reset=False)))

    def drawn(self, X):
        stripes = 1 / (1 + np.exp(-np.clip(X, -20, 20)))
        return np.resize(stripes.T, (28, len(X))).T[:, None, :, None].repeat(28, axis=3).astype(np.float32)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = True
        return tags


API = (
    "check_estimator_cloneable", "check_estimator_tags_renamed", "check_valid_tag_types", "check_estimator_repr",
    "check_no_attributes_set_in_init", "check_do_not_raise_errors_in_init_or_set_params", "check_mixin_order",
    "check_parameters_default_constructible", "check_get_params_invariance", "check_set_params",
    "check_estimators_unfitted", "check_estimator_get_tags_default_keys",
)  # fmt: skip


def name_of(check):
    return getattr(check, "func", check).__name__


def test_scikit_learn_checks_of_the_interface(run):
    done = []
    for estimator, check in estimator_checks_generator(FewShotClassifier(run, device="cpu")):
        if name_of(check) in API:
            check(estimator)
            done.append(name_of(check))
    assert len(done) >= 9


@pytest.mark.slow
def test_scikit_learn_checks_of_the_behaviour(run, monkeypatch):
    monkeypatch.setattr(OnFeatures, "run", run)
    passed, skipped = [], []
    for estimator, check in estimator_checks_generator(OnFeatures()):
        try:
            check(estimator)
            passed.append(name_of(check))
        except SkipTest:
            skipped.append(name_of(check))
    assert len(passed) > 40
    # They need pandas, or a setting of SciPy.
    assert set(skipped) <= {"check_array_api_input", "check_classifier_data_not_an_array"}


def test_a_checkpoint_that_there_never_is_is_refused(run, task):
    support, labels, _, _ = task
    with pytest.raises(ConfigError, match="checkpoint='x' is not known; pass one of last, best"):
        FewShotClassifier(run, checkpoint="x").fit(support, labels)
