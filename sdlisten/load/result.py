"""What a load counted: `Result` to read, `Tally` to count."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Self

__all__ = ("Result", "Tally")

_FAILURES = ("refused", "reset", "empty", "early_close", "short_read", "timeout", "bad_status")
_SAMPLES = 10
_BUCKET = math.log(1.01)
_PIDS_SHOWN = 6
_SAMPLES_SHOWN = 3


@dataclass(frozen=True)
class Result:
    """What a load counted. Times are in seconds.

    Attributes:
        rate: Requests per second as asked for; 0 for a closed loop.
        seconds: How long it ran, to the end of the last request.
        closed_idle: Kept connections that the server closed between requests (mode ``keep``).
        close_announced: Good answers that ended their connection in an orderly way: ``Connection: close``, or
            HTTP/1.0 without keep-alive (mode ``keep``; in the others we ask for it).
        opened: Connections established.
        abandoned: Requests in flight when `Load.stop` was called a second time; not in ``requests``.
        p50: Latency of the good answers from their planned start; like p99 and p999 at most 1 % too high.
        max: The longest latency of a good answer, exact.
        stall: The longest time in which answers were due and no good one came.
        lag: The longest time the load itself was late: latencies below it may be ours, not the server's.
        pids: Good answers per process: the first word of the body, where that is a number.
        samples: The first failures, each with the time of day.
    """

    address: str
    mode: str
    clients: int
    rate: float
    seconds: float = 0.0
    ok: int = 0
    refused: int = 0
    reset: int = 0
    empty: int = 0
    early_close: int = 0
    short_read: int = 0
    timeout: int = 0
    bad_status: int = 0
    closed_idle: int = 0
    close_announced: int = 0
    opened: int = 0
    abandoned: int = 0
    p50: float = 0.0
    p99: float = 0.0
    p999: float = 0.0
    max: float = 0.0
    stall: float = 0.0
    lag: float = 0.0
    pids: dict[int, int] = field(default_factory=dict)
    samples: tuple[str, ...] = ()

    @property
    def failures(self) -> dict[str, int]:
        """The count of each kind of failure, zeros included."""
        return {kind: getattr(self, kind) for kind in _FAILURES}

    @property
    def failed(self) -> int:
        """Requests that did not get a whole good answer."""
        return sum(self.failures.values())

    @property
    def requests(self) -> int:
        """Requests that came to an end, good or bad."""
        return self.ok + self.failed

    @property
    def clean(self) -> bool:
        """Whether something was answered and nothing failed: a load without a request has proved nothing."""
        return self.ok > 0 and self.failed == 0

    def to_json(self) -> str:
        """Write it as one line of JSON: the attributes, and for other readers ``requests`` and ``failed``."""
        return json.dumps(asdict(self) | {"requests": self.requests, "failed": self.failed})

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: It is something else.
        """
        try:
            found = json.loads(text)
            pids = {int(pid): count for pid, count in found["pids"].items()}
            found |= {"pids": pids, "samples": tuple(found["samples"])}
            del found["requests"], found["failed"]
            return cls(**found)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the result of a load: {text!r}") from error

    def __str__(self) -> str:
        pace = f"{self.rate:g} requests/s" if self.rate else "no pause"
        speed = self.requests / self.seconds if self.seconds else 0.0
        abandoned = f" · abandoned {self.abandoned:,}" if self.abandoned else ""
        failures = " · ".join(f"{kind.replace('_', ' ')} {count:,}" for kind, count in self.failures.items())
        rows = {
            "requests": f"{self.requests:,} ({speed:,.0f}/s) · "
            f"ok {self.ok:,} · failed {self.failed:,}{abandoned}",
            "failed": failures,
            "connections": f"opened {self.opened:,} · closed while idle {self.closed_idle:,} · "
            f"answered with Connection: close {self.close_announced:,}",
            "latency ms": f"p50 {_ms(self.p50)} · p99 {_ms(self.p99)} · p99.9 {_ms(self.p999)} · "
            f"max {_ms(self.max)} (good answers, from the planned start)",
            "stall ms": f"{_ms(self.stall)} at most without a good answer · own lateness {_ms(self.lag)}",
            "answered by": self._pids_line(),
        }
        lines = [f"{self.mode} load on {self.address}: {self.clients} clients, {pace}, {self.seconds:.1f} s"]
        lines += [f"{name:<12} {text}" for name, text in rows.items()]
        lines += [f"failure      {sample}" for sample in self.samples[:_SAMPLES_SHOWN]]
        if not self.requests:
            lines.append("failure      no request was made: nothing is proved")
        return "\n".join(lines)

    def _pids_line(self) -> str:
        pids = [f"{pid} ({count:,})" for pid, count in self.pids.items()]
        if len(pids) > _PIDS_SHOWN:
            half = _PIDS_SHOWN // 2
            pids[half:-half] = ["…"]
        return f"{len(self.pids)} processes" + (f": {' '.join(pids)}" if pids else "")


