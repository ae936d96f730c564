"A process that writes into a cache, beside others: `fill` imports little, so that it starts at once."

import os

from valuecot.providers.cache import Cache
from valuecot.providers.requests import Reply, Request


def fill(path: str, requests: list[Request]) -> None:
    with Cache(path) as cache:
        for request in requests:
            cache.keep(request, Reply(f"from {os.getpid()}", "m", 1, 1, "stop"), "live", cache.send(request, 1000, None).result()[1], 7).result()
