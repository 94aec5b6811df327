"""The table of families in docs/models.md: which tokens can be steered, and what a head policy reads."""

import re

import pytest
import torch
from conftest import ROOT
from test_families import CASES, Case, setup

from sparsight import sae
from sparsight.common.errors import SparsightError
from sparsight.pruning.policy import HeadPolicy
from sparsight.sae import SAE
from sparsight.steering.intervention import Intervention

ROWS = {
    row[1].strip("`"): row
    for line in (ROOT / "docs" / "models.md").read_text().splitlines()
    if len(row := [cell.strip() for cell in line.strip("|").split("|")]) == 7
}
"""Cells of the table by the example's name."""
NAMED = [case for case in CASES if ROWS.get(case.name, ["the tower's"])[-1] != "the tower's"]
TABLED = pytest.mark.parametrize("case", NAMED, ids=lambda case: f"{case.name}-{CASES.index(case)}")


def test_the_table_names_models_that_are_tested() -> None:
    assert len({case.name for case in NAMED}) >= 17


def random_sae(d_in: int, tokens: str) -> SAE:
    one = sae.create("topk", d_in, 64, 4, seed=0).requires_grad_(False)
    one.about = {"site": "blocks.1.input", "tokens": tokens}
    return one


@TABLED
def test_tokens_of_the_table_can_be_steered_and_no_others(case: Case) -> None:
    backbone, x = setup(case)
    named = re.findall(r"`(\w+)`", ROWS[case.name][5])
    stream, _ = backbone.run_blocks(backbone.tokens(x), 0, 1)
    plain = backbone.classify(backbone.run_blocks(stream, 1, backbone.n_blocks)[0])
    noise = torch.randn(stream.shape, generator=torch.Generator().manual_seed(1)).flatten(0, 1)
    for tokens in ("cls", "registers", "patches", "all", "mean"):
        one = random_sae(backbone.d_in, tokens)
        if tokens not in named:
            with pytest.raises(SparsightError, match=r"has no (class token|register tokens); steer its patches"):
                Intervention([one], backbone)
            continue
        where = Intervention([one], backbone)
        torch.testing.assert_close(where.logits(stream), plain, atol=1e-5, rtol=1e-5)
        edited = where.logits(stream, lambda m, rows: rows + noise[: len(rows)])
        assert (edited - plain).abs().max() > 1e-4 * plain.abs().max(), tokens


@TABLED
def test_a_head_policy_decides_on_what_the_table_says(case: Case) -> None:
    backbone, x = setup(case)
    reads = ROWS[case.name][6]
    policy = HeadPolicy(backbone.d_in, max(backbone.n_heads, 1), [1]).requires_grad_(False)
    policy.weight.normal_(generator=torch.Generator().manual_seed(0))
    stream, _ = backbone.run_blocks(backbone.tokens(x), 0, 1)
    if reads == "none":
        with pytest.raises(SparsightError, match=r"use heads='masked'|several attention layers"):
            backbone.run_blocks(stream, 1, 2, policy, "gathered")
        return
    first, end = backbone.patch_positions
    read = stream[:, 0] if reads == "class token" else stream[:, first:end].mean(dim=1)
    policy.bias[0] = -(read @ policy.weight[0].T).median(dim=0).values
    _, masks = backbone.run_blocks(stream, 1, 2, policy, "gathered")
    assert torch.equal(masks[1], read @ policy.weight[0].T + policy.bias[0] > 0)
    assert masks[1].any() and not masks[1].all()