class Tally:
    """Counts while a load runs. Latencies go into buckets 1 % apart, so memory does not grow with time.

    Attributes:
        counts: By the names of `Result`'s attributes.
        lag: As in `Result`; set by the engine.
    """

    def __init__(self, address: str, mode: str, clients: int, rate: float) -> None:
        self._what = (address, mode, clients, rate)
        self.counts: Counter[str] = Counter()
        self.lag = 0.0
        self._buckets: Counter[int] = Counter()
        self._max = 0.0
        self._stall = 0.0
        self._last_good = -math.inf
        self._unmet = (
            math.inf
        )  # when the oldest was due of the requests that failed since the last good answer
        self._pids: Counter[int] = Counter()
        self._samples: list[str] = []

    def good(self, now: float, due: float, oldest_due: float, word: bytes) -> None:
        """Count a good answer.

        Args:
            now: When it came.
            due: When its request was due.
            oldest_due: When the oldest request was due of those not ended before this one.
            word: The first word of its body.
        """
        latency = now - due
        self.counts["ok"] += 1
        self._buckets[math.ceil(math.log(max(latency, 1e-6)) / _BUCKET)] += 1
        self._max = max(self._max, latency)
        self._stall = self._stall_until(now, oldest_due)
        self._last_good = now
        self._unmet = math.inf
        if word.isdigit():
            self._pids[int(word)] += 1

    def bad(self, now: float, due: float, kind: str, detail: str) -> None:
        """Count a failure of this kind, an attribute of `Result`; the first ones are kept as samples."""
        self.counts[kind] += 1
        self._unmet = min(self._unmet, due, now)
        if len(self._samples) < _SAMPLES:
            # The time of day, to be found in the server's log.
            clock = time.time()
            second = time.strftime("%H:%M:%S", time.localtime(clock))
            self._samples.append(f"{second}.{int(clock % 1 * 1000):03} {kind.replace('_', ' ')}: {detail}")

    def result(self, now: float, seconds: float) -> Result:
        """Return what was counted so far."""
        counts: dict[str, Any] = dict(self.counts)
        return Result(
            *self._what,
            seconds,
            p50=self._quantile(0.5),
            p99=self._quantile(0.99),
            p999=self._quantile(0.999),
            max=self._max,
            stall=self._stall_until(now, math.inf),
            lag=self.lag,
            pids=dict(self._pids),
            samples=tuple(self._samples),
            **counts,
        )

    def _stall_until(self, now: float, oldest_due: float) -> float:
        return max(self._stall, now - max(min(oldest_due, self._unmet), self._last_good))

    def _quantile(self, share: float) -> float:
        left = math.ceil(share * self.counts["ok"])
        for bucket in sorted(self._buckets):
            left -= self._buckets[bucket]
            if left <= 0:
                return min(math.exp(bucket * _BUCKET), self._max)
        return 0.0


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"
