"""Runs every benchmark in turn, each in a separate process, and prints a table of results: python -m benchmarks"""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.common import arguments, label, run, table_line
from benchmarks.peers import MISSING

NAMES = (
    "views",
    "decode",
    "sampler",
    "step",
    "ceiling",
    "probe",
    "scaling",
    "choices",
    "augment",
    "planning",
    "large",
    "peers",
)
# Run only where they are named: they compare nothing, and one of them needs minutes of 50 processes.
NAMED = ("server", "detection_step")
KNOWN = (*NAMES, *NAMED)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(KNOWN)}; default: all but the last two")
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(KNOWN)):
        parser.error(f"unknown benchmark {unknown[0]}; known: {', '.join(KNOWN)}")
    failed = []
    for name in args.names or [name for name in NAMES if name != "peers" or not MISSING]:
        print(f"{name}:", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(args.out)]
        if subprocess.run(command + ["--quick"] * args.quick).returncode:
            failed.append(name)
    print()
    for file in sorted(args.out.glob("*.json")):
        try:
            content = json.loads(file.read_text())
        except ValueError:  # a run was killed while it wrote, or the disk was full
            print(f"{file}: unreadable; delete it, or run that benchmark again", file=sys.stderr)
            continue
        if rows := content.get("rows"):
            print(f"{file.stem} ({content['date'][:10]}, {label(content['machine'])})")
            for row in rows:
                print("  " + table_line(row))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    run(main)
