"""Every family of Vision Transformers: taps, heads and tokens against the library's own forward."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsight import backbones
from sparsight.backbones.attention import FixedPatches, attend
from sparsight.backbones.attention_layers import read_layer
from sparsight.backbones.backbone import Backbone
from sparsight.common.errors import SparsightError
from sparsight.pruning.head_outputs import HeadOutputs
from sparsight.pruning.masks import unpack

SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 5}
CLIP: dict[str, Any] = {
    "embed_dim": 24, "vision.width": 48, "vision.layers": 2, "vision.head_width": 16, "vision.patch_size": 8,
    "vision.image_size": 32, "text.width": 24, "text.layers": 1, "text.heads": 2, "text.vocab_size": 49408,
}  # fmt: skip
SIGLIP = {"vision.timm_model_name": "test_vit4", "vision.image_size": 160, "vision.timm_pool": "map"}
TEXT = {"text.hf_tokenizer_name": "", "text.width": 24, "text.layers": 1, "text.heads": 2, "text.context_length": 16}


@dataclass(frozen=True)
class Case:
    """One model, made small, and what is known of it."""

    name: str
    options: dict[str, Any] = field(default_factory=lambda: SMALL)
    n_class: int = 1
    n_registers: int = 0
    heads: str = "gathered"
    """How far heads can be switched: gathered, masked, or none."""
    layers: tuple[str, str] = ("drop_path1", "drop_path2")
    """Modules of a block whose outputs are what attention and MLP add; empty: added inside."""


CASES = [
    Case("timm/vit_tiny_patch16_224"),
    Case("timm/vit_small_patch14_dinov2.lvd142m"),
    Case("timm/vit_small_patch14_reg4_dinov2.lvd142m", n_registers=4),
    Case("timm/vit_medium_patch16_reg4_gap_256", n_class=0, n_registers=4),
    Case("timm/vit_base_patch16_siglip_224", n_class=0),
    Case("timm/vit_base_patch16_clip_224.openai"),
    Case("timm/vit_base_patch16_clip_quickgelu_224.openai"),
    Case("timm/vit_base_patch16_rpn_224", n_class=0),
    Case("timm/vit_small_patch16_18x2_224", heads="none", layers=("", "")),
    Case("timm/deit_tiny_patch16_224"),
    Case("timm/deit_tiny_distilled_patch16_224", n_class=2),
    Case("timm/deit3_small_patch16_224"),
    Case("timm/flexivit_small"),
    Case("timm/eva_giant_patch14_224"),
    Case("timm/eva02_tiny_patch14_224"),
    Case("timm/eva02_base_patch14_224"),
    Case("timm/eva02_base_patch16_clip_224", heads="masked"),
    Case("timm/vit_small_patch16_rope_mixed_224"),
    Case("timm/vit_small_patch16_dinov3", n_registers=4),
    Case("timm/vit_pe_core_small_patch16_384"),
    Case("timm/beit_base_patch16_224"),
    Case("timm/beitv2_base_patch16_224"),
    Case("timm/beit3_base_patch16_224", heads="masked"),
    Case("open_clip/ViT-B-32-quickgelu@openai", CLIP, layers=("ls_1", "ls_2")),
    Case("open_clip/ViT-B-16", {**CLIP, "vision.pool_type": "avg"}, layers=("ls_1", "ls_2")),
    Case("open_clip/ViT-B-16", {**CLIP, "vision.scale_heads": True, "vision.qk_norm": True}, layers=("ls_1", "ls_2")),
    Case(
        "open_clip/ViT-B-16",
        {**CLIP, "vision.scale_attn_inner": True, "vision.ls_init_value": 0.5},
        heads="masked",
        layers=("ls_1", "ls_2"),
    ),
    Case("open_clip/ViT-B-16-SigLIP", {**SIGLIP, **TEXT}, n_class=0, n_registers=1),
    Case("open_clip/coca_ViT-B-32", {**CLIP, "vision.attn_pooler_heads": 2}, layers=("ls_1", "ls_2")),
]  # fmt: skip
ALL = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{CASES.index(case)}")
SWITCHABLE = pytest.mark.parametrize(
    "case", [case for case in CASES if case.heads != "none"], ids=lambda case: f"{case.name}-{CASES.index(case)}"
)


@cache
def make(index: int) -> Backbone:
    """A small random model in which no bias, scale or norm is trivial, so that forgetting one of them shows."""
    torch.manual_seed(0)
    case = CASES[index]
    backbone = backbones.load(case.name, None, **case.options)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone.requires_grad_(False)


def setup(case: Case) -> tuple[Backbone, Tensor]:
    backbone = make(CASES.index(case))
    size = backbone.preprocess.size
    return backbone, torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))


def library(backbone: Backbone) -> nn.Module:
    """The module whose plain call is the library's own forward."""
    return backbone.model.visual if backbone.has_text else backbone.model


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


