#!/usr/bin/env bash
# Runs in the environment that Snakemake has just made, as a copy beside it: ENVIRONMENT.post-deploy.sh. Snakemake makes
# another when this file changes; so `make lock` writes here which versions it installs.
# constraints.txt 03c3fdfa33368bcc3a04d7f338a7f2c4de8e3cd4bedcaf8b068941c19ece3dfa
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
