# Asymmetric Patch Sampling: the whole study as one DAG.
#
#   snakemake all                                   config/config.yaml on this machine
#   snakemake all --configfile config/cifar.yaml    another study
#   snakemake --profile slurm all                   on a cluster
#   snakemake finetune --forcerun finetune          one stage again
#
# Targets: data pretrain finetune linear_probe knn detection report all, and every result file.

from snakemake.utils import min_version

min_version("9.12")


include: "workflow/rules/common.smk"
include: "workflow/rules/outdated.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/pretrain.smk"
include: "workflow/rules/finetune.smk"
include: "workflow/rules/linear_probe.smk"
include: "workflow/rules/knn.smk"
include: "workflow/rules/detection.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        PLAN.manifests(),
        PLAN.everything(),
        PLAN.pages(),
