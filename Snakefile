# eoraflow: from config.yaml to low-bit models with low-rank compensation, judged and reported.
#
#   download -> compress ------------------------------+
#         \-> tokenize -> covariance (shard by shard) -+-> decompose -> adapter (each rank)
#                                                                          \-> its bits, or tuned
#   every model, compressed model and adapter -> evaluate (each task) -> report

import gc

from snakemake.utils import min_version

min_version("9.27")

# A large config's graph is millions of objects, and all of them live on: to search it for garbage
# again and again as it grows would take a fifth of the time and find nothing.
gc.set_threshold(*gc.get_threshold()[:2], 1_000)


# A config file given on the command line replaces the shipped one; it is not merged into it.
if not workflow.overwrite_configfiles:

    configfile: "config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/download.smk"
include: "workflow/rules/tokenize.smk"
include: "workflow/rules/compress.smk"
include: "workflow/rules/covariance.smk"
include: "workflow/rules/adapter.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        rules.report.output,
        wanted(),
    localrule: True
    message:
        "All that the config asks for"


onstart:
    refuse_doubles()


onsuccess:
    print(f"\nThe report: {Path(RESULTS, 'report.html').resolve()}")
    print(f"The table:  {Path(RESULTS, 'summary.csv').resolve()}")


onerror:
    print(f"\nA job failed; its log is named above. The logs of all jobs: {RESULTS}/logs")
