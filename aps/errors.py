"""Exceptions that the command line turns into a sentence: the user's mistake, and a run that was asked to stop."""


class UserError(Exception):
    """A mistake or a missing file outside the code, which the user can fix.

    Its message is one sentence that says what is wrong, where (file, key, value) and what to do.
    The command line prints it without a traceback and exits with status 2.
    """

    def __init__(self, sentence: str = "") -> None:
        if sentence.startswith("Caught "):  # by torch, which puts the traceback of a worker process before the sentence
            sentence = sentence.rpartition(f"\n{type(self).__module__}.{type(self).__qualname__}: ")[2].rstrip()
        super().__init__(sentence)


class BrokenContract(UserError):
    """A method or strategy of the user's own does not do what its contract asks (docs/extending.md)."""


class Preempted(Exception):
    """The run was asked to stop and has saved its state; the same command goes on from there.

    The command line prints the message and exits with status 75 (EX_TEMPFAIL).
    """
