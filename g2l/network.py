"""Asking servers over HTTP: what may pass is tried again, and no answer is believed unseen.

`Client.ask` hands each good answer to a function of the caller, which says what it should be.
"""

import contextlib
import netrc
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from g2l.errors import UserError

TRIES = 5
PATIENCE = 20.0  # seconds without a byte
RETRY_SECONDS = 1.0  # second pause before another try; each is twice the one before


def pause(attempt: int, least: float = 0) -> None:
    """Wait before another try: 0.5, 1, 2 ... 60 s, or what the server asks for up to 5 minutes."""
    time.sleep(max(min(2.0 ** (attempt - 1), 60), min(least, 300)) * RETRY_SECONDS)


@dataclass
class Client:
    """Connections of one process to servers, directly or by the proxy of the environment.

    A redirect is followed only to the same host or one of `hosts`. Names and passwords are those of
    ~/.netrc. Each of up to `connections` threads has a connection: none waits for another's.
    """

    hosts: Collection[str] = ()
    connections: int = 1
    pools: dict[str, Any] = field(default_factory=dict)

    def ask(
        self,
        url: str,
        headers: dict[str, str],
        take: Callable[[Any], Any],
        body: bytes | None = None,
        tries: int = TRIES,
    ) -> Any:
        """What `take` makes of the answer to a GET, or a POST of `body`, if its status is 200 or
        206.

        Where the server is busy, the connection breaks or `take` raises ValueError it is asked
        again, later each time. UserError with the reason when it does not answer.
        """
        from urllib3.exceptions import HTTPError

        for attempt in range(tries):
            wait = ""
            try:
                with contextlib.closing(self._send(url, headers, body)) as answer:
                    status = answer.status
                    if status in (200, 206):
                        return take(answer)
                    wait = answer.headers.get("Retry-After", "")
                reason = f"the server answers {status}"
                if status in (401, 403):
                    reason += ": no credential, or one that has expired"
                if status < 500 and status not in (408, 429):
                    break
            except (HTTPError, ValueError) as error:
                reason = f"no answer ({error})"
            if attempt < tries - 1:
                pause(attempt, int(wait[:9]) if wait.isdecimal() else 0)
        raise UserError(f"{url.partition('?')[0]}: {reason}")

    def _send(self, url: str, headers: dict[str, str], body: bytes | None) -> Any:
        """The answer to a request, unread, after redirects."""
        for _ in range(5):
            host = urlsplit(url)
            if host.netloc not in self.pools:
                self.pools[host.netloc] = self._pool(host)
            pool = self.pools[host.netloc]
            answer = pool.request(
                "POST" if body else "GET",
                url,
                body=body,
                headers=pool.headers | headers,
                redirect=False,
                preload_content=False,
            )
            if answer.status not in (301, 302, 303, 307, 308):
                return answer
            answer.close()
            further = urljoin(url, answer.headers.get("Location", ""))
            target = urlsplit(further)
            safe = target.scheme == host.scheme or target.scheme == "https"
            if not safe or target.netloc not in {*self.hosts, host.netloc}:
                raise UserError(f"{host.netloc} redirects to {target.netloc}, which is not listed")
            url = further
        raise UserError(f"{urlsplit(url).netloc} redirects without end")

    def _pool(self, host: SplitResult) -> Any:
        """Connections to a host, with the headers that it wants."""
        import urllib.request  # slow to import

        import urllib3

        own = urllib3.make_headers(basic_auth=_credentials(host.hostname))
        options: dict[str, Any] = {
            "maxsize": self.connections,
            "retries": False,
            "headers": own | {"Accept-Encoding": "identity"},
            "timeout": urllib3.Timeout(connect=10, read=PATIENCE),
        }
        proxy = urllib.request.getproxies().get(host.scheme)
        if not proxy or urllib.request.proxy_bypass(host.netloc):
            return urllib3.PoolManager(**options)
        auth = urllib3.util.parse_url(proxy).auth
        options["proxy_headers"] = urllib3.make_headers(proxy_basic_auth=auth)
        return urllib3.ProxyManager(proxy, **options)


def _credentials(host: str | None) -> str | None:
    """user:password of a host in ~/.netrc, if it has one."""
    with contextlib.suppress(FileNotFoundError, netrc.NetrcParseError):
        if found := netrc.netrc().authenticators(host or ""):
            return f"{found[0]}:{found[2]}"
    return None
