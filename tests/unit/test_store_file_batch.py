"""Many small files become durable together, all or none."""

from pathlib import Path

import pytest

from fastcas.errors import FastCASError
from fastcas.store.file_batch import TOGETHER_MIN, FileBatch
from fastcas.store.paths import MANIFEST_DIR, Folder

FEW, MANY = TOGETHER_MIN - 1, TOGETHER_MIN + 5


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    opened = Folder(tmp_path / "store", create=True)
    opened.make_dir(MANIFEST_DIR)
    return opened


def files(n: int) -> dict[str, bytes]:
    return {f"{MANIFEST_DIR}/{i % 3:02}/file{i}": b"%d" % i * 100 for i in range(n)}


def there(folder: Folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder.root)): path.read_bytes()
        for path in (folder.root / MANIFEST_DIR).rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("n", [0, 1, FEW, MANY])
def test_files_get_their_names_when_published(folder: Folder, n: int) -> None:
    batch = FileBatch(folder, MANIFEST_DIR, 0o400)
    for name, data in files(n).items():
        assert name not in batch
        batch.add(name, data)
        assert name in batch
    assert not [name for name in there(folder) if ".tmp-" not in name]
    assert batch.publish() == list(files(n))
    assert there(folder) == files(n)
    assert {path.stat().st_mode & 0o777 for path in (folder.root / MANIFEST_DIR).rglob("file*")} <= {0o400}
    assert batch.publish() == []


@pytest.mark.parametrize("n", [FEW, MANY])
def test_one_that_cannot_be_named_takes_all_away(folder: Folder, n: int) -> None:
    batch = FileBatch(folder, MANIFEST_DIR, 0o400)
    for name, data in files(n).items():
        batch.add(name, data)
    in_the_way = folder.root / list(files(n))[-2]
    in_the_way.mkdir(parents=True)
    with pytest.raises(FastCASError, match=in_the_way.name):
        batch.publish()
    assert there(folder) == {}


def test_what_is_discarded_leaves_nothing(folder: Folder) -> None:
    batch = FileBatch(folder, MANIFEST_DIR, 0o400)
    for name, data in files(MANY).items():
        batch.add(name, data)
    batch.discard()
    assert there(folder) == {}
