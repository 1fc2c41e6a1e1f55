"""Locks on files that are being written; that files are written whole is tested where they are."""

import errno

import filelock
import pytest

from mivpg.errors import MivpgError
from mivpg.files import only_writer


def test_a_file_has_one_writer_at_a_time(tmp_path):
    file = tmp_path / "new" / "out.jsonl"
    for _ in range(2):
        with only_writer(file):
            message = r"out\.jsonl is being written by another run; wait for it"
            with pytest.raises(MivpgError, match=message), only_writer(file):
                pass
            with only_writer(file.with_name("other.jsonl")):
                pass
        assert not list(file.parent.iterdir())


def test_a_lock_that_somebody_deletes_ends_nothing(tmp_path):
    with only_writer(tmp_path / "out.jsonl"):
        (tmp_path / "out.jsonl.lock").unlink()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_a_killed_run_has_left_is_taken(tmp_path):
    (tmp_path / "out.jsonl.lock").touch()
    with only_writer(tmp_path / "out.jsonl"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_stays_hides_no_other_error(tmp_path, monkeypatch):
    def unlink(path, missing_ok=False):
        raise OSError(errno.EROFS, "Read-only file system")

    with pytest.raises(MivpgError, match="what happened"), only_writer(tmp_path / "out.jsonl"):
        monkeypatch.setattr(type(tmp_path), "unlink", unlink)
        raise MivpgError("what happened")


@pytest.mark.parametrize(
    ("number", "goes_on"),
    [(errno.ENOLCK, True), (errno.ENOSYS, True), (errno.EOPNOTSUPP, True), (errno.EACCES, False)],
)
def test_where_no_file_can_be_locked_none_is(tmp_path, monkeypatch, number, goes_on):
    def acquire(self):
        raise OSError(number, "no locks")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    if goes_on:
        with only_writer(tmp_path / "out.jsonl"):
            pass
    else:
        with pytest.raises(OSError, match="no locks"), only_writer(tmp_path / "out.jsonl"):
            pass
    assert not list(tmp_path.iterdir())
