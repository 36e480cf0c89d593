"""The command line, `python -m aps VERB`: runs a verb and turns its errors into sentences and exit statuses.

    table.py       the table of verbs: name, function, help, options
    options.py     the options of each verb
    verbs.py       what each tool does
    stage.py       what the verb of a stage does
    completion.py  what the shell completes
    study.py       the study that a command names, and commands that work as printed

Heavy imports happen inside the verb that needs them, so that `--help` and planning stay quick.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from pathlib import Path

from aps.cli import completion
from aps.cli.study import runnable
from aps.cli.table import parse, parser
from aps.errors import Preempted, UserError
from aps.files import DISK_ERRORS
from aps.runtime.memory import lost_worker, out_of_memory
from aps.runtime.ranks import first_to_tell, ranks, started_by_torchrun
from aps.runtime.signals import STOPPED, STOPPED_STATUS
from aps.stages import STAGES

__all__ = ["main", "parser"]

NO_ANSWER = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT}  # of a disk or a file server
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
MISTAKE = 2  # the user's: the same command fails again
PREEMPTED = 75  # EX_TEMPFAIL: the work is saved, start the same command again


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 a mistake the user can fix, 75 preempted (run it again to go on).

    docs/reliability.md has all of them.
    """
    _prepare_streams()
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        verb = next(iter(sys.argv[1:] if arguments is None else arguments), "")
        print(_stopped(verb), file=sys.stderr)
        return STOPPED_STATUS
    except Exception as error:
        if (sentence := _blamed(error)) is not None:
            error.add_note(sentence)  # the last line, under the traceback
        raise


def _stopped(verb: str) -> str:
    """What the same command would do after Ctrl-C: only stages have checkpoints, and not all of them."""
    if verb in STAGES:
        return f"{STOPPED}, if it left one"
    again = "stopped by the keyboard; run the same command again"
    return f"{again}, it keeps the downloads and the images that are done" if verb == "data" else again


def _prepare_streams() -> None:
    """Let nothing that is printed end a verb: a letter that a terminal does not have is escaped, a closed stream is dropped."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # print(file=None) would write the messages meant for stderr into stdout
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - it stays open
        elif (reconfigure := getattr(getattr(sys, name), "reconfigure", None)) is not None:
            reconfigure(errors="backslashreplace")


def _blamed(error: Exception) -> str | None:
    """A sentence for a crash that names the file of a method, strategy, dataset or stage in which it began, if it did."""
    from aps.registry import REGISTRIES, frame_in, shown_file

    modules = [known.module(name) for known in REGISTRIES for name in known.names()]
    modules += [row.module for row in STAGES.values()]
    files = {getattr(sys.modules.get(module), "__file__", None) for module in modules}
    if (frame := frame_in(error, files)) is None:
        return None
    return (
        f"error: {shown_file(Path(frame.filename))}, line {frame.lineno}, {frame.name}: {type(error).__name__}, as above; "
        "correct it there if the file is yours, else report it"
    )


def _main(arguments: list[str] | None) -> int:
    if completion.asked():
        completion.offer(parser())
    args = parse(sys.argv[1:] if arguments is None else list(arguments))
    if (mistake := _noted_mistake(args)) is not None:
        print(f"error: {mistake}\nnot tried again, since another attempt changes nothing of it", file=sys.stderr)
        return MISTAKE
    try:
        args.run(args)
        sys.stdout.flush()  # a disk that is full may be met only now
    except UserError as error:
        return _refused(runnable(str(error), args), args)
    except Preempted as error:
        if ranks().rank == 0:
            print(f"stopped: {error}", file=sys.stderr)
        return 0 if started_by_torchrun() else PREEMPTED  # torchrun would take another status for a failure
    except BrokenPipeError:
        _drop_output()
        return 1
    except Exception as error:
        if (sentence := out_of_memory(error, args.verb)) is not None:
            print(f"error: {sentence}", file=sys.stderr)
            return MISTAKE  # not noted: a further attempt asks for more memory
        if (sentence := lost_worker(error, args.verb)) is not None:
            print(f"error: {sentence}", file=sys.stderr)
            return 1
        if isinstance(error, OSError) and error.errno in NO_ANSWER:
            what = error.filename or "a file"
            print(
                f"error: {what}: {error.strerror}; the disk did not answer, run the same command again", file=sys.stderr
            )
            return 1  # another attempt may meet a disk that does
        if (sentence := _disk_sentence(error)) is None:
            raise
        return _refused(sentence, args)
    return 0


def _refused(sentence: str, args: argparse.Namespace) -> int:
    """Prints a mistake of the user's, and notes it for further attempts of the same job."""
    if first_to_tell():
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        if (note := getattr(args, "mistake", None)) is not None:
            with contextlib.suppress(OSError):  # the disk may be what is wrong
                note.write_text(sentence, encoding="utf-8", errors="backslashreplace")
    return MISTAKE


def _noted_mistake(args: argparse.Namespace) -> str | None:
    """The mistake for which an earlier attempt of this job was refused.

    Snakemake's retries start a failed job again whatever its exit status was. The first attempt has number 1.
    """
    note = getattr(args, "mistake", None)
    if note is None or started_by_torchrun():
        return None
    with contextlib.suppress(OSError, ValueError):
        if args.attempt > 1:
            return str(note.read_text(encoding="utf-8"))
        note.unlink(missing_ok=True)
    return None


def _disk_sentence(error: Exception) -> str | None:
    """A sentence for an error of the user's disk or folders; None for any other error."""
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return "a path begins with ~, and HOME is not set; set HOME, or write the path in full"
    if not isinstance(error, OSError) or error.errno not in {*DISK_ERRORS, errno.EEXIST}:
        return None
    if error.errno == errno.ENAMETOOLONG:
        return f"{str(error.filename)[:60]}...: {error.strerror}; choose a shorter name or folder"
    if error.filename is None:
        if error.errno not in DISK_FULL:
            return None
        what = "standard output" if _output_fails() else "a file, or standard output"  # unbuffered, nothing is left
        return f"{what}: {error.strerror}; free space or choose another folder"
    return f"{error.filename2 or error.filename}: {error.strerror}; free space or choose another folder"


def _output_fails() -> bool:
    """Whether it was standard output that could not be written: what is left of it fails again. It is dropped then."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
        return True
    return False


def _drop_output() -> None:
    """Let what standard output still holds go nowhere, so that the end of the interpreter does not fail by it."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream without a descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
