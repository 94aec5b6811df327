# images -> backbone -> activations -> sae -> steering -> pruning -> report
#   snakemake --cores 2                               the default run (params.yaml) into results/default
#   snakemake --cores 2 TARGET --configfile my.yaml   an overlay (what differs from params.yaml); targets come before it
import os
import sys

from sparsight.common.errors import SparsightError
from sparsight.config.schema import to_flags
from sparsight.pipeline.run import check_writable, load_run


configfile: os.path.relpath(f"{workflow.basedir}/params.yaml")


try:
    RUN = load_run(config, workflow.configfiles)
    check_writable(RUN.folder)
except SparsightError as error:
    sys.exit(f"error in params.yaml or its overlay: {error}")
R = RUN.folder.as_posix()


include: "workflow/rules/jobs.smk"
include: "workflow/rules/common.smk"
include: "workflow/rules/images.smk"
include: "workflow/rules/backbone.smk"
include: "workflow/rules/activations.smk"
include: "workflow/rules/sae.smk"
include: "workflow/rules/steering.smk"
include: "workflow/rules/pruning.smk"
include: "workflow/rules/figures.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/provenance.smk"


rule all:
    default_target: True
    input:
        FINISHED,
        rules.provenance.output,
