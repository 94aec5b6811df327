"""Taps, head masks and preprocessing against plain timm."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import make_backbone
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from sparsight import backbones
from sparsight.backbones import macs
from sparsight.backbones.attention import HeadMode, attend
from sparsight.backbones.backbone import Backbone
from sparsight.common.errors import SparsightError


def images(n: int = 7) -> Tensor:
    return torch.randn(n, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def masks(p: float, seed: int, n: int = 7) -> Tensor:
    return torch.rand(n, 3, 6, generator=torch.Generator().manual_seed(seed)) < p


def test_logits_and_taps_are_those_of_timm(backbone: Backbone) -> None:
    model, x = backbone.model, images()
    assert torch.equal(backbone(x), model(x))
    seen: dict[str, Tensor] = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda _, args, i=i: seen.update({f"blocks.{i}.input": args[0]}))
        block.register_forward_hook(lambda _, __, out, i=i: seen.update({f"blocks.{i}.output": out}))
        block.attn.register_forward_hook(lambda _, __, out, i=i: seen.update({f"blocks.{i}.attn": out}))
        block.mlp.register_forward_hook(lambda _, __, out, i=i: seen.update({f"blocks.{i}.mlp": out}))
    seen["embedding"] = model.forward_head(model.forward_features(x), pre_logits=True)
    taps = backbone.taps(x, list(seen))
    assert taps.keys() == seen.keys()
    for site, value in seen.items():
        assert torch.equal(taps[site], value), site
    assert taps["embedding"].shape == (7, 48) and taps["blocks.2.attn"].shape == (7, 17, 48)


@settings(max_examples=30, deadline=None)
@given(
    p=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), seed=st.integers(0, 10**6), n=st.integers(1, 20), same=st.booleans()
)
def test_gathered_equals_masked(p: float, seed: int, n: int, same: bool) -> None:
    backbone, keep = make_backbone(), masks(p, seed, n)
    keep = keep[:1].expand(n, -1, -1) if same else keep
    torch.testing.assert_close(
        backbone(images(n), head_mask=keep, heads="gathered"),
        backbone(images(n), head_mask=keep, heads="masked"),
        atol=1e-5, rtol=0,
    )  # fmt: skip


@pytest.mark.parametrize("heads", ["masked", "gathered"])
def test_masked_head_adds_nothing_before_the_projection(backbone: Backbone, heads: HeadMode) -> None:
    """Against timm's own layer with the head's columns of the projection set to zero."""
    attention = backbone.model.blocks[1].attn
    x = torch.randn(4, 17, 48)
    keep = torch.tensor([True, False, True, True, False, False]).expand(4, 6)
    got = attend(attention, x, keep, heads)
    columns = keep[0].repeat_interleave(8)
    attention.proj.weight.data[:, ~columns] = 0
    torch.testing.assert_close(got, attention(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("heads", ["masked", "gathered"])
def test_all_heads_is_the_plain_model_and_no_head_leaves_the_bias(backbone: Backbone, heads: HeadMode) -> None:
    everything = torch.ones(7, 3, 6, dtype=torch.bool)
    torch.testing.assert_close(backbone(images(), head_mask=everything, heads=heads), backbone(images()))
    attention = backbone.model.blocks[0].attn
    nothing = attend(attention, torch.randn(2, 17, 48), torch.zeros(2, 6, dtype=torch.bool), heads)
    assert torch.equal(nothing, attention.proj.bias.expand(2, 17, 48))


def test_gathered_computes_only_the_kept_heads(backbone: Backbone) -> None:
    """A head that is off for every image may hold NaN without harm."""
    attention = backbone.model.blocks[0].attn
    keep = torch.tensor([[True, True, False, True, True, True]] * 3)
    clean = attend(attention, torch.ones(3, 17, 48), keep, "gathered")
    attention.qkv.weight.data.view(3, 6, 8, 48)[:, 2] = torch.nan
    assert torch.equal(attend(attention, torch.ones(3, 17, 48), keep, "gathered"), clean)


def test_gradients_reach_a_float_mask(backbone: Backbone) -> None:
    keep = torch.ones(7, 3, 6, dtype=torch.float64, requires_grad=True)
    model = backbone.double()
    loss = model(images().double(), head_mask=keep)[:, 0].sum()
    (slope,) = torch.autograd.grad(loss, keep)
    step = torch.zeros_like(keep)
    step[3, 1, 4] = 1e-6
    with torch.no_grad():
        up, down = (model(images().double(), head_mask=keep + s * step)[:, 0].sum() for s in (1, -1))
    assert float(slope[3, 1, 4]) == pytest.approx(float(up - down) / 2e-6, rel=1e-5)


def test_policy_decides_from_the_class_token_at_each_block_s_input(backbone: Backbone) -> None:
    class ByNorm:
        def decide(self, block: int, read_BD: Tensor) -> Tensor | None:
            return None if block == 0 else read_BD[:, :6] > 0

    x, masks_seen = backbone.run_blocks(backbone.tokens(images()), 0, 3, ByNorm(), "gathered")
    whole = torch.ones(7, 3, 6, dtype=torch.bool)
    for block, mask in masks_seen.items():
        whole[:, block] = mask
    assert set(masks_seen) == {1, 2} and 0 < whole[:, 1:].float().mean() < 1
    expected = backbone(images(), head_mask=whole)
    torch.testing.assert_close(backbone.classify(x), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(backbone(images(), policy=ByNorm(), heads="gathered"), expected, atol=1e-5, rtol=0)


def test_prefix_and_suffix_are_bit_equal_to_the_whole(backbone: Backbone) -> None:
    x, _ = backbone.run_blocks(backbone.tokens(images()), 0, 2)
    x, _ = backbone.run_blocks(x, 2, 3)
    assert torch.equal(backbone.classify(x), backbone(images()))


def test_macs_are_those_of_the_layers(backbone: Backbone) -> None:
    """Counted by hooks on every linear layer and the two products of attention."""
    total = 0

    def count(layer: torch.nn.Module, _: object, out: Tensor) -> None:
        nonlocal total
        assert isinstance(layer.weight, Tensor)
        total += out.numel() // len(out) * layer.weight[0].numel()

    for layer in backbone.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(count)
    backbone(images())
    expected = total + 3 * 2 * 6 * 17 * 17 * 8 + backbone.model.patch_embed.proj.weight.numel() * 16
    assert 3 * 6 * macs.of_head(backbone) + macs.outside_heads(backbone) == expected
    alone = macs.of_head(backbone)
    backbone.couples_mlp = True
    assert macs.of_head(backbone) == alone + 8 * 17 * 4 * 48
    assert 3 * 6 * macs.of_head(backbone) + macs.outside_heads(backbone) == expected


def test_normalisation_follows_the_model_s_own_config() -> None:
    backbone = backbones.load("timm/vit_small_patch14_dinov2.lvd142m", None, 2, img_size=28, depth=1)
    assert backbone.preprocess.mean == (0.485, 0.456, 0.406) and backbone.preprocess.size == (28, 28)
    pixels = np.full((1, 28, 28, 3), 255, dtype=np.uint8)
    assert backbone.normalize(pixels)[0, :, 0, 0].tolist() == pytest.approx([2.2489, 2.4286, 2.64], abs=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: backbones.load("timm/vit_tyni"), "backbone 'timm/vit_tyni' is unknown"),
        (lambda b: backbones.load("resnet"), "use timm/<architecture>"),
        (lambda b: backbones.load("timm/resnet18"), "taps need a timm VisionTransformer"),
        (lambda b: backbones.load("timm/vit_tiny_patch16_224", depht=2), "refuses its architecture options"),
        (
            lambda b: b.taps(images(), ["blocks.3.input"]),
            "'blocks.3.input' does not exist; the blocks are numbered 0 to 2",
        ),
        (lambda b: b.taps(images(), ["blocks.1.inptu"]), "'blocks.1.inptu' is no site"),
        (lambda b: b(images(), head_mask=masks(0.5, 0)[:, :2]), r"expected shape \(7, 3, 6\), got \(7, 2, 6\)"),
        (lambda b: b(images(), head_mask=masks(0.5, 0), heads="pruned"), "'pruned' is neither"),
        (lambda b: b(images(), head_mask=masks(0.5, 0).float(), heads="gathered"), "need a bool mask"),
        (lambda b: b(images(), head_mask=masks(0.5, 0), policy=b), "not both"),
    ],
)
def test_mistakes_are_explained(backbone: Backbone, call: Callable[[Backbone], object], message: str) -> None:
    with pytest.raises(SparsightError, match=message):
        call(backbone)


def test_weights_from_a_file(tmp_path: object, backbone: Backbone) -> None:
    from pathlib import Path

    file = Path(str(tmp_path)) / "w.safetensors"
    options = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 3, "num_heads": 6}
    state = backbone.model.state_dict()
    save_file(state, file)
    loaded = backbones.load("timm/vit_tiny_patch16_224", str(file), 5, **options)
    assert torch.equal(loaded(images()), backbone(images()))
    other_head = backbones.load("timm/vit_tiny_patch16_224", str(file), 9, **options)
    assert torch.equal(
        other_head.taps(images(), ["embedding"])["embedding"], backbone.taps(images(), ["embedding"])["embedding"]
    )
    with pytest.raises(SparsightError, match="does not fit the architecture"):
        backbones.load("timm/vit_tiny_patch16_224", str(file), 5, **{**options, "depth": 2})
    state["norm.weight"] = state["norm.weight"] * torch.nan
    save_file(state, file)
    with pytest.raises(SparsightError, match=r"'norm.weight' holds NaN"):
        backbones.load("timm/vit_tiny_patch16_224", str(file), 5, **options)
    file.write_bytes(b"not weights")
    with pytest.raises(SparsightError, match="not a readable safetensors file"):
        backbones.load("timm/vit_tiny_patch16_224", str(file), 5, **options)
