import atexit
from functools import cache
from pathlib import Path

from sparsight.pipeline.code_digest import code_digest, files
from sparsight.pipeline.records import settings
from sparsight.pipeline.staleness import Marks

MARKS = Marks(RUN.folder, Path(".snakemake", "sparsight", RUN.run))
atexit.register(MARKS.save)


@cache
def code(script, *extra):
    """One digest of all the code that a stage script can reach.

    Files that are loaded by name at run time (an SAE variant, a template) are given as ``extra``.
    """
    root = Path(workflow.basedir)
    return code_digest(root, files(root, f"workflow/scripts/{script}", *extra))


def of(value, wildcards):
    """A value that may be a function of wildcards."""
    return value(wildcards) if callable(value) else value


def mark(stage, code, section=None, reads=None):
    """The mark of a stage: the input by which its rule runs again if the stage's record no longer holds.

    ``reads`` lists the files that the stage reads, if their number follows from other sections than its own. The digest of
    the code, the section and the files may be functions of wildcards.
    """

    def path(wildcards):
        name = stage.format(**dict(wildcards.items()))
        if workflow.is_main_process:  # a job on a cluster node evaluates its rule, too, and plans nothing
            now = settings(RUN.compute, of(section, wildcards), RUN.seed, of(code, wildcards))
            MARKS.renew(name, now, of(reads, wildcards))
        return MARKS.path(name).as_posix()

    return path


def flags(code, section=None):
    """The flags that every stage script takes, and those of the stage's own section.

    A function of wildcards, because Snakemake would take braces in a plain text for wildcards.
    """

    def text(wildcards):
        own = of(section, wildcards)
        common = f"--seed {RUN.seed} --code {of(code, wildcards)} {to_flags(RUN.compute.of_stage(own))}"
        return f"{common} {to_flags(own)}" if own is not None else common

    return text
