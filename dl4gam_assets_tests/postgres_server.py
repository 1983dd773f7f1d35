"""A PostgreSQL cluster of its own in a temporary folder, started for tests and removed again."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@contextlib.contextmanager
def postgres_server() -> Iterator[dict[str, Any]]:
    """Connection parameters (host, port, user, dbname); skips, with the reason, where there is no server."""
    programs, owner, port = _binaries(), _owner(), _free_port()
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # pytest's own folders are closed to other users
    if owner:
        shutil.chown(folder, owner)

    def run(*words: str) -> None:
        done = subprocess.run(
            words, user=owner, cwd=folder, capture_output=True, text=True, check=False, timeout=60,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode:
            log = folder / "log"
            told = log.read_text() if log.exists() else done.stderr
            pytest.skip(f"no database server can be started ({words[0]}): {told.strip()[-500:]}")

    data = str(folder / "data")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off -c full_page_writes=off"
    try:
        run(str(programs / "initdb"), "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync")
        run(str(programs / "pg_ctl"), "-D", data, "-l", str(folder / "log"), "-o", options, "-w", "-t", "30", "start")
        try:
            yield {"host": "127.0.0.1", "port": port, "user": "postgres", "dbname": "postgres"}
        finally:
            with contextlib.suppress(pytest.skip.Exception):
                run(str(programs / "pg_ctl"), "-D", data, "-m", "fast", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _binaries() -> Path:
    """Folder of the server's programs, which Debian keeps out of PATH."""
    found = shutil.which("pg_ctl")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: -int(p.parent.name))
    for folder in folders:
        if all((folder / name).exists() for name in ("initdb", "pg_ctl", "postgres")):
            return folder
    pytest.skip("PostgreSQL's server is absent (initdb, pg_ctl): apt-get install postgresql")


def _owner() -> str | None:
    """Who runs the server: PostgreSQL refuses to be root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    pytest.skip("PostgreSQL refuses to run as root, and there is no user postgres or nobody")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])
