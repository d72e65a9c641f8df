"""What a training run is asked to do: checked once, saved with the run, read back to continue or evaluate it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from applications.datasets import SPLITS
from applications.imaml.checkpoint import write_atomically

DataName = Literal["glyphs", "omniglot", "mini-imagenet", "folder", "sinusoid"]
AlgorithmName = Literal["imaml", "maml", "anil", "fomaml", "reptile"]
InnerName = Literal["gradient", "hessian-free", "adam", "lbfgs"]
LearnLam = Literal["none", "scalar", "layer"]
ScheduleName = Literal["cosine", "constant"]
CurvatureName = Literal["gauss-newton", "hessian", "hessian-unguarded", "published"]
BatchNorm = Literal["transductive", "support"]
PrecisionName = Literal["float32", "tf32", "bf16"]
ConvolutionName = Literal["auto", "windows", "grouped"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "data": get_args(DataName),
    "algorithm": get_args(AlgorithmName),
    "learn_lam": get_args(LearnLam),
    "curvature": get_args(CurvatureName),
    "schedule": get_args(ScheduleName),
    "batch_norm": get_args(BatchNorm),
    "precision": get_args(PrecisionName),
    "convolution": get_args(ConvolutionName),
}
_AT_LEAST_ONE = [
    "shots",
    "queries",
    "query_sets",
    "inner_steps",
    "cg_steps",
    "meta_steps",
    "tasks",
    "log_every",
    "checkpoint_every",
    "validate_every",
    "validation_tasks",
]
_POSITIVE = ("inner_lr", "meta_lr")
OF_IMAGES = (
    *("root", "ways", "query_sets", "batch_norm", "split_seed", "split", "image_size", "channels", "convolution"),
)
"""Settings that mean nothing where tasks are of numbers."""
NO_IMAGES = "is of images in classes, and the tasks of data='sinusoid' are of numbers"
TORCH = "torch."
"""How the name of an inner solver begins that is an optimizer of ``torch.optim``."""
# Of vectors, with dense gradients; Muon takes matrices.
_OPTIMIZERS = (
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS"),
    *("NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
)
# Those through whose solution or path a gradient reaches the strength.
_LEARNS_LAM = ("imaml", "maml", "anil")
_PATH = ("maml", "anil")


class ConfigError(ValueError):
    """A setting that cannot be: says what was passed, why it cannot be, and what to pass instead."""


def _option(default: Any, told: str) -> Any:
    return field(default=default, metadata={"help": told})


@dataclass(frozen=True)
class Config:
    """Settings of a training run; ``help_of`` tells what each means.

    Raises:
        ConfigError: if a value cannot be.
    """

    data: DataName = _option(
        "glyphs",
        "dataset: glyphs (drawn on the spot); omniglot, mini-imagenet or folder (read from --root); or sinusoid, "
        "regression of sine waves",
    )
    root: str | None = _option(None, "folder with the files of a dataset that is read")
    ways: int = _option(5, "classes of a task")
    shots: int = _option(1, "support images of a class; of sinusoid, support points of a task")
    queries: int = _option(1, "query images of a class, or query points of a task")
    query_sets: int = _option(1, "query sets a training task is judged by, each normalised by itself")
    algorithm: AlgorithmName = _option(
        "imaml", "imaml; maml: through the inner steps; anil: the same for the last layer alone; fomaml; reptile"
    )
    inner: str = _option(
        "gradient", "inner solver: gradient (descent), hessian-free (Newton), adam, lbfgs, or torch.NAME of torch.optim"
    )
    lam: float = _option(0.1, "strength of the pull towards the meta-parameters, lam/2 |phi - theta|^2; 0 for none")
    learn_lam: LearnLam = _option("none", "learn it, from there: one (scalar) or one for each layer (layer)")
    path_steps: int | None = _option(
        None, "last inner steps that maml and anil differentiate, those before as fomaml does; None: all"
    )
    inner_lr: float = _option(0.4, "step size of gradient descent, adam or torch.NAME on a task's mean loss")
    inner_steps: int = _option(5, "steps of the inner solver, in training and evaluation alike")
    cg_steps: int = _option(3, "conjugate gradient steps for the meta-gradient and for a hessian-free direction")
    curvature: CurvatureName = _option(
        "gauss-newton",
        "curvature in imaml's meta-gradient: gauss-newton; hessian, CG stopping where it is negative; "
        "hessian-unguarded, the paper's CG, which goes on; published, the operator of the paper's code",
    )
    damping: float = _option(0.0, "added to that curvature, beyond lam")
    batch_norm: BatchNorm = _option("transductive", "statistics for query images: of the query batch, or the support's")
    meta_lr: float = _option(1.5e-3, "learning rate of Adam on the meta-parameters")
    schedule: ScheduleName = _option("cosine", "of that rate: cosine (down to 0 at the last meta-step) or constant")
    meta_steps: int = _option(6000, "meta-steps after which training is complete")
    tasks: int = _option(16, "tasks of a meta-step")
    device: str = _option("auto", "auto (an accelerator if there is one), cpu, cuda, cuda:1, ...")
    precision: PrecisionName = _option(
        "float32", "of the network's products in training: float32, tf32 (CUDA devices) or bf16; all else is float32"
    )
    convolution: ConvolutionName = _option(
        "auto", "convolutions as products of gathered windows (windows), as PyTorch's own (grouped), or by network"
    )
    graph: bool = _option(False, "on a CUDA device, the whole meta-step as one CUDA graph: the same bits, sooner")
    threads: int = _option(0, "CPU threads; 0 leaves PyTorch's choice")
    seed: int = _option(0, "chooses the initialisation and the tasks")
    split_seed: int = _option(0, "chooses the generated characters, and which classes are for testing")
    split: str | None = _option(None, "name of the split into training, validation and test classes; None: its own")
    image_size: int | None = _option(None, "height and width that images are resized to; None: as the dataset has it")
    channels: int | None = _option(None, "1 for grey or 3 for colour; None: as the dataset has it")
    log_every: int = _option(25, "meta-steps averaged into one row of metrics.csv")
    checkpoint_every: int = _option(100, "meta-steps between checkpoints")
    validate_every: int = _option(500, "meta-steps between validations on unseen tasks; a multiple of log_every")
    validation_tasks: int = _option(200, "tasks of a validation")

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name}={value!r} is not known; pass one of {', '.join(choices)}.")
        for name in _AT_LEAST_ONE:
            _check_integer(name, getattr(self, name), 1)
        _check_integer("ways", self.ways, 2)
        _check_integer("threads", self.threads, 0)
        _check_integer("seed", self.seed, 0)
        _check_integer("split_seed", self.split_seed, 0)
        for name in _POSITIVE:
            _check_number(name, getattr(self, name), positive=True)
        _check_number("lam", self.lam, positive=False)
        _check_number("damping", self.damping, positive=False)
        self._check_data()
        self._check_inner()
        self._check_algorithm()
        if self.validate_every % self.log_every:
            raise ConfigError(
                f"validate_every={self.validate_every} is not a multiple of log_every={self.log_every}, and a "
                f"validation stands in a row of the metrics; pass for instance "
                f"validate_every={self.log_every * max(1, round(self.validate_every / self.log_every))}."
            )

    @property
    def is_regression(self) -> bool:
        """Whether a task asks for numbers, not for classes."""
        return self.data == "sinusoid"

    @property
    def size(self) -> str:
        """How large a task is, in the field's words: "5-way 1-shot"; "10-shot" where there are no classes."""
        return f"{self.shots}-shot" if self.is_regression else f"{self.ways}-way {self.shots}-shot"

    def check_classes(self) -> None:
        """Refuse regression where classes are needed.

        Raises:
            ConfigError: if tasks have none.
        """
        if self.is_regression:
            raise ConfigError(
                f"data={self.data!r} cannot be here: its tasks ask for numbers, and this is of images in classes; pass "
                f"images, such as data='glyphs', or use train and evaluate, which take both."
            )

    def _check_data(self) -> None:
        if self.is_regression:
            for name in OF_IMAGES:
                if getattr(self, name) != getattr(Config, name):
                    raise ConfigError(f"{name}={getattr(self, name)!r} {NO_IMAGES}; leave it out.")
            return
        if self.data != "glyphs" and self.root is None:
            raise ConfigError(
                f"root=None, but {self.data} is read from files; pass the folder that they are in, or data='glyphs', "
                f"which needs none."
            )
        if self.split is not None and self.split not in SPLITS[self.data]:
            raise ConfigError(
                f"split={self.split!r} is no split of {self.data}; pass one of {', '.join(SPLITS[self.data])}, or "
                f"leave it out."
            )
        if self.image_size is not None:
            _check_integer("image_size", self.image_size, 16)
        allowed = (1,) if self.data == "glyphs" else (1, 3)
        if self.channels is not None and self.channels not in allowed:
            told = " or ".join(map(str, allowed))
            raise ConfigError(f"channels={self.channels!r} cannot be with {self.data}; pass {told}, or leave it out.")

    def _check_inner(self) -> None:
        name = self.inner.removeprefix(TORCH) if isinstance(self.inner, str) else None
        if self.inner in get_args(InnerName) or (name != self.inner and name in _OPTIMIZERS):
            return
        raise ConfigError(
            f"inner={self.inner!r} is not known; pass one of {', '.join(get_args(InnerName))}, or {TORCH}NAME with one "
            f"of {', '.join(_OPTIMIZERS)}."
        )

    def _check_algorithm(self) -> None:
        if self.algorithm == "imaml" and not self.lam:
            raise ConfigError(
                "lam=0 cannot be with imaml, whose solution depends on the meta-parameters through the pull alone; "
                "pass a number above 0, or algorithm='maml'."
            )
        if self.algorithm in _PATH and (self.inner.startswith(TORCH) or self.inner == "hessian-free"):
            why = (
                "a few conjugate gradient steps would be differentiated as if they had converged"
                if self.inner == "hessian-free"
                else "the steps of torch.optim leave no graph to differentiate"
            )
            raise ConfigError(
                f"inner={self.inner!r} cannot be with {self.algorithm}: {why}; pass inner='gradient', 'adam' or "
                f"'lbfgs', or algorithm='imaml' or 'fomaml'."
            )
        self._check_learnt_strength()
        self._check_path_steps()
        if self.algorithm != "imaml" and (self.damping or self.curvature != "gauss-newton"):
            raise ConfigError(
                f"curvature={self.curvature!r} and damping={self.damping!r} are of imaml's linear system, and "
                f"{self.algorithm} has none; leave both out, or pass algorithm='imaml'."
            )
        if self.curvature == "published" and (self.damping or self.learn_lam != "none"):
            raise ConfigError(
                "curvature='published' has a damping of its own, made from a given lam; pass damping=0 and "
                "learn_lam='none', or another curvature."
            )

    def _check_learnt_strength(self) -> None:
        if self.learn_lam == "none":
            return
        if self.algorithm not in _LEARNS_LAM:
            raise ConfigError(
                f"learn_lam={self.learn_lam!r} cannot be with {self.algorithm}, whose meta-gradient has no part for "
                f"lam; pass algorithm={' or '.join(map(repr, _LEARNS_LAM))}, or learn_lam='none'."
            )
        if not self.lam:
            raise ConfigError("lam=0 cannot be learnt from, since its logarithm is what is learnt; pass one above 0.")

    def _check_path_steps(self) -> None:
        if self.path_steps is None:
            return
        _check_integer("path_steps", self.path_steps, 1)
        if self.algorithm not in _PATH:
            raise ConfigError(
                f"path_steps={self.path_steps} cannot be with {self.algorithm}, which doesn't differentiate the path; "
                f"pass algorithm={' or '.join(map(repr, _PATH))}, or leave it out."
            )
        if self.inner != "gradient":
            raise ConfigError(
                f"path_steps={self.path_steps} cannot be with inner={self.inner!r}, whose steps share a memory that "
                f"the cut would lose; pass inner='gradient', or leave it out."
            )

    def save(self, path: Path) -> None:
        """Write the settings as JSON.

        Args:
            path: file to write.
        """
        write_atomically(path, (json.dumps(asdict(self), indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Config:
        """Read settings that ``save`` wrote.

        A setting that is missing was not there yet when the run was made, and its default does what was done then.

        Args:
            path: file to read.

        Returns:
            The settings.

        Raises:
            ConfigError: if the file is missing, is not JSON, or holds settings that are not known here.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(f"{path} does not exist, so there is no run; pass the folder of a run.") from error
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON ({error}); restore it, or start a run in a new folder.") from error
        known = {entry.name for entry in fields(cls)}
        if not isinstance(values, dict) or not set(values) <= known:
            strange = sorted(set(values) - known) if isinstance(values, dict) else type(values).__name__
            raise ConfigError(
                f"{path} does not hold the settings of this version (it has {strange}); read it with the version that "
                f"wrote it, or start a run in a new folder."
            )
        return cls(**values)


def usual_lam(algorithm: AlgorithmName) -> float:
    """The strength of the pull that an algorithm is used with.

    Args:
        algorithm: its name.

    Returns:
        The default for iMAML; 0, as published, for those that were conceived without a pull.
    """
    return Config.lam if algorithm == "imaml" else 0.0


def help_of(name: str) -> str:
    """What a setting means.

    Args:
        name: a field of ``Config``.

    Returns:
        One line.
    """
    return next(entry.metadata["help"] for entry in fields(Config) if entry.name == name)


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r} cannot be; pass an integer of at least {least}.")


def _check_number(name: str, value: object, *, positive: bool) -> None:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        wanted = "above 0" if positive else "of at least 0"
        raise ConfigError(f"{name}={value!r} cannot be; pass a finite number {wanted}.")
