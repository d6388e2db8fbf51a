"""`python -m trireme_operator`: the control plane as one process."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from trireme_operator import logs, tracing
from trireme_operator.act.api import Api, ApiError
from trireme_operator.aside import Aside
from trireme_operator.leader import LeadershipLost
from trireme_operator.operator import REVIEW_QPS, Operator
from trireme_operator.options import BadOptions, Options, parse
from trireme_operator.tracing import Tracing


async def run(options: Options, spans: Tracing) -> None:
    api = await Api.connect(options.kubeconfig, qps=options.qps, burst=int(options.qps * 2))
    reviews = await Api.connect(options.kubeconfig, qps=REVIEW_QPS, burst=int(REVIEW_QPS))
    try:
        with Aside("lease") as aside:
            lease = await aside.run(Api.connect(options.kubeconfig))
            try:
                await Operator(options, api, reviews, lease, aside, spans).run()
            finally:
                await aside.run(lease.close())
    finally:
        await api.close()
        await reviews.close()


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        spans = tracing.build(options.tracing, options.identity)
    except BadOptions as error:
        print(f"trireme-operator: {error}", file=sys.stderr)
        return 64
    logs.configure(options.log_format, options.log_level)
    prefer_the_loop()
    try:
        asyncio.run(run(options, spans))
    except LeadershipLost as error:
        print(f"trireme-operator: {error}; starting anew", file=sys.stderr, flush=True)
        start_anew()
    except ApiError as error:
        print(f"trireme-operator: {error}", file=sys.stderr)
        return 1
    return 0


def prefer_the_loop() -> None:
    """Keeps the interpreter's own pauses short.

    Nearly all that ends here ends by its count of references, so the collector, which stops everything for up to a
    second with many jobs, need not look at what was imported, nor at the rest every few seconds. And of two threads
    with work, the one that answers agents must not wait five milliseconds at each of its system calls."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 50)
    sys.setswitchinterval(0.001)


def start_anew() -> NoReturn:
    """The same command in the same process: nothing is left of what was believed, and the kubelet, which would let a
    container that ended wait longer each time, has nothing to restart."""
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
