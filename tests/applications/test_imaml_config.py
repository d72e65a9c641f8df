"""Settings that cannot be are refused with what was passed, why it cannot be, and what to pass."""

import json

import pytest

from applications.imaml.config import Config, ConfigError


def test_settings_are_read_back_as_they_were_saved(tmp_path):
    settings = Config(data="omniglot", root="somewhere", lam=0.25, curvature="hessian", seed=3)
    settings.save(tmp_path / "config.json")
    assert Config.load(tmp_path / "config.json") == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "mnist"}, "data='mnist' is not known; pass one of glyphs, omniglot, mini-imagenet, folder"),
        ({"algorithm": "sgd"}, "algorithm='sgd' is not known; pass one of imaml, maml, anil, fomaml, reptile"),
        ({"precision": "fp16"}, "precision='fp16' is not known; pass one of float32, tf32, bf16"),
        ({"convolution": "fft"}, "convolution='fft' is not known; pass one of auto, windows, grouped"),
        ({"ways": 1}, "ways=1 cannot be; pass an integer of at least 2"),
        ({"tasks": 0}, "tasks=0 cannot be; pass an integer of at least 1"),
        ({"tasks": 2.0}, "tasks=2.0 cannot be; pass an integer"),
        ({"shots": True}, "shots=True cannot be"),
        ({"lam": 0.0}, "lam=0 cannot be with imaml, whose solution depends on the meta-parameters through the pull"),
        ({"lam": -1.0}, "lam=-1.0 cannot be; pass a finite number of at least 0"),
        ({"lam": float("nan")}, "lam=nan cannot be"),
        ({"inner": "sgd"}, "inner='sgd' is not known; pass one of gradient, hessian-free, adam, lbfgs, or torch.NAME"),
        ({"inner": "torch.Muon"}, "inner='torch.Muon' is not known; pass .* one of ASGD, .*, SGD"),
        ({"inner": "SGD"}, "inner='SGD' is not known"),
        ({"inner": None}, "inner=None is not known"),
        ({"algorithm": "maml", "inner": "torch.SGD"}, "inner='torch.SGD' cannot be with maml: .* no graph"),
        ({"algorithm": "anil", "inner": "torch.Adam"}, "inner='torch.Adam' cannot be with anil"),
        ({"algorithm": "maml", "inner": "hessian-free"}, "inner='hessian-free' cannot be with maml: .* had converged"),
        ({"learn_lam": "both"}, "learn_lam='both' is not known; pass one of none, scalar, layer"),
        (
            {"algorithm": "fomaml", "learn_lam": "scalar"},
            "learn_lam='scalar' cannot be with fomaml, .* no part for lam",
        ),
        ({"algorithm": "reptile", "learn_lam": "layer"}, "learn_lam='layer' cannot be with reptile"),
        ({"algorithm": "maml", "lam": 0, "learn_lam": "layer"}, "lam=0 cannot be learnt from"),
        ({"path_steps": 2}, "path_steps=2 cannot be with imaml, .* pass algorithm='maml' or 'anil'"),
        ({"algorithm": "maml", "path_steps": 0}, "path_steps=0 cannot be; pass an integer of at least 1"),
        (
            {"algorithm": "maml", "path_steps": 2, "inner": "adam"},
            "path_steps=2 cannot be with inner='adam', .* memory",
        ),
        ({"algorithm": "reptile", "curvature": "hessian"}, "curvature='hessian' and damping=0.0 are of imaml's linear"),
        ({"algorithm": "maml", "damping": 0.5}, "damping=0.5 are of imaml's linear system, and maml has none"),
        ({"curvature": "published", "damping": 1.0}, "curvature='published' has a damping of its own"),
        ({"curvature": "published", "learn_lam": "scalar"}, "curvature='published' has a damping of its own"),
        ({"damping": -1.0}, "damping=-1.0 cannot be; pass a finite number of at least 0"),
        ({"seed": -1}, "seed=-1 cannot be"),
        ({"data": "omniglot"}, "root=None, but omniglot is read from files"),
        ({"data": "folder"}, "root=None, but folder is read from files"),
        ({"split": "lake"}, "split='lake' is no split of glyphs; pass one of seed, or leave it out"),
        ({"data": "omniglot", "root": "x", "split": "seed"}, "split='seed' is no split of omniglot; pass one of maml"),
        ({"image_size": 8}, "image_size=8 cannot be; pass an integer of at least 16"),
        ({"channels": 3}, "channels=3 cannot be with glyphs"),
        (
            {"data": "folder", "root": "x", "channels": 2},
            "channels=2 cannot be with folder; pass 1 or 3, or leave it out",
        ),
        ({"log_every": 20, "validate_every": 50}, "validate_every=50 is not a multiple of log_every=20"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config(**settings)


def test_a_setting_that_was_not_there_yet_has_its_default(tmp_path):
    path = tmp_path / "config.json"
    settings = Config(lam=0.25, ways=7)
    settings.save(path)
    values = json.loads(path.read_text())
    for name in ("graph", "precision", "convolution"):
        del values[name]
    path.write_text(json.dumps(values))
    assert Config.load(path) == settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("{", "is not JSON"),
        ("[]", r"\(it has list\)"),
        ('{"ways": 5, "lambda": 0.1}', r"does not hold the settings of this version \(it has \['lambda'\]\)"),
        ('{"ways": 1}', "ways=1 cannot be"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(tmp_path, text, message):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Config.load(path)
