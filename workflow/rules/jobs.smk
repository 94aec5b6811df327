import os
import shlex
import shutil
import sys
from pathlib import Path

from sparsight.report.headline import headline

# `python` in a rule is the interpreter that runs Snakemake, even if its environment is not activated.
os.environ.update(PATH=os.pathsep.join([str(Path(sys.executable).parent), os.getenv("PATH", "")]))

# The folder of the stage scripts, quoted: the path may contain any character, and --directory may be another folder.
SCRIPTS = shlex.quote(os.path.relpath(f"{workflow.basedir}/workflow/scripts"))

THREADS = RUN.compute.threads  # fixed, because Snakemake's {threads} shrinks with --cores

# exec: the stage replaces the shell. A shell would die of SIGTERM, and Snakemake and SLURM would take the job as finished
# while the stage still writes its checkpoint.
shell.prefix("set -euo pipefail; exec ")


onsuccess:
    if Path(R, "metrics.json").exists() and Path(R, "report", "index.html").exists():
        main = next(iter([*RUN.steered, *RUN.steering_names.values(), *RUN.sae_names]), "")
        print(f"{headline(Path(R, 'metrics.json'), main)}\nthe report: {R}/report/index.html", file=sys.stderr)


onerror:
    if shutil.disk_usage(R).free < 2**20:  # too full for a log that says so
        print(f"error: the disk of {R} is full; make room and give the same command again", file=sys.stderr)


ON_GPU = RUN.compute.device == "cuda"


def side_by_side(passes):
    """Threads of a job that runs this many passes of a model in parallel on a CPU; a GPU gains nothing from them."""
    return THREADS if ON_GPU else passes * THREADS


def needs(extra_mb=lambda wildcards: 0, gpu=int(ON_GPU)):
    """Runtime, memory and GPUs; runtime and memory scale with ``attempt``."""
    return {
        "mem_mb": lambda wildcards, attempt: (4000 + extra_mb(wildcards)) * attempt,
        "runtime": lambda wildcards, attempt: 240 * attempt,
        "gpu": gpu,
    }
