"""Classify one's own images: class folders to learn from, images to be told, a table and a picture of the answers."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from applications.datasets.archives import files_below
from applications.datasets.decoding import Form, decode
from applications.datasets.trees import class_files, image_files
from applications.imaml.checkpoint import write_atomically
from applications.imaml.config import ConfigError
from applications.imaml.fewshot import Learner
from applications.imaml.words import counted

TABLE, SHEET = "answers.csv", "answers.png"


@dataclass(frozen=True)
class Answers:
    """Images and what they were taken for.

    Args:
        classes: names of the classes, sorted.
        support_images: what was learnt from, float32 ``[supports, channels, side, side]``.
        support_labels: the class of each, ``[supports]``.
        query_images: what was asked, likewise ``[queries, ...]``.
        query_names: their paths below the folder of queries.
        truths: the class whose folder each lies in, or -1 if it lies in none, ``[queries]``.
        probabilities: of each class, ``[queries, classes]``.
        ignored: number of files in both folders that are no images, or hidden.
    """

    classes: tuple[str, ...]
    support_images: Tensor
    support_labels: Tensor
    query_images: Tensor
    query_names: tuple[str, ...]
    truths: Tensor
    probabilities: Tensor
    ignored: int = 0

    def __str__(self) -> str:
        known = self.truths >= 0
        told = f"{counted(len(self.query_names), 'image')}, {len(self.classes)} classes"
        if not known.any():
            return told
        right = int((self.labels == self.truths)[known].sum())
        return f"{told}, {right} of {int(known.sum())} in class folders right ({100 * right / int(known.sum()):.1f} %)"

    @property
    def labels(self) -> Tensor:
        """The most probable class of each query image, ``[queries]``."""
        return self.probabilities.argmax(-1)

    def save(self, path: Path) -> None:
        """Write one line an image: its path, its answer, its own class if it is known, and all probabilities.

        Args:
            path: CSV to write.
        """
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["file", "answer", "truth", *(f"p({name})" for name in self.classes)])
        for name, label, truth, row in zip(
            self.query_names, self.labels.tolist(), self.truths.tolist(), self.probabilities.tolist(), strict=True
        ):
            own = self.classes[truth] if truth >= 0 else ""
            writer.writerow([name, self.classes[label], own, *(f"{probability:.6f}" for probability in row)])
        write_atomically(path, text.getvalue().encode())


def answer(learner: Learner, support: Path, query: Path) -> Answers:
    """Learn the classes of one folder, and classify the images of another.

    Args:
        learner: the trained network.
        support: one folder of images for each class.
        query: images, in folders or not; a folder named like a class says that its images are of it.

    Returns:
        The answers.

    Raises:
        OSError: if a folder isn't there or cannot be read.
        ValueError: if an image is damaged, or there are too few or too many classes.
    """
    form = Form(learner.side, learner.channels)
    files = class_files(support)
    classes: tuple[str, ...] = tuple(files)
    if len(classes) < 2:
        raise ValueError(
            f"{support} has one class, {next(iter(files))}, and there is nothing to tell it from; give folders of two "
            f"or more."
        )
    paths = [(path, label) for label, name in enumerate(classes) for path in files[name]]
    images = _decoded([path for path, _ in paths], form)
    labels = torch.tensor([label for _, label in paths])
    learned = learner.learn(images, labels)

    asked = image_files(query, "a folder with the images to classify")
    places = {name: label for label, name in enumerate(classes)}
    truths = torch.tensor([places.get(path.relative_to(query).parent.as_posix(), -1) for path in asked])
    queries = _decoded(asked, form)
    names = tuple(path.relative_to(query).as_posix() for path in asked)
    ignored = sum(1 for folder in (support, query) for _ in files_below(folder)) - len(paths) - len(asked)
    return Answers(classes, images, labels, queries, names, truths, learned.probabilities(queries), ignored)


def check_outside(out: Path, support: Path, query: Path) -> None:
    """Refuse a folder for answers among the images: the next time its picture would be asked about as well.

    Args:
        out: folder for the answers.
        support: folder of the images to learn from.
        query: folder of those to classify.

    Raises:
        ConfigError: if it is in one of the others.
    """
    for name, images in (("support", support), ("query", query)):
        if out.resolve().is_relative_to(images.resolve()):
            raise ConfigError(
                f"out={str(out)!r} lies in {name}={str(images)!r}, and the picture of the answers would be taken for "
                f"one of its images the next time; pass a folder outside of it."
            )


def _decoded(paths: list[Path], form: Form) -> Tensor:
    pixels = np.stack([decode(path.read_bytes(), str(path), form) for path in paths])
    return torch.from_numpy(pixels).float().div(255)
