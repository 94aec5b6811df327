"""The ways from a folder of images to an SAE that benchmarks/end_to_end.py compares, each as a user would write it.

    python benchmarks/end_to_end_contestants.py saev '{"images": "...", ...}'    one contestant, a process of its own

``USER_CODE`` says which of these functions a user has to write. What only gives every contestant the same weights, as
model hubs need not be reachable, is in ``same_model_for_saev`` and in the lines on LayerScale, and is not counted.
Imports are inside the functions, because no environment has to hold all packages.

Shapes: B batch, D width (d_in), F latents (d_sae), P patches of an image.
"""

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MODEL = "vit_small_patch14_dinov2.lvd142m"
D_IN, PATCH_SIZE = 384, 14


@dataclasses.dataclass(frozen=True)
class Task:
    """What every contestant gets."""

    images: str
    """Folder of the training images, <class>/<image>."""
    weights: str
    """The ViT's weights, a safetensors file under timm's names."""
    out: str
    """Folder for everything that the contestant writes."""
    size: int
    block: int
    d_sae: int
    k: int
    lr: float
    batch: int
    model_batch: int
    workers: int
    """Processes that decode images and read activations, for contestants that use PyTorch's DataLoader."""

    @property
    def n_patches(self) -> int:
        """P."""
        return (self.size // PATCH_SIZE) ** 2


def vit(task: Task) -> Any:
    """The model."""
    import timm

    local = {"file": task.weights}
    return timm.create_model(MODEL, pretrained=True, img_size=task.size, pretrained_cfg_overlay=local).eval()


def pictures(task: Task, model: Any) -> Any:
    """Batches of preprocessed images and their labels."""
    from timm.data import create_transform, resolve_model_data_config
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    settings = resolve_model_data_config(model, args={"input_size": (3, task.size, task.size)})
    dataset = ImageFolder(task.images, create_transform(**settings))
    return DataLoader(dataset, batch_size=task.model_batch, num_workers=task.workers)


def patches(task: Task, model: Any, loader: Any) -> Iterator[Any]:
    """The block's output at the patches of every batch of images, (B, D)."""
    import torch

    kept: list[torch.Tensor] = []
    model.blocks[task.block].register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.inference_mode():
        for images, _ in loader:
            model.forward_features(images)
            yield kept.pop()[:, 1:].flatten(0, 1)


def stored(task: Task, n_rows: int, batches: Iterator[Any]) -> Any:
    """A memory map of all activations, fp16."""
    import numpy as np

    x = np.memmap(Path(task.out, "activations.f16"), mode="w+", dtype=np.float16, shape=(n_rows, D_IN))
    row = 0
    for batch in batches:
        x[row : row + len(batch)] = batch.numpy()
        row += len(batch)
    x.flush()
    return x


def shuffled(x: Any, batch: int) -> Iterator[Any]:
    """Batches of all rows in random order, (B, D)."""
    import numpy as np
    import torch

    order = np.random.default_rng(0).permutation(len(x))
    for start in range(0, len(x), batch):
        yield torch.from_numpy(x[np.sort(order[start : start + batch])]).float()


def plain(task: Task) -> None:
    """PyTorch and timm: what one writes first."""
    import torch
    from safetensors.torch import save_file

    model = vit(task)
    loader = pictures(task, model)
    x = stored(task, len(loader.dataset) * task.n_patches, patches(task, model, loader))
    torch.manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(task.d_sae, D_IN), dim=1)
    W_enc = W_dec.T.contiguous()
    b_enc, b_dec = torch.zeros(task.d_sae), torch.zeros(D_IN)
    parameters = [parameter.requires_grad_() for parameter in (W_enc, b_enc, W_dec, b_dec)]
    adam = torch.optim.Adam(parameters, lr=task.lr)
    for batch in shuffled(x, task.batch):
        values, indices = ((batch - b_dec) @ W_enc + b_enc).topk(task.k, dim=1)
        z = torch.zeros(len(batch), task.d_sae).scatter(1, indices, values.relu())
        loss = (batch - z @ W_dec - b_dec).square().sum(dim=1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)
    weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    save_file({name: value.detach() for name, value in weights.items()}, Path(task.out, "sae.safetensors"))


def sae_lens(task: Task) -> None:
    """SAELens: it has no activations of ViTs, but its trainer takes any iterator of activations."""
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    model = vit(task)
    loader = pictures(task, model)
    x = stored(task, len(loader.dataset) * task.n_patches, patches(task, model, loader))
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_IN, d_sae=task.d_sae, k=task.k))
    config = SAETrainerConfig(
        total_training_samples=len(x), train_batch_size_samples=task.batch, lr=task.lr, lr_end=task.lr
    )  # fmt: skip
    SAETrainer(config, sae, shuffled(x, task.batch)).fit().save_inference_model(Path(task.out, "sae"))


def saev(task: Task) -> None:
    """saev: its own activations, and its one kind of SAE, ReLU with an L1 penalty; defaults where nothing is said.

    ``training.main`` would evaluate after training, in another pass over all activations; the SAE is saved without it.
    """
    from saev import activations, config, nn, training

    same_model_for_saev(task)
    images = config.Activations(
        data=config.ImageFolderDataset(task.images), dump_to=task.out, vit_family="dinov2", vit_ckpt="dinov2_vits14",
        vit_batch_size=task.model_batch, n_workers=task.workers, d_vit=D_IN, vit_layers=[task.block],
        n_patches_per_img=task.n_patches, device="cpu",
    )  # fmt: skip
    activations.main(images)
    data = config.DataLoad(shard_root=activations.get_acts_dir(images), layer=task.block)
    train = config.Train(
        data=data, n_workers=task.workers, n_patches=images.data.n_imgs * task.n_patches,
        sae=config.SparseAutoencoder(d_vit=D_IN, exp_factor=round(task.d_sae / D_IN)), lr=task.lr, n_lr_warmup=0,
        sae_batch_size=task.batch, track=False, device="cpu",
    )  # fmt: skip
    saes, _, _ = training.train([train])
    nn.dump(f"{task.out}/sae.pt", saes[0])


