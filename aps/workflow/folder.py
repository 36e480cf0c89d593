"""Lays out a folder for `aps init`: a study, a Snakefile that includes the packaged workflow, profiles and a README."""

from __future__ import annotations

import shutil
from pathlib import Path

from aps.errors import UserError
from aps.layout import SHARE

STUDIES = {
    "demo": ("config.yaml", "digits, on two CPU cores, in minutes; nothing is downloaded"),
    "cifar": ("cifar.yaml", "the twelve published CIFAR settings; a GPU each"),
    "own-images": ("own_images.yaml", "your own images in photos/, a folder a class"),
}

SNAKEFILE = """# The packaged workflow on the study in config/config.yaml. Rules of your own may follow.

from aps.layout import SHARE


include: str(SHARE / "Snakefile")


workflow.default_target = "all"  # which an included file can't set
"""

README = """# {name}

Made by `aps init --study {study}`: {about}.

    aps run -n                 what would run
    aps run                    everything; stop it at any moment, the same command goes on
    aps results                the table of what has finished

`config/config.yaml` is the study: change it, and what depends on the change runs again. `Snakefile` includes the workflow
that the package carries, so `snakemake` and its options work here too (`snakemake --profile slurm all` on a cluster, after
setting partition and account in `profiles/slurm/config.yaml`). Results come to `results/`.

An encoder is used by `aps embed`, `aps neighbours`, `aps predict` and `aps.load` (`aps --help`).
"""


def lay_out(folder: Path, study: str) -> None:
    """Write the folder's files.

    Raises:
        UserError: `study` is no key of STUDIES, or the folder has a study already or can't be written.
    """
    if study not in STUDIES:
        raise UserError(f"--study {study}: choose {', '.join(STUDIES)}")
    file, about = STUDIES[study]
    if taken := next((folder / name for name in ("config", "Snakefile", "profiles") if (folder / name).exists()), None):
        raise UserError(f"{taken} is there already; name a new folder")
    try:
        (folder / "config").mkdir(parents=True)
        shutil.copyfile(SHARE / "config" / file, folder / "config" / "config.yaml")
        shutil.copytree(
            SHARE / "workflow" / "profiles", folder / "profiles", ignore=shutil.ignore_patterns("__pycache__")
        )
        (folder / "slurm").symlink_to("profiles/slurm")  # for `--profile slurm`
        (folder / "Snakefile").write_text(SNAKEFILE)
        if not (folder / "README.md").exists():
            name = folder.resolve().name
            (folder / "README.md").write_text(README.format(name=name, study=study, about=about))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); name another folder") from None
