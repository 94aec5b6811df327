"""Keys that stand twice in a configuration file."""

from pathlib import Path

import pytest
from conftest import ROOT

from sparsight.common.errors import SparsightError
from sparsight.config.twice import check_no_key_twice


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: a\nseed: 1\nrun: b\n", "line 3: run: stands in line 1 of this section already; remove one"),
        ("saes:\n  a: {k: 4, d_sae: 8, k: 5}\n", "line 2: k: stands in line 2"),
        ("saes:\n  a: {k: 4}\n  a: {k: 5}\n", "line 3: a: stands in line 2"),
        ("sites: [{site: a, tokens: cls, site: b}]\n", "line 1: site: stands in line 1"),
    ],
)
def test_a_key_that_stands_twice_is_named_with_both_lines(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(text)
    with pytest.raises(SparsightError) as caught:
        check_no_key_twice([ROOT / "params.yaml", file])
    assert f"{file}, {message}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "saes:\n  a: &a {k: 4, lr: 1}\n  b: {<<: *a, k: 5}\n  c: *a\n",  # merged keys give way to the section's own
        "x: {name: 1}\ny: {name: 2}\n",
    ],
)
def test_keys_of_other_sections_and_merged_ones_are_no_repetition(tmp_path: Path, text: str) -> None:
    (tmp_path / "my.yaml").write_text(text)
    check_no_key_twice([tmp_path / "my.yaml"])


def test_other_formats_are_left_to_their_loader(tmp_path: Path) -> None:
    (tmp_path / "my.json").write_text('{"a": 1, "a": 2}')
    check_no_key_twice([tmp_path / "my.json"])


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda file: file.stem)
def test_no_file_of_ours_has_a_key_twice(file: Path) -> None:
    check_no_key_twice([file])
