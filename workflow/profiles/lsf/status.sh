#!/bin/sh
# What became of LSF job $1, in the words of Snakemake's generic executor.
case "$(bjobs -noheader -o stat "$1" 2>/dev/null)" in
DONE) echo success ;;
EXIT) echo failed ;;
*) echo running ;;
esac
