"""Where a bundle may be written, and what is left alone."""

import errno
import fcntl
import sys

import pytest
from pyrexport.export.bundle.output import locked
from pyrexport.export.lowering import forms
from pyrexport.runtime.errors import UsageError
from pyrexport.runtime.reporter import Reporter


class Lines(Reporter):
    """Keeps what is warned of."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def warned(self, line: str) -> None:
        self.lines.append(line)


def test_an_output_in_the_way_is_refused_and_a_bundle_replaced_by_force(tiny, copy, cli, refused, tmp_path):
    assert "give --force" in refused("build", tiny, "--target", "ort", "-o", copy)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert "is not a bundle" in refused("build", tiny, "--target", "ort", "-o", tmp_path / "mine", "--force")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert "unknown target 'tpu': expected one of executorch, ort" in refused(
        "build", tiny, "--target", "tpu", "-o", tmp_path / "x"
    )
    assert "does not exist" in refused("build", tiny, "--target", "ort", "-o", tmp_path / "no" / "x")
    assert "give --force" in refused("build", tiny, "--target", "ort", "-o", tmp_path / ".")
    (tmp_path / "link").symlink_to(copy)
    assert "symbolic link" in refused("build", tiny, "--target", "ort", "-o", tmp_path / "link", "--force")
    assert "cannot be a bundle" in refused("build", tiny, "--target", "ort", "-o", "/")


def test_somebody_elses_folders_are_left_alone(make_checkpoint, cli, refused, tmp_path, monkeypatch):
    folder = make_checkpoint("--no-vae", "--no-text-encoder", "--blocks", "1")
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "thesis.txt").write_text("x")
    (tmp_path / ".b.replaced").mkdir()
    (tmp_path / ".b.replaced" / "thesis.txt").write_text("x")
    assert "was not made by a build" in refused("build", folder, "--target", "ort", "-o", tmp_path / "a", "--quiet")
    assert (tmp_path / "a.partial" / "thesis.txt").exists()
    real = forms.export_onnx

    def export(*arguments, **options):
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / "thesis.txt").write_text("x")
        return real(*arguments, **options)

    monkeypatch.setattr(forms, "export_onnx", export)
    assert "appeared during the build" in refused("build", folder, "--target", "ort", "-o", tmp_path / "b", "--quiet")
    assert (tmp_path / "b" / "thesis.txt").exists()
    (tmp_path / "b" / "thesis.txt").unlink()
    (tmp_path / "b").rmdir()
    monkeypatch.setattr(forms, "export_onnx", None)  # every graph is kept
    assert cli("build", folder, "--target", "ort", "-o", tmp_path / "b", "--quiet").exit_code == 0
    assert (tmp_path / ".b.replaced" / "thesis.txt").exists()


@pytest.mark.parametrize("code", [errno.EBADF, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_and_written_to(tmp_path, monkeypatch, code):
    def flock(folder: int, how: int) -> None:
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    reporter = Lines()
    with locked(tmp_path / "a.partial", reporter):
        (tmp_path / "a.partial" / "x").touch()
    assert reporter.lines == [
        f"{tmp_path / 'a.partial'} lies on a file system without locks (no locks): start no second build"
    ]


def test_other_errors_of_locking_are_errors_and_a_lock_that_is_held_is_another_build(tmp_path, monkeypatch):
    with (
        locked(tmp_path / "a.partial"),
        pytest.raises(UsageError, match="another build"),
        locked(tmp_path / "a.partial"),
    ):
        pass

    def flock(folder: int, how: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="broken"), locked(tmp_path / "a.partial"):
        pass


def test_a_system_without_the_module_of_locks_builds(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    reporter = Lines()
    with locked(tmp_path / "a.partial", reporter):
        pass
    assert reporter.lines == [f"{tmp_path / 'a.partial'} cannot be locked on this system: start no second build of it"]
