#!/usr/bin/env bash
# Runs in the environment that Snakemake has just made, as a copy beside it: ENVIRONMENT.post-deploy.sh. Snakemake makes
# another when this file changes; so `make lock` writes here which versions it installs.
# constraints.txt 05a88ca2f444e5fc1b10d697f6efac4ec59fdab6e549fd51b5835e01b4541885
set -euo pipefail
fail() {
  echo "error: $1" >&2
  exit 1
}
[ -f "${APS_SOURCE:-}/pyproject.toml" ] || fail "'${APS_SOURCE:-}' has no pyproject.toml; set APS_SOURCE to a clone of the repository"
[ -w "$APS_SOURCE" ] || fail "'$APS_SOURCE' cannot be written, as pip has to; set APS_SOURCE to a clone of your own"
# A failed activation does not stop Snakemake; pip would change the environment that runs it.
[ "$(command -v python)" -ef "${0%.post-deploy.sh}/bin/python" ] || fail "conda did not activate ${0%.post-deploy.sh}"
unset PYTHONPATH # pip would take what it finds there for installed; jobs don't see it
# Editable, so that a change of the code needs no new environment.
python -m pip install --no-cache-dir --constraint "$APS_SOURCE/constraints.txt" --editable "$APS_SOURCE"
