"""Weights from files: what timm and open_clip write is read back, what could run code is refused."""

import os
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from conftest import data_folder
from safetensors.torch import save_file
from torch import Tensor

from sparsight import backbones
from sparsight.backbones import weights
from sparsight.common.errors import SparsightError

TIMM: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 8}
CLIP: dict[str, Any] = {
    "embed_dim": 24, "vision.width": 48, "vision.layers": 2, "vision.head_width": 16, "vision.patch_size": 8,
    "vision.image_size": 32, "text.width": 24, "text.layers": 1, "text.heads": 2,
}  # fmt: skip


def noisy(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def write(model: torch.nn.Module, path: Path, wrapped: bool = False) -> None:
    state: dict[str, Any] = model.state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif wrapped:
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    else:
        torch.save(state, path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224"]
)
def test_weights_written_by_timm_give_timm_s_logits(name: str, suffix: str, tmp_path: Path) -> None:
    model = noisy(timm.create_model(name, num_classes=7, **TIMM))
    write(model, path := tmp_path / f"w{suffix}", wrapped=suffix == ".pth")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(backbones.load(f"timm/{name}", str(path), 7, **TIMM)(x), model(x))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_written_by_open_clip_give_its_features(suffix: str, tmp_path: Path) -> None:
    backbone = backbones.load("open_clip/ViT-B-32-quickgelu", None, **CLIP)
    noisy(backbone.model)
    write(backbone.model, path := tmp_path / f"w{suffix}", wrapped=suffix == ".pt")
    other = backbones.load("open_clip/ViT-B-32-quickgelu", str(path), **CLIP)
    x, texts = torch.randn(2, 3, 32, 32), ["a photo of a cat.", "a photo of a dog."]
    theirs = backbone.model
    other.requires_grad_(False)
    assert torch.equal(other(x), theirs.encode_image(x))
    tokens = open_clip.get_tokenizer("ViT-B-32-quickgelu")(texts)
    assert torch.equal(other.encode_text(texts), theirs.encode_text(tokens, normalize=True))
    other.use_prompts(["cat", "dog"], ["a photo of a {}."])
    torch.testing.assert_close(other(x), theirs.get_logits(x, tokens)[0], atol=1e-4, rtol=1e-5)
    assert torch.equal(other.encode_image(x), theirs.encode_image(x, normalize=True))


class Code:
    """Unpickling it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("load", [lambda p: backbones.load("timm/vit_tiny_patch16_224", p, **TIMM),
                                  lambda p: backbones.load("open_clip/ViT-B-32", p, **CLIP)])  # fmt: skip
def test_a_pickle_with_code_is_refused_and_not_run(load: Any, tmp_path: Path) -> None:
    state: dict[str, Any] = timm.create_model("vit_tiny_patch16_224", **TIMM).state_dict()
    torch.save({**state, "extra": Code(tmp_path / "ran")}, tmp_path / "w.pt")
    with pytest.raises(SparsightError, match=r"w.pt: holds more than tensors .* save the state_dict as safetensors"):
        load(str(tmp_path / "w.pt"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"", "not a readable checkpoint"),
        (b"not a checkpoint", "holds more than tensors|not a readable checkpoint"),
        ([1, 2], "holds no state_dict"),
        ({"epoch": 3}, "holds no state_dict"),
        ({"w": torch.tensor([1.0, torch.nan])}, "'w' holds NaN"),
    ],
)
def test_files_that_hold_no_weights_are_refused(value: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(value) if isinstance(value, bytes) else torch.save(value, path)
    with pytest.raises(SparsightError, match=message):
        weights.read_weights(path)


def test_averaged_weights_are_preferred_and_half_precision_is_widened(tmp_path: Path) -> None:
    plain, average = {"w": torch.zeros(2)}, {"w": torch.ones(2, dtype=torch.float16)}
    torch.save({"model": plain, "model_ema": average, "args": {"lr": 0.1}}, tmp_path / "w.pt")
    (value,) = weights.read_weights(tmp_path / "w.pt").values()
    assert torch.equal(value, torch.ones(2)) and value.dtype == torch.float32


def test_positions_are_resized_to_another_image_size(tmp_path: Path) -> None:
    model: Any = noisy(timm.create_model("vit_tiny_patch16_224", num_classes=0, **TIMM))
    write(model, path := tmp_path / "w.safetensors")
    larger = {**TIMM, "img_size": 48}
    backbone = backbones.load("timm/vit_tiny_patch16_224", str(path), 4, **larger)
    assert backbone.n_patches == 36 and backbone.preprocess.size == (48, 48)
    assert torch.equal(backbone.model.pos_embed[:, 0], model.pos_embed[:, 0])
    clip = backbones.load("open_clip/ViT-B-32", None, **CLIP)
    write(clip.model, path)
    assert backbones.load("open_clip/ViT-B-32", str(path), **{**CLIP, "vision.image_size": 48}).n_patches == 36


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    write(backbones.load("open_clip/ViT-B-32", None, **CLIP).model, path := tmp_path / "w.pt")
    with pytest.raises(SparsightError, match=r"w.pt: does not fit the architecture"):
        backbones.load("open_clip/ViT-B-32", str(path), **{**CLIP, "vision.layers": 3})
    with pytest.raises(SparsightError, match=r"w.pt: does not fit the architecture"):
        backbones.load("timm/vit_tiny_patch16_224", str(path), **TIMM)
    with pytest.raises(SparsightError, match="there is no such weights file"):
        backbones.load("timm/vit_tiny_patch16_224", str(tmp_path / "none.pt"), **TIMM)


def test_real_dinov2_weights_at_another_image_size() -> None:
    """Against the documented way of loading them into timm."""
    from safetensors.torch import load_file
    from timm.models.vision_transformer import checkpoint_filter_fn

    path = data_folder() / "weights" / "vit_small_patch14_dinov2_focus.safetensors"
    model: Any = timm.create_model("vit_small_patch14_dinov2.lvd142m", pretrained=False, img_size=98, num_classes=0)
    state: dict[str, Tensor] = {k: v.float() for k, v in load_file(path).items()}
    model.load_state_dict(checkpoint_filter_fn(state, model))
    backbone = backbones.load("timm/vit_small_patch14_dinov2.lvd142m", str(path), img_size=98)
    x = torch.randn(2, 3, 98, 98)
    with torch.no_grad():
        assert torch.equal(backbone.taps(x, ["embedding"])["embedding"], model.eval()(x))
