"""The address of MLflow, and the part of it that may be shown.

An address may hold a user and a password, or a token. They are put into this process's environment, where mlflow and
the jobs that this process starts find them. What is stored, printed or put on a command line is `shown(address)`.

It imports no mlflow, because planning uses it.
"""

from __future__ import annotations

import os
import re
import sys
from functools import cache
from pathlib import Path
from urllib.parse import quote, unquote

from aps.errors import UserError
from aps.files import expanded

SETTING = "tracking_uri (or MLFLOW_TRACKING_URI)"
OFF = "none"  # tracking_uri that turns MLflow off
HTTP = ("http", "https")
BY_NAME = {"orderByKey": "tags.`mlflow.runName`", "orderByAsc": "true"}
DATABASES = ("postgresql", "mysql", "mssql", "oracle")
# The environment variable with a database's address and password, for this process and its children.
FULL = "APS_TRACKING_URI"

_SECRET = re.compile(r"TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
_USER_INFORMATION = re.compile(r"(?<=://)[^\s'\"<>]*@")
_SHORTEST_SECRET = 4  # letters; a shorter one would also be replaced within ordinary words


def tracking_address(wanted: str | None, results: str | Path) -> str:
    """MLFLOW_TRACKING_URI, else the address `wanted` by the study, else SQLite in its results folder; as `settled`."""
    return settled(given_address(wanted) or f"sqlite:///{Path(results).resolve() / 'mlflow.db'}")


def given_address(wanted: str | None) -> str | None:
    """The address as the user gave it, perhaps with a password; None if none was given."""
    return os.environ.get("MLFLOW_TRACKING_URI") or wanted


def settled(address: str) -> str:
    """The address as it may be shown: absolute, without user information, which is put into the environment.

    Raises:
        UserError: it is a server's without http://, or begins with the home folder of nobody.
    """
    address = address.strip()
    if address.lower() == OFF:
        return OFF
    if (sentence := without_scheme(address)) is not None:
        raise UserError(sentence)
    scheme, rest = _split(address)
    if scheme is None and not re.search(r"^~|/", address) and not Path(address).is_dir():
        _warn_of_folder(address)
    if scheme is None or scheme == "file":
        path = unquote(rest.removeprefix("//localhost").removeprefix("//")) if scheme else rest
        return expanded(path, SETTING).resolve().as_uri()
    if scheme == "sqlite":
        return _absolute_database(address)
    if scheme in HTTP:
        _keep_credentials(rest)
    elif _is_database(scheme) and shown(address) != address:
        os.environ[FULL] = address
    return shown(address)


def without_scheme(address: str) -> str | None:
    """The sentence for HOST:PORT, from which MLflow would make a folder; None for other addresses."""
    if not re.match(r"[\w.-]+:\d+(/|$)", address):
        return None
    return f"tracking_uri {address}: has no scheme, so MLflow would take it for a folder; write http://{address}"


@cache
def _warn_of_folder(address: str) -> None:
    """Once, before the folder is made: a word may be a server's name, or a slip."""
    print(
        f"warning: {SETTING}: {address} is taken for a folder, {Path(address).absolute()}, which is not there yet; a server is "
        "http://HOST:PORT",
        file=sys.stderr,
    )


def shown(address: str) -> str:
    """The address without user information, and without query and fragment, which may hold tokens."""
    scheme, rest = _split(address)
    if scheme in (None, "file", "sqlite"):
        return address
    rest = rest.removeprefix("//").rpartition("@")[2]
    return f"{scheme}://{re.split('[?#]', rest)[0].rstrip('/')}"


def full(address: str) -> str:
    """The address that mlflow needs for a settled one: a database's address with its password."""
    kept = os.environ.get(FULL) or os.environ.get("MLFLOW_TRACKING_URI") or ""
    scheme, _ = _split(address)
    return kept if scheme and _is_database(scheme) and shown(kept) == address else address


def scrubbed(text: str) -> str:
    """`text` without user information of addresses and without the values of environment variables with secrets."""
    text = _USER_INFORMATION.sub("", text)
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "***")
    return text


def problem(address: str) -> str | None:
    """Why the address cannot be one of MLflow's; None if it can."""
    scheme, rest = _split(address)
    if scheme is None or scheme in (*HTTP, "file", "databricks", "databricks-uc", "uc") or _is_database(scheme):
        return None
    if scheme == "sqlite":
        return "a database in memory ends with the process; name a file" if ":memory:" in rest or rest == "//" else None
    advice = (
        f"write http://{address}" if re.fullmatch(r"\d+(/.*)?", rest) else "write http://HOST:PORT or sqlite:///FILE"
    )
    return f"MLflow has no scheme '{scheme}'; {advice}"


def database_file(address: str) -> Path | None:
    """The file of a SQLite store; None for other addresses."""
    scheme, rest = _split(address)
    return Path(rest.removeprefix("///").partition("?")[0]) if scheme == "sqlite" and rest.startswith("///") else None


def page(experiment_id: str, view: str | None = None, search: str | None = None) -> str:
    """The fragment of the address of an experiment's runs: in a view, or only those that a search finds.

    The results of a search are sorted by name, because MLflow hides runs under their parent when it sorts by time.
    """
    parameters = {"viewStateShareKey": view} if view else {"searchFilter": search, **BY_NAME} if search else {}
    query = "".join(f"&{key}={quote(value)}" for key, value in parameters.items())
    return f"#/experiments/{experiment_id}/runs?workflowType=machine_learning{query}"


def run_page(experiment_id: str, run_id: str) -> str:
    return f"#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def _split(address: str) -> tuple[str | None, str]:
    """The scheme in small letters, None if there is none, and what follows its colon."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):(.*)", address, re.DOTALL)
    return (match[1].lower(), match[2]) if match else (None, address)


def _is_database(scheme: str) -> bool:
    return scheme.partition("+")[0] in DATABASES


def _absolute_database(address: str) -> str:
    """sqlite:///x.db is relative to the working directory, which the jobs may not share."""
    file = database_file(address)
    if file is None or ":memory:" in address:
        return address
    query = address.partition("?")[2]
    return f"sqlite:///{expanded(file, SETTING).resolve()}" + (f"?{query}" if query else "")


def _keep_credentials(rest: str) -> None:
    """Put user and password, or a token in place of the user, into the environment variables that mlflow reads."""
    information, at, _ = rest.removeprefix("//").rpartition("@")
    if not at:
        return
    user, colon, password = information.partition(":")
    if colon:
        os.environ |= {"MLFLOW_TRACKING_USERNAME": unquote(user), "MLFLOW_TRACKING_PASSWORD": unquote(password)}
    elif os.environ.get("MLFLOW_TRACKING_PASSWORD"):
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(user)
    else:
        os.environ["MLFLOW_TRACKING_TOKEN"] = unquote(user)
