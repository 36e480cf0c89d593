"""Lays out a folder for `aps init`: a study, a Snakefile that includes the packaged workflow, profiles and a README."""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import suppress
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
    made = [folder / name for name in ("config", "Snakefile", "profiles", "slurm")]
    if taken := next((path for path in made if os.path.lexists(path)), None):
        raise UserError(f"{taken} is there already; name a new folder")
    readme = folder / "README.md"
    if not readme.exists():
        made.append(readme)
    try:
        profiles = [path for path in (SHARE / "workflow" / "profiles").glob("*/*") if path.is_file()]
        for source, target in (
            (SHARE / "config" / file, folder / "config" / "config.yaml"),
            *((path, folder / "profiles" / path.parent.name / path.name) for path in profiles),
        ):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
            target.chmod(target.stat().st_mode | stat.S_IWUSR)  # an installed package may be read-only
        (folder / "slurm").symlink_to("profiles/slurm")  # for `--profile slurm`
        (folder / "Snakefile").write_text(SNAKEFILE, encoding="utf-8")
        if readme in made:
            readme.write_text(README.format(name=folder.resolve().name, study=study, about=about), encoding="utf-8")
    except OSError as error:
        for path in made:  # a part would be in the way of the next attempt
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        raise UserError(f"{folder}: cannot be written ({error.strerror}); free space or name another folder") from None
