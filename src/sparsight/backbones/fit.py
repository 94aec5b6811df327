"""Trains a backbone, or uses its weights as they are, and measures its accuracy."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import save_file

from sparsight import config
from sparsight.backbones.backbone import Backbone
from sparsight.backbones.loading import keep_prompts, load_configured
from sparsight.backbones.prompts import templates_of
from sparsight.backbones.recipes import LinearProbeRecipe, Recipe, Supervised, correct
from sparsight.common.errors import SparsightError
from sparsight.common.files import write_json
from sparsight.common.intervals import wilson
from sparsight.common.progress import log
from sparsight.common.seeds import derive_seed
from sparsight.common.work import Work
from sparsight.config.backbone import RANDOM
from sparsight.images.class_names import readable
from sparsight.images.labels import need_labels, needs, unlabelled
from sparsight.images.manifest import Manifest
from sparsight.images.split import Split
from sparsight.training import loop
from sparsight.training.batches import RowNumbers


def fit(
    section: config.Backbone, manifest: Manifest, name: str, seed: int, work: Work, device: torch.device,
    n_parallel: int, record: dict[str, Any],
) -> None:  # fmt: skip
    """Write ``model.safetensors``, ``prompts.safetensors``, ``config.json`` and ``training.jsonl`` to ``work.out``.

    An open_clip model classifies by prompts: the class names in ``templates``. If it was trained by this run, it has
    seen these names, so this is prompt classification, not zero-shot. The test split is used once, at the end.

    Accuracies are over the labelled images of a split, and left out where there are none. Images without classes leave
    a timm model that is not trained the classifier of its weights, and an open_clip model no prompts.

    Args:
        n_parallel: number of micro-batches that run at the same time (:mod:`sparsight.training.microbatches`).
            Never changes a result.

    Raises:
        SparsightError: training on images without labels; or weights used as they are (epochs 0) without a classifier,
            or with one for another number of classes.
    """
    need_labels(manifest, needs(f"backbones.{name}", section))
    torch.manual_seed(derive_seed(seed, "backbone", name, "init"))
    classes = manifest.classes
    names = [readable(label) for label in classes]
    clip = section.model.startswith("open_clip/")
    classifies = section.training != "none"
    outputs = (None if clip or section.epochs == 0 else len(classes)) if classifies or clip else 0
    backbone = load_configured(section.model, section.weights, outputs, section.architecture).to(device)
    templates = templates_of(manifest.about["source"], section.templates) if clip and classes and classifies else ()
    if classifies and classes and not clip and backbone.n_classes != len(classes):
        raise SparsightError(
            f"backbones.{name}: its classifier has {backbone.n_classes} outputs, the images "
            f"{len(classes)} classes; set epochs to train a new classifier with the backbone, or training: none to use "
            "its embeddings alone"
        )
    if classifies and section.epochs == 0 and backbone.random_classifier:
        raise SparsightError(
            f"backbones.{name}: {section.weights} has no classifier of {backbone.n_classes} outputs; set epochs to "
            "train one, architecture.num_classes to their number in the file, or training to none, for embeddings alone"
        )
    train, val, test = (manifest.split(part) for part in ("train", "val", "test"))
    evaluations = {"val": (val, templates), "test": (test, templates)} if classifies else {}
    if section.held_out_templates:
        evaluations["test_held_out"] = (test, section.held_out_templates)
    evaluations = {part: (split, texts) for part, (split, texts) in evaluations.items() if (split.labels >= 0).any()}
    if classifies and (missing := unlabelled({"val": val, "test": test})):
        log(f"{missing} have no label: accuracy is of labelled images alone, or left out without any")

    recipe = _recipe(section, backbone, train, val, names, templates, n_parallel)
    steps_seed = derive_seed(seed, "backbone", name)
    batches, log_path = RowNumbers(len(train), section.batch_size, steps_seed), work.out / "training.jsonl"
    loop.train(recipe, batches, section.epochs, steps_seed, work.state, log_path)
    with recipe.averaged():
        accuracy = {}
        for part, (split, texts) in evaluations.items():
            if texts:
                backbone.use_prompts(names, texts)
            accuracy[part] = wilson(correct(backbone, split, section.batch_size, recipe.parts))
        state = {
            key: value.clone(memory_format=torch.contiguous_format)
            for key, value in backbone.model.state_dict().items()
        }
        if templates:
            backbone.use_prompts(names, templates)
    for part, value in accuracy.items():
        log(f"{name}: accuracy on {part} {value['accuracy']:.4f}")
    metadata = {
        "format_version": 1,
        "model": section.model,
        "weights": section.weights,
        "architecture": section.architecture,
        "training": section.training if section.epochs or not classifies else None,
        "n_blocks": backbone.n_blocks,
        "n_heads": backbone.n_heads,
        "d_in": backbone.d_in,
        "classes": classes,
        "prompt_names": names,
        "templates": list(templates),
        "template_choice": list(section.templates),
        "held_out_templates": list(section.held_out_templates),
        "preprocess": dataclasses.asdict(backbone.preprocess),
        "accuracy": accuracy,
        "licence": _licence(section, backbone),
        "record": record,
    }
    save_file(state, work.out / "model.safetensors")
    keep_prompts(backbone, work.out, names, list(templates))
    write_json(work.out / "config.json", metadata)


def _recipe(
    section: config.Backbone, backbone: Backbone, train: Split, val: Split, names: list[str],
    templates: Sequence[str], n_parallel: int,
) -> Recipe:  # fmt: skip
    if section.epochs == 0:
        return Recipe(section, backbone, backbone, train, val, n_parallel)
    if section.training == "contrastive":
        from sparsight.backbones.contrastive import Contrastive  # open_clip takes seconds to import

        return Contrastive(section, backbone, train, val, names, templates, n_parallel)
    return (LinearProbeRecipe if section.training == "probe" else Supervised)(section, backbone, train, val, n_parallel)


def _licence(section: config.Backbone, backbone: Backbone) -> str:
    if section.weights in (None, RANDOM):
        return "trained by this run" if section.weights is None else "drawn by this run"
    pretrained_cfg = getattr(backbone.model, "pretrained_cfg", {}) if section.weights == "pretrained" else {}
    return pretrained_cfg.get("license") or "unknown"
