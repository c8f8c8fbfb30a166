"""What machine this is, for whoever keeps a list of a thousand: read once, null where the machine does not say."""

from __future__ import annotations

import hashlib
import hmac
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from .config import Config
from .sysfs import text

APPLICATION = b"whisperlet"  # the machine's id itself is confidential, machine-id(5)
MODELS = (  # of the board or the box; the first that is there
    "proc/device-tree/model",
    "sys/class/dmi/id/product_name",
)
VENDOR = "sys/class/dmi/id/sys_vendor"
NO_NAMES = {"", "none", "default string", "system product name", "to be filled by o.e.m."}


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """The machine."""

    id: (
        Annotated[str, Meta(pattern="^[0-9a-f]{32}$", description="stays with the installation, not the network")]
        | None
    )
    model: Annotated[str, Meta(description="of the board, as its maker calls it")] | None
    architecture: str  # such as "aarch64"
    n_cpus: Annotated[int, Meta(gt=0)]
    memory_bytes: Annotated[int, Meta(gt=0)] | None


class System(msgspec.Struct, frozen=True, kw_only=True):
    """What it runs under."""

    os: Annotated[str, Meta(description="name and version of the distribution")]
    kernel: str


class Versions(msgspec.Struct, frozen=True, kw_only=True):
    """What runs."""

    agent: str
    runtime: str | None  # name and version of the library that runs the model
    python: str


def hardware(root: Path = Path("/")) -> Hardware:
    """The machine that this is, or the one whose /etc, /proc and /sys lie below `root`."""
    return Hardware(
        id=machine_id(root),
        model=model(root),
        architecture=platform.machine(),
        n_cpus=os.cpu_count() or 1,
        memory_bytes=memory_bytes(root),
    )


def system() -> System:
    """What this process runs under."""
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        name = platform.system()
    return System(os=name, kernel=platform.release())


def versions(runtime: str) -> Versions:
    """Installed versions; `runtime` is the distribution that runs the model."""
    return Versions(
        agent=_installed("whisperlet") or "unknown",
        runtime=f"{runtime} {found}" if (found := _installed(runtime)) else None,
        python=platform.python_version(),
    )


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_id(root: Path = Path("/")) -> str | None:
    """An id that survives another network card and another host name, and does not give /etc/machine-id away."""
    secret = text(root / "etc/machine-id")
    return hmac.new(secret.encode(), APPLICATION, hashlib.sha256).hexdigest()[:32] if len(secret) == 32 else None


def model(root: Path = Path("/")) -> str | None:
    """Name of the board; on a PC with its maker's."""
    board, box = (text(root / path) for path in MODELS)
    if board:
        return board
    vendor = text(root / VENDOR)
    return " ".join(name for name in (vendor, box) if name.lower() not in NO_NAMES) or None


def memory_bytes(root: Path = Path("/")) -> int | None:
    """Memory that the system manages."""
    for line in text(root / "proc/meminfo").splitlines():
        name, _, size = line.partition(":")
        if name == "MemTotal":
            return int(size.split()[0]) * 1024
    return None


def config_sha256(config: Config) -> str:
    """Equal for equal configurations, whatever their files look like. There is no secret in a configuration."""
    return hashlib.sha256(msgspec.json.encode(config, order="sorted")).hexdigest()
