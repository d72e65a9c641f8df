"""Checkpoints survive a crash at any write, and a damaged one is refused."""

import os
from pathlib import Path

import pytest
import torch

from applications.imaml import checkpoint
from applications.imaml.checkpoint import Checkpoint, CheckpointError


class Crash(BaseException):
    """Stands for the process being gone: nothing catches it but the test."""


@pytest.mark.parametrize("survived", range(6))
def test_a_crash_at_any_write_leaves_the_old_checkpoint_or_the_new(tmp_path, monkeypatch, survived):
    old, new = (Checkpoint({"theta": torch.full((3,), value)}, {"meta_step": int(value)}) for value in (1.0, 2.0))
    checkpoint.save(tmp_path, 1, old)
    left = [survived]

    def crashing(function):
        def call(*arguments, **named):
            left[0] -= 1
            if left[0] < 0:
                raise Crash
            return function(*arguments, **named)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", crashing(os.fsync))
        patched.setattr(Path, "replace", crashing(Path.replace))
        # The process is gone, so nothing is tidied up either.
        patched.setattr(Path, "unlink", crashing(Path.unlink))
        with pytest.raises(Crash):
            checkpoint.save(tmp_path, 2, new)
    found = checkpoint.load(tmp_path)
    expected = new if found.numbers["meta_step"] == 2 else old
    assert found.numbers == expected.numbers
    assert torch.equal(found.tensors["theta"], expected.tensors["theta"])
    checkpoint.save(tmp_path, 3, new)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_a_full_disk_is_told_and_the_checkpoint_before_stays(tmp_path, monkeypatch):
    numbered = Checkpoint({"theta": torch.ones(2)}, {})
    checkpoint.save(tmp_path, 1, numbered)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(CheckpointError, match=r"step 2 could not be written .*No space left.*--resume"):
            checkpoint.save(tmp_path, 2, numbered)
    assert torch.equal(checkpoint.load(tmp_path).tensors["theta"], torch.ones(2))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "checkpoint.json").unlink(), "no readable checkpoint"),
        (lambda folder: (folder / "checkpoint.json").write_text("{"), "no readable checkpoint"),
        (lambda folder: (folder / "checkpoint.json").write_text('{"schema": 2}'), "schema 2, and this version reads 1"),
        (lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"x" * 99), "SHA-256 differs"),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), "no readable checkpoint"),
    ],
    ids=["pointer gone", "pointer cut", "other schema", "tensors damaged", "tensors gone"],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, damage, message):
    checkpoint.save(tmp_path, 1, Checkpoint({"theta": torch.ones(2)}, {}))
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path)
