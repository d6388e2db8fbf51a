"""The operator in a pod finds the API server by the address it was given, not by a name that needs cluster DNS."""

from __future__ import annotations

import kopf
from trireme_operator.observe.handlers import in_cluster

FOUND = kopf.ConnectionInfo(server="https://kubernetes.default.svc", token="t")


def test_the_address_of_the_environment_wins() -> None:
    login = in_cluster(FOUND, {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "6443"})
    assert login.server == "https://10.0.0.1:6443"
    assert login.token == "t"
    assert in_cluster(FOUND, {"KUBERNETES_SERVICE_HOST": "fd00::1"}).server == "https://[fd00::1]:443"


def test_without_one_the_login_stays_as_it_is() -> None:
    assert in_cluster(FOUND, {}) is FOUND
    assert in_cluster(None, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None
