"""What holds for every image source, on data in its own layout."""

import hashlib
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from source_files import RGB, counts, is_picture, litter, manifest
from source_layouts import MAKERS

from sparsight.config.images import PACKAGED
from sparsight.images.sources import SOURCES, SPLITS


def test_every_source_has_data_here() -> None:
    assert MAKERS.keys() == SOURCES.keys()


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_keeps_the_contract(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, expected = MAKERS[name](tmp_path / "data", monkeypatch)
    source = SOURCES[name](path)
    items, classes = source.items(), source.class_names()
    assert len(items) == len(expected), "each image once"
    assert {item.uri: (item.label_name, item.split) for item in items} == expected
    labels = {item.label_name for item in items} - {None}
    assert len(set(classes)) == len(classes) and labels <= set(classes)
    assert {item.split for item in items} <= {*SPLITS, None}

    again = pickle.loads(pickle.dumps(source))
    assert (again.items(), again.class_names()) == (items, classes), "a copy lists the same in the same order"
    order = np.random.default_rng(0).permutation(len(items))[:60]
    uris = [items[i].uri for i in order]
    reader = pickle.loads(pickle.dumps(source)).reader(uris)  # the copy has listed nothing
    with ThreadPoolExecutor(3) as pool:
        contents = list(pool.map(reader.read, uris))
    assert contents == [source.read(uri) for uri in uris]
    assert all(is_picture(again.decode(uri, data)) for uri, data in zip(uris, contents, strict=True))


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in PACKAGED])
def test_the_manifest_lists_every_image_of_a_source(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, expected = MAKERS[name](tmp_path / "data", monkeypatch)
    assert path is not None
    found = manifest(name, path, tmp_path / "m.parquet")
    rows = {row["uri"]: row for row in found.table.to_pylist()}
    assert rows.keys() == expected.keys() and len(found.table) == len(expected)
    source = SOURCES[name](path)
    for uri, (label, split) in list(expected.items())[::5]:
        row = rows[uri]
        assert (row["label_name"], found.classes[row["label"]]) == (label, label)
        # A missing split is drawn from train; official ones are kept.
        assert split is None or row["split"] == split or split == "train"
        assert row["sha256"] == hashlib.sha256(source.read(uri)).hexdigest()
    assert found.split("train").batch(slice(0, 2), RGB).shape == (2, 8, 8, 3)


@pytest.mark.parametrize("name", SOURCES)
def test_hidden_files_change_nothing_and_the_counts_add_up(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, expected = MAKERS[name](tmp_path / "data", monkeypatch)
    plain = SOURCES[name](path)
    before = plain.items(), plain.class_names()
    if path is not None:
        litter(tmp_path / "data")
    found = SOURCES[name](path)
    capsys.readouterr()
    assert (found.items(), found.class_names()) == before
    log = capsys.readouterr().err
    assert sum(line.get("images", 0) for line in counts(log)) == len(expected)
    for folder, n_files in re.findall(r"^images: (.*): (\d+) files: ", log, re.MULTILINE):
        if Path(folder).is_dir():
            assert int(n_files) == sum(file.is_file() for file in Path(folder).rglob("*"))
