"""A trained network as an estimator of scikit-learn, which must be installed for this: ``pip install scikit-learn``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_consistent_length, check_is_fitted, column_or_1d
from torch import Tensor

from applications.imaml.checkpoint import CheckpointName
from applications.imaml.config import BatchNorm, ConfigError
from applications.imaml.fewshot import Learner


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """Classifies images into classes of which it was shown a few.

    ``FewShotClassifier.load(RUN).fit(support_images, labels).predict(query_images)``

    ``fit`` solves the inner problem of meta-learning, phi* = argmin over phi of L_support(phi) + lam/2 |phi - theta|^2,
    from the meta-parameters theta of a run, with the solver that it was trained with. It takes a fraction of a second;
    the run is not changed. To choose where there are too few images to train a network from scratch, and a run exists
    that was trained on other classes of the same kind.

    Images are bytes from 0 to 255, or floats from 0 to 1, in the size and with the channels that the run was trained
    with: ``[count, channels, side, side]``, or with channels last, as Pillow and NumPy have them; flattened, channels
    first, to ``[count, channels * side * side]`` as scikit-learn has them; grey ones also ``[count, side, side]``.
    Labels are whatever scikit-learn takes for classes.

    Args:
        run: folder of a run.
        inner_steps: steps of the inner solver; None for as many as in training.
        batch_norm: "transductive" normalises the images to be classified by their own statistics: they are judged
            together, and an answer depends on what else is asked. "support" normalises them by those of the support
            images, each on its own. None as in training.
        device: "auto" for an accelerator if there is one, "cpu", "cuda", ...
        checkpoint: "last" for the network of the last meta-step, "best" for that of the highest accuracy on validation
            classes.

    Attributes:
        classes_: the labels, sorted.
        n_features_in_: number of pixels of an image times channels.
        learned_: the parameters that were found, with what they were found from.

    Source: Rajeswaran, Finn, Kakade, Levine, "Meta-Learning with Implicit Gradients" (2019), equation 3.
    """

    def __init__(
        self,
        run: str | os.PathLike[str] | None = None,
        inner_steps: int | None = None,
        batch_norm: BatchNorm | None = None,
        device: str = "auto",
        checkpoint: CheckpointName = "last",
    ) -> None:
        self.run = run
        self.inner_steps = inner_steps
        self.batch_norm: BatchNorm | None = batch_norm
        self.device = device
        self.checkpoint: CheckpointName = checkpoint

    @classmethod
    def load(cls, run: str | os.PathLike[str], **params: Any) -> FewShotClassifier:
        """An estimator for a run that is known to be readable.

        Args:
            run: folder of a run.
            **params: other parameters of the estimator.

        Returns:
            The estimator, not fitted.

        Raises:
            CheckpointError: if there is no checkpoint to read.
            ConfigError: if a parameter cannot be.
        """
        estimator = cls(run, **params)
        estimator._learner()
        return estimator

    def fit(self, X: ArrayLike, y: ArrayLike) -> FewShotClassifier:
        """Learn classes from support images.

        Args:
            X: support images, see the class.
            y: their labels, ``[count]``; at least two different ones, and at most as many as the run's tasks had.

        Returns:
            The estimator itself.

        Raises:
            CheckpointError: if the run cannot be read.
            ConfigError: if a parameter cannot be.
            ValueError: if images or labels cannot be learnt from.
        """
        learner = self._learner()
        images = _images(X, learner)
        labels = column_or_1d(y, warn=True)
        check_consistent_length(images, labels)
        check_classification_targets(labels)
        classes, places = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(
                f"y has 1 class, {classes[0]!r}, and there is nothing to tell it from; pass images of two."
            )
        self.learned_ = learner.learn(images, torch.from_numpy(places))
        self.classes_ = classes
        self.n_features_in_ = learner.channels * learner.side**2
        return self

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float32]:
        """The probability of each class.

        Args:
            X: images, see the class.

        Returns:
            ``[count, classes]``, in the order of ``classes_``.

        Raises:
            NotFittedError: if ``fit`` wasn't called.
            ValueError: if the images don't fit the network.
        """
        check_is_fitted(self)
        return self.learned_.probabilities(_images(X, self.learned_.learner)).numpy()

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The most probable class of each image.

        Args:
            X: images, see the class.

        Returns:
            Labels ``[count]``, of those that ``fit`` was given.

        Raises:
            NotFittedError: if ``fit`` wasn't called.
            ValueError: if the images don't fit the network.
        """
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(axis=1)]

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def _learner(self) -> Learner:
        if self.run is None:
            raise ConfigError("run=None has no network; pass the folder of a run, as FewShotClassifier.load(RUN) does.")
        return Learner.load(
            Path(self.run),
            device=self.device,
            inner_steps=self.inner_steps,
            batch_norm=self.batch_norm,
            checkpoint=self.checkpoint,
        )


def _images(X: ArrayLike, learner: Learner) -> Tensor:
    """Images as the network takes them, from any form in which they are accepted."""
    array = check_array(X, ensure_2d=False, allow_nd=True, input_name="X")
    scale = 255.0 if array.dtype == np.uint8 else 1.0
    images = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)) / scale
    whole = (learner.channels, learner.side, learner.side)
    if images.dim() == 2 and images.shape[1] == learner.channels * learner.side**2:
        return images.unflatten(1, whole)
    if list(images.shape[1:]) == [learner.side, learner.side, learner.channels]:
        return images.movedim(-1, 1)
    return images.unsqueeze(1) if images.dim() == 3 and learner.channels == 1 else images
