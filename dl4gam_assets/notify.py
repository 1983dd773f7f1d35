"""Telling people that something failed: a log line, and a message to one configured web address.

Belongs here: the words of a failure, and sending them to a webhook of a chat (Slack, Mattermost, Teams and Zulip take
``{"text": ...}``). Does not belong here: Dagster, and deciding what counts as a failure.

The address is a secret (whoever knows it can write there): it comes from the environment and is never logged. Messages
go to one configured host only, and never where it redirects to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class NotifyError(RuntimeError):
    """A message could not be sent. The text says why, without the address's secret part."""


@dataclass(frozen=True)
class Failure:
    """What failed, in words for people."""

    job: str
    run_id: str
    partitions: str
    errors: Sequence[str]
    link: str | None = None

    def text(self, limit: int = 3000) -> str:
        """The message: job, partitions, first errors, and where to look."""
        where = f" [{self.partitions}]" if self.partitions else ""
        lines = [f"dl4gam: {self.job}{where} failed (run {self.run_id[:8]})"]
        lines += [f"- {' '.join(error.split())[:500]}" for error in self.errors[:10]]
        if len(self.errors) > 10:
            lines.append(f"- and {len(self.errors) - 10} more")
        lines.append(f"Look at {self.link}" if self.link else "Look at the run in Dagster's UI (Runs).")
        return "\n".join(lines)[:limit]


def checks_text(lines: Sequence[str], limit: int = 3000) -> str:
    """A message about failed checks, one a line, cut to ``limit`` characters."""
    shown = [
        f"dl4gam: {len(lines)} check{'' if len(lines) == 1 else 's'} failed",
        *(f"- {line}" for line in lines[:10]),
    ]
    if len(lines) > 10:
        shown.append(f"- and {len(lines) - 10} more")
    return "\n".join(shown)[:limit]


def send(url: str, host: str, text: str, *, timeout_s: float = 10.0, attempts: int = 3) -> None:
    """Post ``{"text": text}`` to ``url``, which must lie at ``host`` and be https (http on loopback only).

    Raises
    ------
    NotifyError
        if the address is not at the configured host, or the message could not be delivered.
    """
    parts = urlsplit(url)
    if not host or parts.hostname != host.lower():
        raise NotifyError(
            f"the webhook's host is {parts.hostname!r}, but DL4GAM_WEBHOOK_HOST is {host!r}: nothing was sent; "
            "set DL4GAM_WEBHOOK_HOST to the host that may get messages"
        )
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        raise NotifyError(f"the webhook at {host} must be https: nothing was sent")
    retry = Retry(total=attempts - 1, backoff_factor=1.0, status_forcelist=(429, 500, 502, 503, 504), redirect=0,
                  allowed_methods=None, raise_on_status=False, respect_retry_after_header=False)  # fmt: skip
    with requests.Session() as session:
        session.trust_env = False  # no proxy and no stored credentials: to this host, directly
        session.mount(f"{parts.scheme}://", HTTPAdapter(max_retries=retry))
        try:
            answer = session.post(url, json={"text": text}, timeout=timeout_s, allow_redirects=False)
        except requests.RequestException as error:
            raise NotifyError(f"the webhook at {host} could not be reached ({type(error).__name__})") from None
    if not 200 <= answer.status_code < 300:
        raise NotifyError(f"the webhook at {host} answered {answer.status_code}")
