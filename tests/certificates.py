"""An authority and what it has signed, made with openssl for one test run."""

import shutil
import subprocess

import pytest

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


class Authority:
    """Certificates in `folder`: its own as `ca.pem`, then NAME.pem and NAME.key of whomever it signs for."""

    def __init__(self, folder):
        self.folder = folder
        self.file = folder / "ca.pem"
        self._openssl("req", "-x509", *self._new_key("ca"), "-days", "2", "-subj", "/CN=test", "-out", self.file)

    def sign(self, name):
        """Certificate and key for the common name, good for this machine too."""
        certificate, request = self.folder / f"{name}.pem", self.folder / f"{name}.csr"
        extensions = self.folder / "extensions"
        extensions.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        self._openssl("req", *self._new_key(name), "-subj", f"/CN={name}", "-out", request)
        authority = ["-CA", self.file, "-CAkey", self.folder / "ca.key", "-CAcreateserial"]
        more = ["-days", "2", "-extfile", extensions]
        self._openssl("x509", "-req", "-in", request, *authority, *more, "-out", certificate)
        return certificate, self.folder / f"{name}.key"

    def _new_key(self, name):
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        return [*curve, "-nodes", "-keyout", self.folder / f"{name}.key"]

    def _openssl(self, *arguments):
        subprocess.run(["openssl", *arguments], check=True, capture_output=True)
