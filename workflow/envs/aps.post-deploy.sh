#!/usr/bin/env bash
# Runs in the environment that Snakemake has just made. Editable, so that a change of the code needs no new environment.
set -euo pipefail
if [ ! -f "${APS_SOURCE:-}/pyproject.toml" ]; then
  echo "error: '${APS_SOURCE:-}' has no pyproject.toml; set APS_SOURCE to a clone of the repository" >&2
  exit 1
fi
python -m pip install --no-cache-dir --constraint "$APS_SOURCE/constraints.txt" --editable "$APS_SOURCE"