@ALL
def test_taps_are_what_hooks_on_the_library_s_own_forward_see(case: Case) -> None:
    backbone, x = setup(case)
    seen: dict[str, Tensor] = {}
    hooks = []

    def keep(site: str) -> Callable[..., None]:
        return lambda *args: seen.update({site: first(args[-1])})

    for i, block in enumerate(backbone.tower.blocks):
        hooks.append(block.register_forward_pre_hook(keep(f"blocks.{i}.input")))
        hooks.append(block.register_forward_hook(keep(f"blocks.{i}.output")))
        for part, name in zip(("attn", "mlp"), case.layers, strict=True):
            if name:
                hooks.append(getattr(block, name).register_forward_hook(keep(f"blocks.{i}.{part}")))
    logits = first(library(backbone)(x))
    for hook in hooks:
        hook.remove()
    taps = backbone.taps(x, [*seen, "embedding"])
    for site, value in seen.items():
        assert torch.equal(taps[site], value), site
    for i in range(backbone.n_blocks - 1):
        assert torch.equal(taps[f"blocks.{i}.output"], taps[f"blocks.{i + 1}.input"])
    assert torch.equal(backbone(x), logits)
    assert taps["blocks.0.input"].shape == (3, backbone.n_prefix + backbone.n_patches, backbone.d_in)


@ALL
def test_parts_of_a_block_sum_to_its_output(case: Case) -> None:
    backbone, x = setup(case)
    taps = backbone.taps(x, [f"blocks.1.{part}" for part in ("input", "attn", "mlp", "output")])
    total = taps["blocks.1.input"] + taps["blocks.1.attn"] + taps["blocks.1.mlp"]
    assert torch.equal(total, taps["blocks.1.output"])


