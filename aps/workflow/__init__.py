"""What Snakemake is asked: which jobs a study needs, with which files, settings and resources."""
