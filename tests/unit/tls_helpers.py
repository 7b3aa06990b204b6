"""Certificates for the tests of TLS: a CA of trustme, identities on disk, settings that name them."""

from __future__ import annotations

import datetime
import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pyvolume.security_config import TlsSettings

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Identity:
    """A certificate with its chain, and its key, as files."""

    cert: Path
    key: Path

    def use_in(self, context: ssl.SSLContext) -> None:
        context.load_cert_chain(self.cert, self.key)


@dataclass
class Authority:
    """A CA whose files live in a directory."""

    directory: Path
    ca: trustme.CA = field(default_factory=trustme.CA)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.ca.cert_pem.write_to_path(self.path)

    @property
    def path(self) -> Path:
        return self.directory / "ca.pem"

    def issue(self, name: str, *identities: str, common_name: str | None = None) -> Identity:
        """A certificate for host names and addresses, by default 127.0.0.1 and localhost."""
        made = self.ca.issue_cert(*(identities or (HOST, "localhost")), common_name=common_name or name)
        identity = Identity(self.directory / f"{name}.pem", self.directory / f"{name}.key")
        write(identity.cert, b"".join(blob.bytes() for blob in made.cert_chain_pems))
        write(identity.key, made.private_key_pem.bytes())
        return identity

    def client(self, identity: Identity | None = None) -> ssl.SSLContext:
        """A client that trusts this CA."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.path)
        if identity is not None:
            identity.use_in(context)
        return context


def write(path: Path, data: bytes) -> None:
    """Replaces a file at once, as those do who renew certificates."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(data)
    os.replace(fresh, path)


def plain_identity(directory: Path, common_name: str, names: Sequence[x509.GeneralName] = ()) -> tuple[Identity, Path]:
    """A certificate with just this common name and these alternative names, and the file of its CA."""
    start, end = datetime.datetime(2025, 1, 1), datetime.datetime(2125, 1, 1)
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def builder(subject: x509.Name, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public_key)
        return made.serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(end)

    root = builder(issuer, authority_key.public_key())
    root = root.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    kind = (NameOID.COMMON_NAME, common_name) if common_name else (NameOID.ORGANIZATION_NAME, "nobody")
    leaf = builder(x509.Name([x509.NameAttribute(*kind)]), key.public_key())
    if names:
        leaf = leaf.add_extension(x509.SubjectAlternativeName(list(names)), critical=False)
    pem = serialization.Encoding.PEM
    ca = directory / "plain-ca.pem"
    ca.write_bytes(root.sign(authority_key, hashes.SHA256()).public_bytes(pem))
    identity = Identity(directory / "plain.pem", directory / "plain.key")
    identity.cert.write_bytes(leaf.sign(authority_key, hashes.SHA256()).public_bytes(pem))
    identity.key.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return identity, ca


def https_settings(identity: Identity, ca: Path | None = None, **more: str) -> TlsSettings:
    return TlsSettings(
        https_cert=str(identity.cert), https_key=str(identity.key), https_ca=str(ca) if ca else "", **more
    )


def grpc_settings(identity: Identity, ca: Path, **more: str) -> TlsSettings:
    return TlsSettings(grpc_cert=str(identity.cert), grpc_key=str(identity.key), grpc_ca=str(ca), **more)
