"""New SQLite stores of MLflow by copying tables that it made earlier: its 50 migrations take seconds."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from pq_sweep.core.environment import cache_home


def empty_tables() -> Path:
    """Return where an SQLite store without an entry is kept: to make its tables takes MLflow seconds."""
    import mlflow

    return cache_home() / "mlflow" / f"{mlflow.__version__}.db"


def copy_tables(source: Path, target: Path, *, empty: bool = False) -> bool:
    """Copy an SQLite store that is whole, `empty` without MLflow's experiments; say whether that worked."""
    aside = target.with_name(f".{target.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        if empty:
            target.parent.mkdir(parents=True, exist_ok=True)
        with (
            closing(sqlite3.connect(f"{source.as_uri()}?mode=ro", uri=True)) as stored,
            closing(sqlite3.connect(aside)) as copied,
        ):
            stored.backup(copied)
            if empty:
                copied.execute("DELETE FROM experiments")  # they say where their artifacts lie
                copied.commit()
            whole = copied.execute("PRAGMA quick_check").fetchone() == ("ok",)
            version = copied.execute("SELECT version_num FROM alembic_version").fetchone()
        if whole and version:
            aside.replace(target)
        return bool(whole and version)
    except (OSError, sqlite3.Error):
        return False
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
