import ast
import re
import sys
from functools import cache
from pathlib import Path

from sparsight.trust import mark

if workflow.is_main_process:  # not a job on a cluster node, which reads these files too
    for stage, reason in mark(RUN).items():
        print(f"{stage} is made again: {reason}", file=sys.stderr)

# What pruning steers with: steering result -> SAE.
STEERED = {
    name: sae
    for name, sae in RUN.steering_names.items()
    if RUN.pruning and name.rpartition("-s")[0] == RUN.pruning.steering
}


def flags(section=None):
    """The flags that every stage script takes, and those of the stage's own section."""
    common = f"--seed {RUN.seed} {to_flags(RUN.compute)}"
    return f"{common} {to_flags(section)}" if section is not None else common


def one_of(names):
    """The constraint of a wildcard that stands for one of these names, of which there may be none."""
    return "|".join(map(re.escape, names)) or "(?!)"


def sae_name(wildcards):
    """The SAE that a job is about, or that its steering result uses."""
    return getattr(wildcards, "sae", None) or RUN.steering_names[f"{wildcards.steering}-s{wildcards.seed}"]


def sae_section(wildcards):
    return RUN.sae_names[sae_name(wildcards)]


def sae_code(name):
    """The file of an SAE's variant, which scripts load by name."""
    return f"src/sparsight/sae/{RUN.sae_names[name].kind}.py"


def store_of(split):
    """The manifest of the store that an SAE reads."""
    return lambda wildcards: f"{R}/activations/{sae_section(wildcards).backbone}/{split}.json"


def stores_of(backbone, splits):
    return expand(f"{R}/activations/{{backbone}}/{{split}}.json", backbone=backbone, split=splits)


def stores_of_steering(wildcards):
    """VS2++ looks up the embeddings of every image, the other kinds only what the train split is like."""
    splits = ["train", "val", "test"] if RUN.steering[wildcards.steering].kind == "vs2++" else ["train"]
    return stores_of(sae_section(wildcards).backbone, splits)


def stores_of_finder(wildcards):
    """Where VS2++ finds neighbours; nothing for other kinds."""
    section = RUN.steering[wildcards.steering]
    backbone = section.neighbour_backbone or sae_section(wildcards).backbone
    return stores_of(backbone, ["train", "val", "test"]) if section.kind == "vs2++" else []


def backbone_of_sae(wildcards):
    return f"{R}/backbones/{sae_section(wildcards).backbone}/model.safetensors"


def backbone_of_policy(wildcards):
    return f"{R}/backbones/{RUN.policies[wildcards.policy].backbone}/model.safetensors"


@cache
def sources(script, *extra):
    """A stage script and every file of sparsight that it can reach, so that a changed line reruns the stage.

    What is loaded by name at run time (an SAE variant, a template) is given as ``extra``; a kernel backend is
    added wherever kernels are used.
    """
    found, todo = set(), [str(Path("workflow/scripts", script)), *extra]
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += imports(path)
            if path == "src/sparsight/kernels/__init__.py":
                todo += map(str, Path(path).parent.glob("*.py"))
    return sorted(found)


@cache
def imports(path):
    """The files of src/sparsight that a Python file imports anywhere in it."""
    if not path.endswith(".py"):
        return []
    names, nodes = [], [ast.parse(Path(path).read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom):
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        nodes += ast.iter_child_nodes(node)
    files = [Path("src", *name.split(".")) for name in names]
    candidates = [p for file in files for p in (file.with_suffix(".py"), file / "__init__.py")]
    return [str(p) for p in candidates if p.exists()]
