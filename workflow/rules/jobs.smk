import os
import shlex
import shutil
import sys
from pathlib import Path

# `python` in a rule is the one that runs Snakemake, also where its environment is not activated.
os.environ.update(PATH=os.pathsep.join([str(Path(sys.executable).parent), os.getenv("PATH", "")]))

# The stage scripts, also where Snakemake is started in another folder (--directory); the path may have any character.
SCRIPTS = shlex.quote(os.path.relpath(f"{workflow.basedir}/workflow/scripts"))

THREADS = RUN.compute.threads  # what a stage takes; Snakemake's {threads} shrinks with --cores

# The stage takes the shell's place: a shell would die of SIGTERM, and Snakemake and SLURM would take the job for
# finished while the stage still writes its checkpoint.
shell.prefix("set -euo pipefail; exec ")


onerror:
    if shutil.disk_usage(R).free < 2**20:  # where no log could be written that says so
        print(f"error: the disk of {R} is full; make room and give the same command again", file=sys.stderr)


def side_by_side(passes):
    """The threads of a job that can run so many passes of a model side by side; on a GPU they would gain nothing."""
    return passes * THREADS if RUN.compute.device == "cpu" else THREADS


def needs(extra_mb=lambda wildcards: 0, gpu=int(RUN.compute.device == "cuda")):
    """What a job asks a cluster for: minutes, megabytes, cards. One that failed for want of them gets more."""
    return {
        "mem_mb": lambda wildcards, attempt: (4000 + extra_mb(wildcards)) * attempt,
        "runtime": lambda wildcards, attempt: 240 * attempt,
        "gpu": gpu,
    }
