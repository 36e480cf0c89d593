#!/usr/bin/env python3
"""Submits one of Snakemake's job scripts by bsub and prints LSF's job number."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

script = sys.argv[1]
found = re.search(r"^# properties = (.*)$", Path(script).read_text(encoding="utf-8"), re.MULTILINE)
job = json.loads(found.group(1))
ask = {key: value for key, value in job["resources"].items() if value not in (None, "", "None")}
if ask.get("nodes", 1) > 1:
    sys.exit(f"{job['rule']}: {ask['nodes']} nodes need Slurm; set resources.{{stage}}.nodes: 1")
log = Path(".snakemake/lsf_logs", job["rule"])
log.mkdir(parents=True, exist_ok=True)

threads = ask.get("cpus_per_task") or ask.get("gpu", 0) * ask.get("cpus_per_gpu", 0) or job["threads"]
command = ["bsub", "-J", job["rule"], "-o", f"{log}/%J.log", "-n", str(threads), "-R", "span[hosts=1]"]
if "mem_mb" in ask:
    command += ["-M", f"{ask['mem_mb']}MB", "-R", f"rusage[mem={ask['mem_mb']}MB]"]
if "runtime" in ask:
    command += ["-W", str(ask["runtime"])]
if "slurm_partition" in ask:
    command += ["-q", ask["slurm_partition"]]
if "slurm_account" in ask:
    command += ["-P", ask["slurm_account"]]
if "gpu" in ask:
    command += ["-gpu", f"num={ask['gpu']}" + (f":gmodel={ask['gpu_model']}" if "gpu_model" in ask else "")]
os.chmod(script, 0o755)
done = subprocess.run([*command, script], stdout=subprocess.PIPE, text=True)
number = re.search(r"<(\d+)>", done.stdout)
if done.returncode or number is None:
    sys.exit(f"{' '.join(command)}: {done.stdout}")
print(number.group(1))
