"""Turns an exception of mlflow's into one clause that says why a request failed, without secrets or HTML.

mlflow raises the same exception for most causes, so this reads the texts of exceptions. It imports no mlflow.
"""

from __future__ import annotations

import re

from aps.tracking.addresses import scrubbed

LONGEST_TEXT = 160  # letters of an unknown exception's text


class NotMlflow(Exception):
    """Something answers, but it is not MLflow."""


class Unusable(Exception):
    """The address can't be MLflow's; the message says why."""


# (pattern in the exception's text, clause, whether the cause will last, so that trying again soon is useless)
_KNOWN: tuple[tuple[str, str, bool], ...] = (
    (r"NameResolution|Name or service not known|getaddrinfo|nodename nor servname", "its host name is unknown (DNS)", True),
    (r"Connection refused|actively refused", "nothing listens there (connection refused)", True),
    (r"timed out|timeout exception|Read timeout", "it does not answer (timed out)", True),
    (r"No route to host|Network is unreachable", "it cannot be reached over the network", True),
    (r"CERTIFICATE_VERIFY_FAILED|SSLError|WRONG_VERSION_NUMBER", "no TLS connection (https?) can be made", True),
    (r"error code 401|401 Client Error|\b401\b.{0,20}Unauthorized", "401: it asks who you are; set MLFLOW_TRACKING_USERNAME and "
     "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN", True),
    (r"error code 403|403 Client Error|\b403\b.{0,20}Forbidden|PERMISSION_DENIED", "403: it does not let you in; its rights, or "
     "the server's --allowed-hosts, are too narrow", True),
    (r"error code 404|ENDPOINT_NOT_FOUND|404 Client Error", "404: there is no MLflow at this address", True),
    (r"error code (5\d\d)|too many (5\d\d)", "the server has an error ({}); its log says more", False),
    (r"database is locked", "the database is locked by another program", False),
    (r"readonly database|read-only database", "the database is read-only", True),
    (r"file is not a database|file is encrypted", "the file is not a database", True),
    (r"unable to open database file", "the database file cannot be opened", True),
    (r"database or disk is full|No space left", "the disk is full", False),
    (r"database disk image is malformed", "the database is damaged", True),
    (r"out-of-date database schema|Can't locate revision", "its database is of another version of MLflow; "
     "run `mlflow db upgrade` on it", True),
    (r"password authentication failed|no password supplied|Access denied for user", "the database refuses the user or the "
     "password", True),
    (r"No module named '(psycopg2|pymysql|MySQLdb|pyodbc)'", "the database's driver {} is not installed here", True),
    (r"must be in the 'active' state|must be in the 'active' lifecycle|non-active experiment", "it was deleted in MLflow", False),
    (r"does not exist|No Experiment with id|not found", "it is gone from MLflow", False),
)  # fmt: skip


def why(error: BaseException) -> str:
    """The reason, as a clause that starts with a small letter and has no full stop."""
    return _explain(error)[0]


def will_last(error: BaseException) -> bool:
    """Whether the cause will last, so that trying again within seconds is useless."""
    return _explain(error)[1]


def _explain(error: BaseException) -> tuple[str, bool]:
    text = _text(error)
    if isinstance(error, Unusable):
        return scrubbed(text), True
    if isinstance(error, NotMlflow):
        return "it answers, but not as MLflow does", False
    for pattern, clause, lasts in _KNOWN:
        if match := re.search(pattern, text, re.IGNORECASE):
            detail = next((group for group in match.groups() if group), "")
            return clause.format(detail), lasts
    if re.search(r"<html|<!doctype|JSONDecodeError|Expecting value|valid JSON|Failed to parse", text, re.IGNORECASE):
        return "it answers, but not as MLflow does", False
    first = scrubbed(text.strip().splitlines()[0] if text.strip() else type(error).__name__)
    return (first if len(first) <= LONGEST_TEXT else f"{first[:LONGEST_TEXT]}...").rstrip(". "), False


def _text(error: BaseException) -> str:
    """The texts of the exception and of its causes."""
    texts, seen = [], set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        texts.append(str(current) or type(current).__name__)
        current = current.__cause__ or current.__context__
    return "\n".join(texts)
