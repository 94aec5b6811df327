import re
import sys
from functools import cache
from pathlib import Path

from sparsight.pipeline.code_digest import files as code_files
from sparsight.pipeline.code_digest import write_digest
from sparsight.pipeline.staleness import mark

if workflow.is_main_process:  # a job on a cluster node reads these files, too, and plans nothing
    for stage, reason in mark(RUN).items():
        print(f"{stage} is made again: {reason}", file=sys.stderr)


def flags(section=None):
    """The flags that every stage script takes, and those of the stage's own section.

    Called in a function of wildcards, because Snakemake would take braces in a plain text for wildcards.
    """
    common = f"--seed {RUN.seed} {to_flags(RUN.compute)}"
    return f"{common} {to_flags(section)}" if section is not None else common


def one_of(names):
    """The constraint of a wildcard that takes one of these names; there may be none."""
    return "|".join(map(re.escape, names)) or "(?!)"


# Sections of SAEs that steering and pruning depend on: they run first, so that fewer cores are idle at the end.
STEERED = {sae.rpartition("-s")[0] for sae in RUN.steering_names.values()}


def steered_sae(wildcards):
    """The SAE that a steering result uses."""
    return RUN.steering_names[f"{wildcards.steering}-s{wildcards.seed}"]


def sae_section(wildcards):
    """The section of SAEs of a job: its own, or that of the SAE which its steering result uses."""
    own = getattr(wildcards, "section", None)
    return RUN.saes[own] if own else RUN.sae_names[steered_sae(wildcards)]


def train_store(wildcards):
    """The manifest of the store on which SAEs are trained."""
    return f"{R}/activations/{sae_section(wildcards).backbone}/train.json"


def evaluation_stores(wildcards):
    """Evaluation fits on train, chooses on val and measures on test."""
    return stores_of(sae_section(wildcards).backbone, ["train", "val", "test"])


def stores_of(backbone, splits):
    return expand(f"{R}/activations/{{backbone}}/{{split}}.json", backbone=backbone, split=splits)


def stores_of_steering(wildcards):
    """VS2++ reads the embeddings of all splits; the other kinds read only the train split."""
    splits = ["train", "val", "test"] if RUN.steering[wildcards.steering].kind == "vs2++" else ["train"]
    return stores_of(sae_section(wildcards).backbone, splits)


def stores_of_finder(wildcards):
    """The stores in which VS2++ finds neighbours; none for other kinds."""
    section = RUN.steering[wildcards.steering]
    backbone = section.neighbour_backbone or sae_section(wildcards).backbone
    return stores_of(backbone, ["train", "val", "test"]) if section.kind == "vs2++" else []


def backbone_of_sae(wildcards):
    return f"{R}/backbones/{sae_section(wildcards).backbone}/model.safetensors"


def backbone_of_policy(wildcards):
    return f"{R}/backbones/{RUN.policies[wildcards.policy].backbone}/model.safetensors"


@cache
def code(script, *extra):
    """The file that holds one digest of all the code that a stage script can reach.

    Files that are loaded by name at run time (an SAE variant, a template) are given as ``extra``.
    """
    names = [Path(script).stem, *dict.fromkeys(Path(path).stem for path in extra if path.endswith(".py"))]
    path, repository = Path(R, ".trust", "code", "-".join(names)), Path(workflow.basedir)
    if workflow.is_main_process:
        write_digest(path, repository, code_files(repository, f"workflow/scripts/{script}", *extra))
    return path.as_posix()


def variant(section):
    """The file of an SAE variant, which scripts load by name."""
    return f"src/sparsight/sae/variants/{section.kind}.py"


def code_of_sae(script, *extra):
    return lambda wildcards: code(script, variant(sae_section(wildcards)), *extra)
