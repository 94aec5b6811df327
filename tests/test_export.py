"""The exported model, loaded as docs/pruning.md says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, make_backbone
from torch import nn

from sparsight.backbones.backbone import Backbone
from sparsight.common.errors import SparsightError
from sparsight.common.work import Work
from sparsight.pruning.export import export, parse

SIZES = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 3, "num_heads": 6}


def written(backbone: Backbone, name: str, folder: Path, **architecture: Any) -> Path:
    about = {
        "model": "timm/vit_tiny_patch16_224",
        "architecture": {**SIZES, **architecture},
        "classes": ["a", "b"],
        "preprocess": {},
    }
    with Work(folder / "work", "key") as work:
        export(backbone, about, parse(name, backbone), work)
        work.finish(folder)
    return folder


def load_as_documented(folder: Path) -> nn.Module:
    """Run the code block of the docs on another folder."""
    page = (ROOT / "docs" / "pruning.md").read_text()
    (code,) = re.findall(r"```python\n(import json.*?)```", page, re.DOTALL)
    assert "sparsight" not in code
    code, changed = re.subn(r'Path\("results/.*?"\)', f"Path({str(folder)!r})", code)
    assert changed == 1
    names: dict[str, Any] = {}
    exec(code, names)
    return names["model"]


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True, "init_values": 0.5, "qkv_bias": False}], ids=["plain", "norms"]
)
def test_plain_timm_loads_the_model_and_gives_the_masked_logits(tmp_path: Path, options: dict[str, Any]) -> None:
    backbone = make_backbone(classes=2, **options)
    folder = written(backbone, "b0-h4_b2-h5-h2", tmp_path, **options)
    model, images = load_as_documented(folder), torch.randn(9, 1, 16, 16)
    mask = torch.zeros(9, 3, 6, dtype=torch.bool)
    mask[:, 0, 4] = mask[:, 1] = mask[:, 2, [2, 5]] = True
    with torch.no_grad():
        torch.testing.assert_close(model(images), backbone(images, head_mask=mask), atol=1e-5, rtol=1e-5)
        assert (model(images) - backbone(images)).abs().max() > 1e-3, "the heads mattered"
    gone = 5 + 4
    n_bytes = sum(4 * p.numel() for p in backbone.model.parameters())
    per_head = 4 * (4 * 8 * 48 + (24 if options.get("qkv_bias", True) else 0))
    assert sum(4 * p.numel() for p in model.parameters()) == n_bytes - gone * per_head
    assert (folder / "model.safetensors").stat().st_size < n_bytes
    about = json.loads((folder / "config.json").read_text())
    assert about["heads_kept"] == {"0": [4], "2": [2, 5]} and about["max_abs_logit_difference"] < 1e-5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("b3-h0", r"b3-h0 is out of range; the model has blocks 0 to 2 of heads 0 to 5"),
        ("b2-h6", r"b2-h6 is out of range"),
        ("b2-h1_b2-h3", r"b2-h3 names a block or a head twice"),
        ("b2-h1-h1", r"b2-h1-h1 names a block or a head twice"),
        ("b2", r"heads 'b2': expected b<block>-h<head>"),
    ],
)
def test_a_head_subset_that_is_none_is_refused(name: str, message: str) -> None:
    with pytest.raises(SparsightError, match=message):
        parse(name, make_backbone())


def test_a_layer_that_timm_could_not_load_smaller_is_refused(tmp_path: Path) -> None:
    backbone = make_backbone(classes=2, scale_attn_norm=True)
    with pytest.raises(SparsightError, match="block 2: heads of Attention cannot be taken out for timm"):
        written(backbone, "b2-h1", tmp_path)
