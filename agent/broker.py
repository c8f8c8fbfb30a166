"""Where the broker is and who we are there: address, login, certificates. Read from files, checked, never shown."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from whisperlet.errors import ConfigError

from .config import NO_LOGIN, MqttConfig

ROOT = "whisperlet"  # of all topics


@dataclass(frozen=True)
class Broker:
    """Where to connect and as whom, checked."""

    host: str
    port: int
    device: str  # <device> in the topics
    tls: ssl.SSLContext | None = field(repr=False)  # None: in the clear
    username: str | None
    password: str | None = field(repr=False)

    @classmethod
    def of(cls, config: MqttConfig, environment: Mapping[str, str] = os.environ) -> Broker:
        """Broker of a configuration; raises ConfigError naming the key, and the file where there is one."""
        url = urlsplit(config.url)
        if url.username is not None or url.hostname is None:
            raise ConfigError(f"mqtt.url: {NO_LOGIN}")
        try:
            port = url.port or (8883 if url.scheme == "mqtts" else 1883)
        except ValueError:
            raise ConfigError(f"mqtt.url: the port in {config.url!r} is not a number up to 65535") from None
        username = config.username or _credential(environment, "mqtt-username")
        password = read_password(config, environment)
        if password is not None and username is None:
            raise ConfigError("mqtt.username: is not set, but there is a password")
        return cls(url.hostname, port, config.device or socket.gethostname(), tls_context(config), username, password)

    def __str__(self) -> str:
        """Host and port, for the log."""
        return f"{self.host}:{self.port}"

    @property
    def client_id(self) -> str:
        """Name of the session at the broker."""
        return f"{ROOT}-{self.device}"

    def topic(self, name: str) -> str:
        """Full name of a topic of this device."""
        return f"{ROOT}/{self.device}/{name}"


def read_password(config: MqttConfig, environment: Mapping[str, str]) -> str | None:
    """First line of `mqtt.password_file`, else of systemd's credential; raises ConfigError naming key and file."""
    if config.password_file is None:
        return _credential(environment, "mqtt-password")
    return _first_line(Path(config.password_file), "mqtt.password_file")


def _credential(environment: Mapping[str, str], name: str) -> str | None:
    """What systemd's LoadCredential= or SetCredentialEncrypted= has put there for this service, if anything."""
    path = Path(environment.get("CREDENTIALS_DIRECTORY") or os.devnull, name)
    return _first_line(path, f"the credential {name}") if path.exists() else None


def _first_line(path: Path, key: str) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{key}: {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{key}: {path}: is not UTF-8") from None
    return text.partition("\n")[0].rstrip("\r")


def tls_context(config: MqttConfig) -> ssl.SSLContext | None:
    """Whom we believe and what we show; None without TLS. Raises ConfigError naming key and file."""
    files = {"mqtt.ca_file": config.ca_file, "mqtt.cert_file": config.cert_file, "mqtt.key_file": config.key_file}
    if urlsplit(config.url).scheme != "mqtts":
        for key, file in files.items():
            if file is not None:
                raise ConfigError(f"{key}: {file}: is of no use unless mqtt.url begins with mqtts://")
        return None
    for key, file in files.items():
        _check_readable(key, file)
    context = _trusting(config.ca_file)
    if config.cert_file is not None:
        _show(context, config.cert_file, config.key_file)
    elif config.key_file is not None:
        raise ConfigError(f"mqtt.key_file: {config.key_file}: is of no use without mqtt.cert_file")
    return context


def _check_readable(key: str, file: str | None) -> None:
    if file is not None:
        try:
            Path(file).read_bytes()
        except OSError as error:
            raise ConfigError(f"{key}: {file}: cannot be read: {error.strerror}") from None


def _trusting(ca_file: str | None) -> ssl.SSLContext:
    """A context that believes whom this file names and nobody else, or whom the system believes."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError:
        raise ConfigError(f"mqtt.ca_file: {ca_file}: holds no certificate in PEM form") from None


def _show(context: ssl.SSLContext, cert_file: str, key_file: str | None) -> None:
    """Have a context show a certificate. OpenSSL would ask for a key's password on the terminal; there is none here."""
    try:
        context.load_cert_chain(cert_file, key_file, password=lambda: b"")
    except ssl.SSLError as error:
        key, file = ("mqtt.key_file", key_file) if key_file else ("mqtt.cert_file", cert_file)
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"{key}: {file}: is not the key of {cert_file}") from None
        if not _holds_certificate(cert_file):
            raise ConfigError(f"mqtt.cert_file: {cert_file}: holds no certificate in PEM form") from None
        raise ConfigError(f"{key}: {file}: holds no private key in PEM form without a password") from None


def _holds_certificate(file: str) -> bool:
    try:
        ssl.create_default_context().load_verify_locations(file)
    except ssl.SSLError:
        return False
    return True