def same_model_for_saev(task: Task) -> None:
    """Replace two functions of saev: torch.hub's download of DINOv2, and its preprocessing, always of 224 pixels."""
    import torch
    from saev import activations
    from timm.data import create_transform, resolve_model_data_config

    model = vit(task)
    settings = resolve_model_data_config(model, args={"input_size": (3, task.size, task.size)})

    class Dinov2(torch.nn.Module):
        """The names of DINOv2's own repository."""

        num_register_tokens = 0

        def __init__(self) -> None:
            super().__init__()
            self.model, self.blocks = model, torch.nn.ModuleList(model.blocks)

        def forward_features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            tokens = self.model.forward_features(images)
            return {"x_norm_clstoken": tokens[:, 0], "x_norm_patchtokens": tokens[:, 1:]}

    activations.torch.hub.load = lambda *_: Dinov2()
    activations.make_img_transform = lambda *_: create_transform(**settings)


def vit_prisma(task: Task) -> None:
    """ViT-Prisma 0.1.4: a model with hooks, and no SAE, so this ends with the activations.

    ``HookedViT.from_pretrained`` knows no DINOv2: neither its configuration nor LayerScale.
    """
    import torch
    from vit_prisma.configs.HookedViTConfig import HookedViTConfig
    from vit_prisma.models.base_vit import HookedViT
    from vit_prisma.prisma_tools.loading_from_pretrained import convert_timm_weights

    timm_model = vit(task)
    loader = pictures(task, timm_model)
    config = HookedViTConfig(
        n_layers=12, d_model=D_IN, d_head=64, d_mlp=4 * D_IN, n_heads=6, image_size=task.size, patch_size=PATCH_SIZE,
        n_classes=1,
    )  # fmt: skip
    state = without_layer_scale(timm_model)
    model = HookedViT(config)
    model.load_state_dict(convert_timm_weights(state, config), strict=False)
    name = f"blocks.{task.block}.hook_resid_post"

    def batches() -> Iterator[Any]:
        with torch.inference_mode():
            for images, _ in loader:
                _, cache = model.run_with_cache(images, names_filter=name, stop_at_layer=task.block + 1)
                yield cache[name][:, 1:].flatten(0, 1)

    stored(task, len(loader.dataset) * task.n_patches, batches())


def without_layer_scale(model: Any) -> dict[str, Any]:
    """The same model's weights, LayerScale multiplied into the layers before it, with an empty classifier."""
    import torch

    state = dict(model.state_dict())
    for i in range(len(model.blocks)):
        for scale, layer in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            gamma = state.pop(f"blocks.{i}.{scale}.gamma")
            state[f"blocks.{i}.{layer}.weight"] = gamma[:, None] * state[f"blocks.{i}.{layer}.weight"]
            state[f"blocks.{i}.{layer}.bias"] = gamma * state[f"blocks.{i}.{layer}.bias"]
    return {**state, "head.weight": torch.zeros(1, D_IN), "head.bias": torch.zeros(1)}


def overlay(task: Task, precision: str) -> str:
    """All that a user of sparsight writes; it takes the folder that has the split folders."""
    return f"""\
run: run
compute: {{threads: 2, precision: {precision}}}
images: {{source: folder, path: {Path(task.images).parent}}}
backbones:
  vit:
    model: timm/{MODEL}
    weights: {task.weights}
    architecture: {{img_size: {task.size}, patch_size: 14, in_chans: 3, embed_dim: 384, depth: 12, num_heads: 6}}
    training: none
    epochs: 0
    batch_size: 64
    rotate: 0
    zoom: 0
    shift: 0
  clip: null
activations: {{sites: [blocks.{task.block}.output], tokens: patches, batch_size: {task.model_batch}}}
saes:
  topk: {{kind: topk, backbone: vit, site: blocks.{task.block}.output, d_sae: {task.d_sae}, k: {task.k}, seeds: [0],
    epochs: 1, batch_size: {task.batch}, lr: {task.lr}, metrics: reconstruction}}
  switch: null
  resae: null
  plain: null
  final: null
  patches: null
attribution: {{topk: null}}
policies: {{heads: null}}
steering: {{class-latents: null, vs2: null, neighbours: null}}
pruning: null
"""


PEERS: dict[str, Callable[[Task], None]] = {
    "timm and PyTorch": plain, "sae-lens": sae_lens, "saev": saev, "vit-prisma": vit_prisma
}  # fmt: skip
USER_CODE: dict[str, list[Callable[..., object]]] = {
    "timm and PyTorch": [vit, pictures, patches, stored, shuffled, plain],
    "sae-lens": [vit, pictures, patches, stored, shuffled, sae_lens],
    "saev": [saev],
    "vit-prisma": [vit, pictures, stored, without_layer_scale, vit_prisma],
}


def user_lines(name: str) -> int:
    """Lines of code of a contestant that are not empty, without docstrings."""
    lines = 0
    for function in USER_CODE[name]:
        source = inspect.getsource(function).replace(function.__doc__ or "", "")
        lines += sum(bool(line.strip().strip('"')) for line in source.splitlines())
    return lines


if __name__ == "__main__":
    PEERS[sys.argv[1]](Task(**json.loads(sys.argv[2])))