@ALL
def test_embedding_is_what_the_classifier_or_the_projection_reads(case: Case) -> None:
    backbone, x = setup(case)
    embedding = backbone.taps(x, ["embedding"])["embedding"]
    if backbone.has_text:
        visual = backbone.model.visual
        again = visual.head(embedding) if hasattr(visual, "head") else embedding @ visual.proj
    elif case.n_class == 2:
        stream = backbone.taps(x, ["blocks.1.output"])["blocks.1.output"]
        assert torch.equal(embedding, backbone.model.norm(stream)[:, :2].mean(dim=1))
        with pytest.raises(SparsightError, match="its embedding alone cannot be classified"):
            backbone.classify_embedding(embedding)
        return
    else:
        again = backbone.model.head(embedding)
    torch.testing.assert_close(again, backbone(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(backbone.classify_embedding(embedding), backbone(x), atol=1e-6, rtol=1e-5)


@ALL
def test_tokens_are_named_right(case: Case) -> None:
    """A token is where the model puts it: the class token and the registers are the same in every image."""
    backbone, x = setup(case)
    assert len(backbone.class_positions) == case.n_class and len(backbone.register_positions) == case.n_registers
    first_patch, end = backbone.patch_positions
    assert [*backbone.class_positions, *backbone.register_positions] == list(range(first_patch))
    stream = backbone.taps(x, ["blocks.0.input"])["blocks.0.input"]
    assert end == stream.shape[1] and end - first_patch == backbone.n_patches
    same = (stream[0] == stream[1]).all(dim=-1)
    assert same[:first_patch].all() and not same[first_patch:].any()


@ALL
def test_switching_heads(case: Case) -> None:
    backbone, x = setup(case)
    L, H = backbone.n_blocks, backbone.n_heads
    everything = torch.ones(3, L, max(H, 1), dtype=torch.bool)
    if case.heads == "none":
        with pytest.raises(SparsightError, match="several attention layers"):
            backbone.run_blocks(backbone.tokens(x), 0, 1, policy=Fixed(everything))
        return
    assert torch.equal(backbone(x, head_mask=everything), backbone(x)), "all heads on is the plain model"
    mask = torch.rand(3, L, H, generator=torch.Generator().manual_seed(2)) < 0.6
    masked = backbone(x, head_mask=mask)
    assert not torch.allclose(masked, backbone(x), atol=1e-3)
    if case.heads == "masked":
        with pytest.raises(SparsightError, match="use heads='masked'"):
            backbone(x, head_mask=mask, heads="gathered")
        return
    assert torch.equal(backbone(x, head_mask=everything, heads="gathered"), backbone(x))
    torch.testing.assert_close(backbone(x, head_mask=mask, heads="gathered"), masked, atol=2e-5, rtol=1e-4)


@dataclass
class Fixed:
    """A mask as a policy."""

    mask_BLH: Tensor

    def decide(self, block: int, read_BD: Tensor) -> Tensor:
        return self.mask_BLH[:, block]


@ALL
def test_heads_sum_through_the_projection_to_the_attention(case: Case) -> None:
    backbone, x = setup(case)
    if case.heads == "none":
        return
    heads_BTHC = backbone.head_outputs(x, 1)
    block = backbone.tower.parts(1)
    assert block.attention is not None
    proj = read_layer(block.attention, **backbone.tower.shared()[1]).proj
    B, T, H, C = heads_BTHC.shape
    assert (3, backbone.n_prefix + backbone.n_patches, backbone.n_heads) == (B, T, H)
    columns = proj.weight.view(-1, H, C)
    total = torch.stack([heads_BTHC[:, :, h] @ columns[:, h].T for h in range(H)]).sum(dim=0)
    attention = block.after(total if proj.bias is None else total + proj.bias)
    torch.testing.assert_close(attention, backbone.taps(x, ["blocks.1.attn"])["blocks.1.attn"], atol=2e-5, rtol=1e-4)


@ALL
def test_versions_of_the_first_tokens_attend_like_whole_streams(case: Case) -> None:
    backbone, x = setup(case)
    n_read = backbone.tower.n_read
    if case.heads == "none" or n_read > backbone.n_prefix:
        return
    stream, _ = backbone.run_blocks(backbone.tokens(x), 0, 1)
    block, shared = backbone.tower.parts(1), backbone.tower.shared()[1]
    assert block.attention is not None
    generator = torch.Generator().manual_seed(0)
    images = torch.tensor([2, 0, 2, 1, 1])
    changed = stream[images]
    changed[:, :n_read] += torch.randn(5, n_read, backbone.d_in, generator=generator)
    keep = torch.rand(5, backbone.n_heads, generator=generator) < 0.6
    expected = attend(block.attention, block.before(changed), keep, "masked", **shared)[:, :n_read]
    fixed = FixedPatches(block.attention, block.before(stream), n_read, **shared)
    got = fixed.attend(block.before(changed[:, :n_read]), images, keep)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("index", [0, 2, 14, 20, 23], ids=lambda index: CASES[index].name)
def test_bfloat16_inside_autocast(index: int) -> None:
    """Taps and both ways of switching heads work, and stay near float32."""
    backbone, x = setup(CASES[index])
    mask = torch.rand(3, backbone.n_blocks, backbone.n_heads, generator=torch.Generator().manual_seed(2)) < 0.6
    exact = backbone.taps(x, ["blocks.1.output"])["blocks.1.output"]
    with torch.autocast("cpu", torch.bfloat16):
        taps = backbone.taps(x, ["blocks.1.output"])["blocks.1.output"]
        masked, gathered = backbone(x, head_mask=mask), backbone(x, head_mask=mask, heads="gathered")
        plain, all_on = backbone(x), backbone(x, head_mask=torch.ones_like(mask))
    assert torch.equal(plain, all_on)
    for got, want in ((taps, exact), (masked, backbone(x, head_mask=mask)), (gathered, masked)):
        assert float((got.float() - want.float()).norm() / want.float().norm()) < 0.05


def test_a_block_s_prefix_and_suffix_give_the_bits_of_the_whole() -> None:
    for index in (14, 17, 20, 23):
        backbone, x = setup(CASES[index])
        stream, _ = backbone.run_blocks(backbone.tokens(x), 0, 1)
        stream, _ = backbone.run_blocks(stream, 1, 2)
        assert torch.equal(backbone.classify(stream), backbone(x))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm/vit_base_patch16_xp_224", SMALL, r"add attention, then MLP .*not ParallelScalingBlock"),
        ("timm/vit_relpos_small_patch16_224", {"depth": 1}, "not VisionTransformerRelPos"),
        ("timm/swin_tiny_patch4_window7_224", {"depths": (1, 1)}, "not SwinTransformer"),
        ("open_clip/RN50", {"vision.width": 8, "text.layers": 1, "text.width": 8, "text.heads": 1}, "a ModifiedResNet"),
        ("open_clip/ViT-B-33", {}, "open_clip knows no model 'ViT-B-33'"),
        ("open_clip/ViT-B-32@openai", {}, "trained with QuickGELU, .* use ViT-B-32-quickgelu@openai"),
        ("open_clip/ViT-B-32-quickgelu@laion2b_e16", {}, r"has no weights 'laion2b_e16'|not trained with QuickGELU"),
        ("open_clip/ViT-B-32", {"visual.width": 4}, "unknown architecture option 'visual.width'"),
        ("open_clip/ViT-B-32", {"vision.depth": 4}, "cannot be made .*depth"),
    ],
)
def test_what_has_no_names_here_is_refused_not_misread(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsightError, match=message):
        backbones.load(name, None, **options)


