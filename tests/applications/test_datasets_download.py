"""Downloads from a server on this machine: whole and as published, or not at all, with what was wrong."""

import hashlib
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import pytest

from applications.datasets.download import download

PROJECT = Path(__file__).resolve().parents[2]


def archive(text):
    file = BytesIO()
    with ZipFile(file, "w") as opened:
        opened.writestr("a", text * 100)
    return file.getvalue()


ARCHIVES = {
    name: archive(name)
    for name in ("images_background", "images_evaluation", "images_background_small1", "images_background_small2")
}
CHECKSUMS = {name: hashlib.md5(content).hexdigest() for name, content in ARCHIVES.items()}


@pytest.fixture
def server(monkeypatch):
    """Serves ``pages``, by name of the archive; None cuts the connection after half the file."""
    pages, asked = dict(ARCHIVES), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.strip("/").removesuffix(".zip")
            asked.append(name)
            if name not in pages:
                self.send_error(404)
                return
            content = pages[name]
            self.send_response(200)
            self.send_header("Content-Length", str(len(ARCHIVES[name] if content is None else content)))
            self.end_headers()
            self.wfile.write(ARCHIVES[name][:50] if content is None else content)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield SimpleNamespace(address=f"http://127.0.0.1:{running.server_port}", pages=pages, asked=asked)
        running.shutdown()
        thread.join()


def fetch(server, root, **options):
    return download("omniglot", root, address=server.address, checksums=CHECKSUMS, **options)


@pytest.mark.parametrize(
    ("minimal", "names"),
    [
        (None, ["images_background", "images_evaluation"]),
        ("small2", ["images_background_small2", "images_evaluation"]),
    ],
)
def test_archives_are_fetched_once(server, tmp_path, minimal, names):
    root = tmp_path / "new" / "folder"
    assert fetch(server, root, minimal=minimal) == [root / f"{name}.zip" for name in names]
    assert {path.name: path.read_bytes() for path in root.iterdir()} == {
        f"{name}.zip": ARCHIVES[name] for name in names
    }
    assert fetch(server, root, minimal=minimal) == []
    assert server.asked == names


def test_what_is_there_is_left_alone(server, tmp_path):
    (tmp_path / "images_background.zip").write_bytes(b"packed again")
    (tmp_path / "images_evaluation").mkdir()
    assert fetch(server, tmp_path) == []
    assert fetch(server, tmp_path, minimal="small1") == [], "its alphabets are in the whole set"
    assert (tmp_path / "images_background.zip").read_bytes() == b"packed again"


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (b"<!DOCTYPE html><p>Please log in", r"images_background\.zip is not what was published .*is an HTML page"),
        (b"", "what the server sent is not a zip: it is empty"),
        (archive("another"), "does not match the known hash"),
    ],
)
def test_another_file_is_not_kept(server, tmp_path, page, message):
    server.pages["images_background"] = page
    with pytest.raises(ValueError, match=message):
        fetch(server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_connection_leaves_nothing(server, tmp_path):
    server.pages["images_evaluation"] = None
    with pytest.raises(OSError, match=r"images_evaluation\.zip cannot be fetched .*put it at "):
        fetch(server, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["images_background.zip"]
    server.pages["images_evaluation"] = ARCHIVES["images_evaluation"]
    assert fetch(server, tmp_path) == [tmp_path / "images_evaluation.zip"]


def test_a_missing_page_and_a_missing_server(server, tmp_path):
    del server.pages["images_background"]
    with pytest.raises(OSError, match=r"cannot be fetched \(404"):
        fetch(server, tmp_path)
    with pytest.raises(OSError, match="cannot be fetched"):
        download("omniglot", tmp_path, address="http://127.0.0.1:1", checksums=CHECKSUMS)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(server, tmp_path, monkeypatch):
    def fill(_source, _target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pooch.core.shutil.move", fill)
    with pytest.raises(OSError, match=r"images_background\.zip cannot be written .*No space left.*make room"):
        fetch(server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_downloaded(tmp_path):
    for name, reason in (("mini-imagenet", "licence"), ("glyphs", "on the spot"), ("folder", "your own")):
        with pytest.raises(ValueError, match=f"{name} cannot be downloaded: .*{reason}"):
            download(name, tmp_path)
    with pytest.raises(ValueError, match="minimal='small3'"):
        download("omniglot", tmp_path, minimal="small3")


def test_command_says_where_to():
    command = [sys.executable, "-m", "applications.datasets", "omniglot", "--download"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "error: no --root, so there is nowhere to download to" in done.stderr
