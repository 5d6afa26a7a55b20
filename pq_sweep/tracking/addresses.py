"""Addresses of MLflow's stores: one that it would not take is told, with the one that is meant, before a job runs."""

from __future__ import annotations

import os
import re
from importlib.metadata import entry_points
from pathlib import Path

from pq_sweep.core.sentences import without_password
from pq_sweep.types import UserError

VARIABLE = "MLFLOW_TRACKING_URI"
SERVERS, DATABASES = ("http", "https"), ("postgresql", "mysql", "mssql")
CLOUD = ("databricks", "databricks-uc", "uc")
FORMS = "http://host:5000, sqlite:///mlflow.db or postgresql://user@host/name"
SCHEME = re.compile(r"([A-Za-z][\w.+-]*):(.*)", re.DOTALL)
WITH_PORT = re.compile(r"[\w.-]+:\d+(/.*)?", re.ASCII)
HERE = re.compile(r"localhost|\d+(\.\d+){3}", re.ASCII)
MACHINE = re.compile(r"[\w-]+(\.[\w-]+)+", re.ASCII)
FILE_ENDINGS = (".db", ".sqlite", ".sqlite3")


def address_problem(uri: str | None, option: str) -> str | None:
    """Say in a sentence what is wrong with a store's address, or with that in MLFLOW_TRACKING_URI if none is given.

    `option` is what the address was given by.
    """
    name, given = (option, uri) if uri else (VARIABLE, os.environ.get(VARIABLE))
    meant = _meant(given) if given else ()
    if not given or meant == (given,):
        return None
    forms = " or ".join(f"{name}={form}" for form in meant) or f"one such as {FORMS}"
    return f"{name}={without_password(given)} is no address of an MLflow store; give {without_password(forms)}."


def require_address(uri: str | None, option: str) -> None:
    """Raise a UserError if a store's address, or that in MLFLOW_TRACKING_URI if none is given, is none."""
    if problem := address_problem(uri, option):
        raise UserError(problem)


def _meant(uri: str) -> tuple[str, ...]:
    """Return the addresses that may be meant: just the one that is given if it is right, none if there is no guess."""
    if uri in CLOUD:
        return (uri,)
    if WITH_PORT.fullmatch(uri):
        return (f"http://{uri}",)
    found = SCHEME.fullmatch(uri)
    return _with_scheme(uri, found[1].lower(), found[2]) if found else _without_scheme(uri)


def _with_scheme(uri: str, scheme: str, rest: str) -> tuple[str, ...]:
    """Return what an address with a scheme means."""
    kind = scheme.partition("+")[0]
    if kind in SERVERS:  # what follows # is a page of MLflow's interface
        return (f"{scheme}://{re.sub('/#.*', '', rest.lstrip('/')) or 'localhost:5000'}",)
    if kind == "sqlite":
        return (f"{scheme}:///{_path(rest) or 'mlflow.db'}",)
    if kind in ("postgres", *DATABASES):
        return (f"{re.sub('^postgres(?!ql)', 'postgresql', scheme)}://{rest.lstrip('/')}",)
    if kind == "file":
        return (_in_file(re.sub("^/+", "/", rest)),)
    return (uri,) if kind in (*CLOUD, *_plugins()) else ()


def _path(rest: str) -> str:
    """Return the path in what follows `sqlite:`, of which three slashes are none of it."""
    if rest.startswith("///"):
        return rest[3:]
    return rest.removeprefix("//")


def _without_scheme(uri: str) -> tuple[str, ...]:
    """Return what a word without a scheme may mean: a server, a file or folder, or either."""
    first, slash, _ = uri.partition("/")
    is_file = Path(uri).expanduser().exists() or uri.endswith(FILE_ENDINGS)
    if uri.startswith("//") and not is_file:
        return (f"http:{uri}",)
    if HERE.fullmatch(first) and not is_file:
        return (f"http://{uri}" if slash else f"http://{uri}:5000",)
    if MACHINE.fullmatch(first) and not is_file:
        return (f"http://{uri}",)
    if not (is_file or slash or uri.startswith("~")):
        return f"http://{uri}:5000", _in_file(uri)
    return (_in_file(uri),)


def _in_file(path: str) -> str:
    """Return the address of an SQLite file at a path, or in the folder at it.

    MLflow's own stores in folders cannot hold a metric beside others below its name, and new versions refuse them.
    """
    if Path(path).expanduser().is_dir():
        return f"sqlite:///{Path(path) / 'mlflow.db'}"
    return f"sqlite:///{Path(path)}{'' if path.endswith(FILE_ENDINGS) else '.db'}"


def _plugins() -> set[str]:
    """Name the further schemes that installed plugins of MLflow bring."""
    return {point.name for point in entry_points(group="mlflow.tracking_store")}
