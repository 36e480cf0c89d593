# `snakemake` in the root of the repository; everything is in workflow/.


include: "workflow/Snakefile"


workflow.default_target = "all"  # which an included file can't set
