"""The coordinator's certificate authority: made once, kept in a Secret, shared by all replicas.

Pods get the CA's certificate in their environment, so a CA must outlive the jobs that know it: a new one is made a year
before the old one ends and published beside it, and the old one goes on signing until shortly before its end. The
serving certificate is made by each replica for itself and lives for a month.
"""

from __future__ import annotations

import base64
import datetime
import ipaddress
import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from trireme_operator.act.api import Api, ApiError, Json

CA_DAYS = 3650
CA_OVERLAP_DAYS = 365
CA_LAST_DAYS = 30
SERVING_DAYS = 30
_SKEW = datetime.timedelta(hours=1)
"""Certificates begin this much in the past: clocks of nodes differ."""


@dataclass(frozen=True)
class Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    def days_left(self, now: datetime.datetime) -> float:
        return (self.certificate.not_valid_after_utc - now) / datetime.timedelta(days=1)


def make_authority(now: datetime.datetime) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"trireme coordinator CA {now:%Y-%m-%d}")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + datetime.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key)


def make_serving(authority: Authority, hosts: Sequence[str], now: datetime.datetime) -> tuple[str, str]:
    """(certificate PEM, key PEM) for these host names and addresses."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "trireme coordinator")]))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(min(now + datetime.timedelta(days=SERVING_DAYS), authority.certificate.not_valid_after_utc))
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM).decode(), _key_pem(key)


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def signing(authorities: Sequence[Authority], now: datetime.datetime) -> Authority:
    """The oldest that still has time: pods made before the newer one was published know only this."""
    usable = [a for a in authorities if a.days_left(now) > CA_LAST_DAYS]
    return min(usable, key=lambda a: a.certificate.not_valid_after_utc)


def bundle(authorities: Sequence[Authority]) -> str:
    """What pods are given to trust."""
    return "".join(authority.pem for authority in authorities)


async def authorities(api: Api, namespace: str, secret: str, now: datetime.datetime) -> list[Authority]:
    """The CAs in the Secret, made or renewed where needed. Replicas may try at once: one wins, all read the same.

    Raises ApiError.
    """
    path = f"/api/v1/namespaces/{namespace}/secrets"
    for _ in range(5):
        try:
            obj = await api.get(f"{path}/{secret}")
        except ApiError as error:
            if not error.not_found:
                raise
            obj = {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": secret, "namespace": namespace},
                "type": "Opaque",
                "data": _data([make_authority(now)]),
            }
            try:
                return read(await api.create(path, obj))
            except ApiError as raced:
                if not raced.exists:
                    raise
                continue
        found = [a for a in read(obj) if a.days_left(now) > CA_LAST_DAYS]
        if any(a.days_left(now) > CA_OVERLAP_DAYS for a in found):
            return found
        obj["data"] = _data([*found, make_authority(now)])
        try:
            return read(await api.update(f"{path}/{secret}", obj))
        except ApiError as raced:
            if not raced.conflict:
                raise
    raise ApiError(409, f"secret {namespace}/{secret} keeps changing under our hands")


def _data(found: Sequence[Authority]) -> dict[str, str]:
    data: dict[str, str] = {}
    for i, authority in enumerate(found):
        data[f"ca-{i}.crt"] = base64.b64encode(authority.pem.encode()).decode()
        data[f"ca-{i}.key"] = base64.b64encode(_key_pem(authority.key).encode()).decode()
    return data


def read(secret: Json) -> list[Authority]:
    """The CAs of a Secret, in the order of its keys; what cannot be read is left out (and then made anew)."""
    data, found = secret.get("data") or {}, []
    for name in sorted(data):
        if not name.endswith(".crt"):
            continue
        try:
            certificate = x509.load_pem_x509_certificate(base64.b64decode(data[name]))
            key = serialization.load_pem_private_key(base64.b64decode(data[name[:-4] + ".key"]), password=None)
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(key, ec.EllipticCurvePrivateKey):
            found.append(Authority(certificate, key))
    return found


def load_into(context: ssl.SSLContext, certificate: str, key: str) -> None:
    """Makes a serving certificate the context's; connections made from now on get it."""
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder) / "tls.crt", Path(folder) / "tls.key"
        for path, text in zip(paths, (certificate, key), strict=True):
            path.touch(mode=0o600)
            path.write_text(text)
        context.load_cert_chain(*paths)


def server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
