"""Who is calling: the API server is asked (TokenReview), and the answer is kept for a little while."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from trireme_api.protocol import TOKEN_AUDIENCE

from trireme_operator.act.api import Api

PATH = "/apis/authentication.k8s.io/v1/tokenreviews"
POD_NAME = "authentication.kubernetes.io/pod-name"
POD_UID = "authentication.kubernetes.io/pod-uid"
TRUST_SECONDS = 60.0
DISTRUST_SECONDS = 10.0
REMEMBERED = 20_000
MAX_TOKEN = 16_384


@dataclass(frozen=True)
class Identity:
    namespace: str
    pod: str
    pod_uid: str


class Reviewer:
    def __init__(self, api: Api, clock: Callable[[], float] = time.monotonic) -> None:
        self._api, self._clock = api, clock
        self._known: OrderedDict[str, tuple[Identity | None, float]] = OrderedDict()
        self._asked: dict[str, asyncio.Task[Identity | None]] = {}

    @property
    def under_way(self) -> int:
        return len(self._asked)

    def knows(self, token: str) -> bool:
        """Whether `identify` asks nobody."""
        return _useless(token) or self._clock() < self._known.get(_digest(token), (None, 0.0))[1]

    async def identify(self, token: str) -> Identity | None:
        """The pod that a token of our audience is bound to; None for any other token. Raises ApiError."""
        if _useless(token):
            return None
        digest = _digest(token)
        found, until = self._known.get(digest, (None, 0.0))
        if self._clock() < until:
            return found
        asked = self._asked.get(digest)
        if asked is None:  # both connections of an agent come at once, with one token
            asked = self._asked[digest] = asyncio.ensure_future(self._review(digest, token))
            asked.add_done_callback(lambda _: self._asked.pop(digest))
        return await asyncio.shield(asked)

    async def _review(self, digest: str, token: str) -> Identity | None:
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [TOKEN_AUDIENCE]},
        }
        review = await self._api.create(PATH, body)
        identity = identity_of(review.get("status") or {})
        self._known[digest] = identity, self._clock() + (TRUST_SECONDS if identity else DISTRUST_SECONDS)
        self._known.move_to_end(digest)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return identity


def _useless(token: str) -> bool:
    return not token or len(token) > MAX_TOKEN


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def identity_of(status: dict[str, object]) -> Identity | None:
    """The pod named by a TokenReview's status; None unless authenticated, for our audience, and bound to a pod."""
    audiences = status.get("audiences")
    if status.get("authenticated") is not True or not isinstance(audiences, list) or TOKEN_AUDIENCE not in audiences:
        return None  # a server that does not know audiences answers without any: its word is not enough
    user = status.get("user")
    if not isinstance(user, dict):
        return None
    parts = str(user.get("username", "")).split(":")
    extra = user.get("extra") or {}
    names, uids = extra.get(POD_NAME) or [], extra.get(POD_UID) or []
    if parts[:2] != ["system", "serviceaccount"] or len(parts) != 4 or len(names) != 1 or len(uids) != 1:
        return None
    return Identity(parts[2], str(names[0]), str(uids[0]))
