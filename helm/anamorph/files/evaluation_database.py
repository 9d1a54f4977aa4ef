"""The evaluation profile's database: its roles with their passwords, and the schema.

    python database.py HOST PORT DATABASE CA_FILE FOLDER

FOLDER has a file with the password of each of ``superuser``, ``service``, ``migrator``. Running it again
changes nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psycopg
from psycopg import sql

WAIT_S = 300
LOGINS = {"superuser": "postgres", "service": "anamorph_service", "migrator": "anamorph_migrator"}


def main(host: str, port: str, database: str, ca_file: str, folder: Path) -> None:
    passwords = {LOGINS[name]: (folder / name).read_text().strip() for name in LOGINS}

    def url(user: str, name: str = database) -> str:
        return f"postgresql://{user}@{host}:{port}/{name}?sslmode=verify-full&sslrootcert={ca_file}"

    with tempfile.TemporaryDirectory() as private:
        passfile = Path(private) / "pgpass"
        passfile.touch(0o600)
        passfile.write_text("".join(f"*:*:*:{user}:{escaped(word)}\n" for user, word in passwords.items()))
        os.environ["PGPASSFILE"] = str(passfile)
        make_database(url("postgres", "postgres"), database)
        program = ["anamorph-keysvc", "database"]
        subprocess.run([*program, "setup", "--url", url("postgres")], check=True)
        set_passwords(url("postgres"), passwords)
        subprocess.run([*program, "upgrade", "--url", url("anamorph_migrator")], check=True)


def escaped(word: str) -> str:
    """A password as libpq's password file has it."""
    return word.replace("\\", "\\\\").replace(":", "\\:")


def make_database(url: str, name: str) -> None:
    """Wait for the server, then make the database if there is none."""
    with connection(url) as server:
        found = server.execute("SELECT FROM pg_database WHERE datname = %s", [name]).fetchone()
        if found is None:
            server.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))


def connection(url: str) -> psycopg.Connection[tuple[object, ...]]:
    end = time.monotonic() + WAIT_S
    while True:
        try:
            return psycopg.connect(url, autocommit=True, connect_timeout=5)
        except psycopg.OperationalError as error:
            if time.monotonic() > end:
                sys.exit(f"PostgreSQL does not answer: {error}")
            time.sleep(2)


def set_passwords(url: str, passwords: dict[str, str]) -> None:
    with connection(url) as server:
        for user, word in passwords.items():
            # Hashed here, so that no log of the server can have it in clear.
            hashed = server.pgconn.encrypt_password(word.encode(), user.encode(), b"scram-sha-256")
            server.execute(
                sql.SQL("ALTER ROLE {} PASSWORD {}").format(
                    sql.Identifier(user), sql.Literal(hashed.decode())
                )
            )


if __name__ == "__main__":
    main(*sys.argv[1:5], Path(sys.argv[5]))
