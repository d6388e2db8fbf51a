"""Keys, certificates, tokens and kubeconfigs of one cluster. Made by openssl, readable by the owner only."""

from __future__ import annotations

import base64
import json
import os
import secrets
from pathlib import Path
from typing import Dict, List, Sequence

from .shell import run

ADMIN = "admin"
DAYS = "3650"


def make_authority(folder: Path) -> None:
    """A certificate authority (ca.crt, ca.key) and the key that signs service-account tokens (sa.key, sa.pub).

    Keeps those that are there: nodes that join later must be signed by the same authority.
    """
    if (folder / "sa.pub").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    # Elliptic keys take milliseconds to make where RSA takes up to seconds.
    run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(folder / "ca.key")])
    run(
        [
            "openssl",
            "req",
            "-x509",
            "-new",
            "-key",
            str(folder / "ca.key"),
            "-days",
            DAYS,
            "-subj",
            "/CN=trireme-local-ca",
            "-out",
            str(folder / "ca.crt"),
        ]
    )
    run(["openssl", "genrsa", "-out", str(folder / "sa.key"), "2048"])
    run(["openssl", "rsa", "-in", str(folder / "sa.key"), "-pubout", "-out", str(folder / "sa.pub")])


def make_certificate(
    folder: Path, name: str, subject: str, *, addresses: Sequence[str] = (), names: Sequence[str] = ()
) -> None:
    """`name`.crt and `name`.key signed by the authority, for a server (with addresses or names) or a client."""
    alternatives = [f"IP:{address}" for address in addresses] + [f"DNS:{host}" for host in names]
    lines = [
        "basicConstraints=CA:FALSE",
        "keyUsage=digitalSignature,keyEncipherment",
        "extendedKeyUsage=" + ("serverAuth" if alternatives else "clientAuth"),
    ]
    if alternatives:
        lines.append("subjectAltName=" + ",".join(alternatives))
    extensions = folder / f"{name}.ext"
    extensions.write_text("\n".join(lines) + "\n")
    key, request = folder / f"{name}.key", folder / f"{name}.csr"
    run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(key)])
    run(["openssl", "req", "-new", "-key", str(key), "-subj", subject, "-out", str(request)])
    run(
        [
            "openssl",
            "x509",
            "-req",
            "-in",
            str(request),
            "-CA",
            str(folder / "ca.crt"),
            "-CAkey",
            str(folder / "ca.key"),
            "-CAcreateserial",
            "-days",
            DAYS,
            "-extfile",
            str(extensions),
            "-out",
            str(folder / f"{name}.crt"),
        ]
    )
    request.unlink()
    extensions.unlink()


def node_user(node_name: str) -> str:
    return f"system:node:{node_name}"


def make_tokens(folder: Path, node_names: Sequence[str]) -> Dict[str, str]:
    """Write tokens.csv for the API server; returns token by user name. Keeps the tokens that are already there."""
    groups: Dict[str, List[str]] = {
        ADMIN: ["system:masters"],
        "system:kube-controller-manager": [],
        "system:kube-scheduler": [],
        "system:kube-proxy": [],
    }
    groups.update({node_user(name): ["system:nodes"] for name in node_names})
    kept = read_tokens(folder)
    tokens = {user: kept.get(user) or secrets.token_hex(24) for user in groups}
    rows = [
        f"{tokens[user]},{user},{user}" + (f',"{",".join(members)}"' if members else "")
        for user, members in groups.items()
    ]
    write_private(folder / "tokens.csv", "\n".join(rows) + "\n")
    return tokens


def read_tokens(folder: Path) -> Dict[str, str]:
    """Token by user name, empty when there is no file yet."""
    try:
        rows = (folder / "tokens.csv").read_text().splitlines()
    except OSError:
        return {}
    return {row.split(",")[1]: row.split(",")[0] for row in rows if row}


def write_kubeconfig(path: Path, *, server: str, authority: Path, token: str, cluster: str, user: str) -> None:
    """A self-contained kubeconfig. JSON is YAML, and needs no YAML writer."""
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": cluster,
        "clusters": [
            {
                "name": cluster,
                "cluster": {
                    "server": server,
                    "certificate-authority-data": base64.b64encode(authority.read_bytes()).decode(),
                },
            }
        ],
        "users": [{"name": user, "user": {"token": token}}],
        "contexts": [{"name": cluster, "context": {"cluster": cluster, "user": user}}],
    }
    write_private(path, json.dumps(content, indent=2) + "\n")


def write_private(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".new")
    with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as sink:
        sink.write(text)
    os.replace(scratch, path)