@ALL
def test_the_head_reads_the_tokens_in_front_that_it_names(case: Case) -> None:
    backbone, x = setup(case)
    stream, _ = backbone.run_blocks(backbone.tokens(x), 0, backbone.n_blocks)
    n_read = backbone.tower.n_read
    assert n_read in (case.n_class, stream.shape[1])
    assert torch.equal(backbone.classify(stream[:, :n_read]), backbone(x))


@SWITCHABLE
def test_a_coupled_mlp_reads_only_the_channels_of_the_kept_heads(case: Case) -> None:
    backbone, x = setup(case)
    H, last = backbone.n_heads, backbone.n_blocks - 1
    keep = torch.rand(len(x), H, generator=torch.Generator().manual_seed(4)) < 0.5
    keep[0], keep[1] = False, True
    mask = torch.ones(len(x), last + 1, H, dtype=torch.bool)
    mask[:, last] = keep
    uncoupled = backbone(x, head_mask=mask)
    backbone.couples_mlp = True
    assert torch.equal(backbone(x, head_mask=torch.ones_like(mask)), backbone(x))
    coupled = backbone(x, head_mask=mask)
    tolerance = 1e-5 * float(uncoupled.abs().max())
    if case.heads != "masked":
        torch.testing.assert_close(backbone(x, head_mask=mask, heads="gathered"), coupled, atol=tolerance, rtol=1e-5)
    assert torch.equal(coupled[1], uncoupled[1]) and not torch.allclose(coupled[0], uncoupled[0], atol=10 * tolerance)
    linears = backbone.tower.parts(last).mlp_inputs
    assert linears
    backbone.couples_mlp, weights = False, [linear.weight.detach().clone() for linear in linears]
    for i, keep_H in enumerate(keep):
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight.data = weight * keep_H.repeat_interleave(backbone.d_in // H)
        expected = backbone(x[i : i + 1], head_mask=mask[i : i + 1])
        torch.testing.assert_close(coupled[i : i + 1], expected, atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("coupled", [False, True])
@SWITCHABLE
def test_every_mask_of_the_last_block_is_what_masking_gives(case: Case, coupled: bool) -> None:
    backbone, x = setup(case)
    backbone.couples_mlp = coupled
    H, last = backbone.n_heads, backbone.n_blocks - 1
    stream, _ = backbone.run_blocks(backbone.tokens(x), 0, last)
    got = torch.cat(list(HeadOutputs.of(backbone, stream).every()), dim=1)
    assert got.shape[:2] == (len(x), 2**H)
    for code in range(0, 2**H, max(1, 2**H // 8)):
        mask = torch.ones(len(x), last + 1, H, dtype=torch.bool)
        mask[:, last] = torch.from_numpy(unpack(np.array(code), H))
        expected = backbone(x, head_mask=mask)
        torch.testing.assert_close(got[:, code], expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)
