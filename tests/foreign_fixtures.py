"""Writes tests/foreign: small SAEs saved by saev and Prisma themselves, with the codes that these compute.

Neither can be installed beside this package (saev 0.1.0 pins marimo and submitit; Prisma's SAEs are not on PyPI), so
their modules are loaded alone, with beartype, einops, jaxtyping, orjson, tyro and line_profiler:

    python tests/foreign_fixtures.py saev-0.1.0 SAEV-WHEEL
    python tests/foreign_fixtures.py saev SAEV-SOURCE/src     (github.com/OSU-NLP-Group/saev at 3d73f1f)
    python tests/foreign_fixtures.py prisma PRISMA-SOURCE/src (github.com/Prisma-Multimodal/ViT-Prisma at its main)
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "foreign"
D, F, K, N = 12, 24, 4, 32


def alone(root: Path, *packages: str) -> None:
    """Let modules of these packages be imported without the code of the packages themselves."""
    for name in packages:
        package = ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[name] = package


def perturbed(sae: Any, shift: float = 0.0) -> Any:
    """The SAE with weights as training could leave them: untied, decoder rows of many norms, biases."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(sae.named_parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            if name == "b_enc":
                parameter.add_(shift)
        for name, buffer in sae.named_buffers():
            if name == "activation.threshold":
                buffer.fill_(0.3)
    return sae.eval()


def expect(name: str, encode: Any, decode: Any) -> None:
    """Save activations with the tool's codes and reconstructions of them."""
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(1)) + 0.5
    with torch.no_grad():
        z = encode(x)
        x_hat = decode(z)
    save_file({"x": x, "codes": z.contiguous(), "x_hat": x_hat.contiguous()}, FOLDER / f"{name}.safetensors")


def old_saev(root: Path) -> None:
    alone(root, "saev")
    nn, config = importlib.import_module("saev.nn"), importlib.import_module("saev.config")
    sae = perturbed(nn.SparseAutoencoder(config.SparseAutoencoder(d_vit=D, exp_factor=F // D)))
    nn.dump(str(FOLDER / "saev-0.1.0.pt"), sae)
    expect("saev-0.1.0", lambda x: sae(x)[1], sae.decode)


def saev(root: Path) -> None:
    alone(root, "saev", "saev.nn")
    sys.modules["saev"].__version__ = "0.2.0"  # type: ignore[attr-defined]
    modeling = importlib.import_module("saev.nn.modeling")
    for name, activation, shift in (
        ("relu", modeling.Relu(), 0.0),
        ("topk", modeling.TopK(top_k=K), 6.0),  # no row with fewer than K positive pre-activations
        ("batchtopk", modeling.BatchTopK(top_k=K), 0.0),
    ):
        settings = modeling.SparseAutoencoderConfig(d_model=D, d_sae=F, activation=activation)
        sae = perturbed(modeling.SparseAutoencoder(settings), shift)
        modeling.dump(FOLDER / f"saev-{name}.pt", sae)
        expect(f"saev-{name}", lambda x, sae=sae: sae.encode(x).f_x, lambda z, sae=sae: sae.decode(z)[:, -1])


def prisma(root: Path) -> None:
    """As ``save_model`` writes it, with the settings as an object inside."""
    alone(
        root, "vit_prisma", "vit_prisma.sae", "vit_prisma.sae.training", "vit_prisma.prisma_tools", "vit_prisma.configs"
    )
    module, config = importlib.import_module("vit_prisma.sae.sae"), importlib.import_module("vit_prisma.sae.config")
    for name, cls, settings in (
        ("relu", module.StandardSparseAutoencoder, {"activation_fn_str": "relu"}),
        ("topk", module.StandardSparseAutoencoder, {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}),
        ("gated", module.GatedSparseAutoencoder, {"activation_fn_str": "relu", "architecture": "gated"}),
    ):
        about = config.VisionModelSAERunnerConfig(
            d_in=D, expansion_factor=F // D, normalize_activations="none", hook_point_layer=3,
            layer_subtype="hook_resid_post", _device="cpu", checkpoint_path="", **settings,
        )  # fmt: skip
        sae = perturbed(cls(about))
        sae.save_model(str(FOLDER / f"prisma-{name}.pt"))
        expect(f"prisma-{name}", lambda x, sae=sae: sae.encode(x)[1], sae.decode)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    sys.path.insert(0, sys.argv[2])
    {"saev-0.1.0": old_saev, "saev": saev, "prisma": prisma}[sys.argv[1]](Path(sys.argv[2]))
