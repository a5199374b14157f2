"""Questions to an OpenAI-compatible endpoint: retries with back-off, a budget that holds, a key that is never shown."""

import asyncio
import json
import os
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import xxhash

from dataprep.labels import LabelsConfig
from dataprep.storage import UserError

LONGEST_WAIT = 60.0  # seconds, of our own choice
LONGEST_RETRY_AFTER = 600.0  # seconds, if the server asks for it
LONGEST_ANSWER = 1 << 20  # bytes of a response
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
LOST = {408, 502, 504}  # of these, where somebody in between gave up waiting: the answer may have been paid for
NO_ANSWER = "no answer: "  # begins the reason where the endpoint is to blame, not the document


class Failed(Exception):
    """Why this question has no answer; the next one may."""


class OutOfBudget(UserError):
    """The next call could cost more than is left."""


@dataclass
class Usage:
    """Tokens that were, or may have been, paid for."""

    prompt: int = 0
    completion: int = 0

    def add(self, other: "Usage") -> None:
        self.prompt += other.prompt
        self.completion += other.completion


@dataclass
class Budget:
    """What may be spent, in money or tokens. A call first reserves the most that it can cost."""

    config: LabelsConfig
    spent: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        words = (self.config.budget or "inf").removesuffix("tokens")
        self.limit, self.in_tokens = float(words), (self.config.budget or "").endswith("tokens")
        if self.limit < float("inf") and not self.in_tokens and not self.config.price_input + self.config.price_output:
            raise UserError(
                f"labels.budget is {self.limit:g} in money, but there are no prices: set labels.price_input and "
                "price_output (per million tokens), or give the budget in tokens (`2000000 tokens`)"
            )
        self.reserved = 0.0
        self.open = 0
        self.changed = asyncio.Condition()

    def cost(self, usage: Usage) -> float:
        """In the budget's unit."""
        if self.in_tokens:
            return float(usage.prompt + usage.completion)
        return (usage.prompt * self.config.price_input + usage.completion * self.config.price_output) / 1e6

    async def reserve(self, worst: Usage) -> None:
        """Wait until a call fits. OutOfBudget where it cannot, even once the calls under way have ended."""
        cost = self.cost(worst)
        async with self.changed:
            while self.cost(self.spent) + self.reserved + cost > self.limit:
                if not self.open:
                    raise OutOfBudget(
                        f"the budget of {self.config.budget} is used up: {self.cost(self.spent):,.6g} spent, and the "
                        f"next call could cost {cost:,.6g}; a higher --budget goes on from here"
                    )
                await self.changed.wait()
            self.reserved, self.open = self.reserved + cost, self.open + 1

    async def settle(self, worst: Usage, used: Usage) -> None:
        """The call has ended: what it used instead of what it could have."""
        async with self.changed:
            self.open -= 1
            self.reserved = self.reserved - self.cost(worst) if self.open else 0.0
            self.spent.add(used)
            self.changed.notify_all()


def worst_case(config: LabelsConfig, messages: list[dict[str, str]]) -> Usage:
    """The most tokens that a call can use: no tokeniser makes more tokens than bytes."""
    more = len(json.dumps(config.request))  # a JSON schema, say
    return Usage(sum(len(m["content"].encode()) + 32 for m in messages) + more, config.max_tokens)


class Chat:
    """The endpoint. `ask` returns the answer's text; use as `async with`."""

    def __init__(self, config: LabelsConfig, budget: Budget):
        self.config, self.budget = config, budget
        self.url = f"{config.endpoint}/chat/completions"
        self._key = os.environ.get(config.key_variable, "").strip() if config.key_variable else ""
        if config.key_variable and not self._key:
            raise UserError(f"labels.key_variable: the environment has no {config.key_variable}; export it")
        if not self._key.isascii() or not self._key.isprintable():
            raise UserError(f"the API key in {config.key_variable} has characters that no key has; export it again")
        self._not_before = 0.0  # monotonic seconds: the server asked all of us to wait

    async def __aenter__(self) -> "Chat":
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        timeout = aiohttp.ClientTimeout(total=self.config.timeout_s)
        connector = aiohttp.TCPConnector(limit=self.config.concurrency)
        self._session = aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, messages: list[dict[str, str]], attempt: int, usage: Usage) -> str:
        """The answer; `usage` grows by what it took. Failed where there is none, UserError where there never will be.

        attempt: which time this question is asked; the endpoint gets another seed for each.
        """
        name = xxhash.xxh3_64_intdigest(messages[-1]["content"].encode(), attempt)
        body = {"model": self.config.model, "messages": messages, "seed": name & 0x7FFFFFFF}
        body |= {self.config.max_tokens_name: self.config.max_tokens} | self.config.request
        reason = ""
        for repetition in range(self.config.retries + 1):
            await asyncio.sleep(max(self._wait(name, repetition), self._not_before - time.monotonic()))
            worst = worst_case(self.config, messages)
            await self.budget.reserve(worst)
            used = worst  # unless we learn better
            try:
                status, headers, data = await self._post(body)
                used = _usage(data, worst) if status == 200 else worst if status in LOST else Usage()
                if status == 200:
                    return self.clean(_content(data))
                reason = f"HTTP {status}" + self._explain(status, data)
                if (after := retry_after(headers.get("Retry-After"))) is not None:
                    self._not_before = max(self._not_before, time.monotonic() + after)
            except aiohttp.ClientConnectorError as error:
                used, reason = Usage(), f"cannot connect to {self.config.endpoint} ({type(error).__name__})"
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                late = isinstance(error, TimeoutError)
                reason = f"no complete answer in {self.config.timeout_s:g} s" if late else type(error).__name__
            finally:
                usage.add(used)
                await asyncio.shield(self.budget.settle(worst, used))
        raise Failed(f"{NO_ANSWER}{reason}, {self.config.retries + 1} times")

    async def _post(self, body: dict[str, Any]) -> tuple[int, Any, bytes]:
        data = b""
        # A redirect is not followed: it could carry the key elsewhere.
        async with self._session.post(self.url, json=body, allow_redirects=False) as response:
            async for block in response.content.iter_chunked(1 << 16):
                data += block
                if len(data) > LONGEST_ANSWER:
                    break
            return response.status, response.headers, data

    def _explain(self, status: int, data: bytes) -> str:
        """What the server says, for a status that may pass. Raises for one that will not."""
        if status in AGAIN:
            return ""
        if status in (401, 403):  # such answers quote parts of the key
            variable = self.config.key_variable
            hint = f"check the key in {variable}" if variable else "it wants a key: set labels.key_variable"
            raise UserError(f"{self.config.endpoint} refuses us (HTTP {status}); {hint}")
        text = self.clean(data[:2000].decode("utf-8", "replace"))
        said = " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]
        if status == 404 or status < 400:
            raise UserError(
                f"{self.url} answers HTTP {status}; check labels.endpoint and "
                f"labels.model = {self.config.model!r}: {said}"
            )
        raise Failed(f"HTTP {status}: {said}")

    def clean(self, text: str) -> str:
        """A text from the server without our key, should it be in there."""
        return text.replace(self._key, "***") if self._key else text

    def _wait(self, name: int, repetition: int) -> float:
        """Seconds before a repetition: doubled each time, half to all of it, by hash."""
        if not repetition:
            return 0.0
        place = xxhash.xxh3_64_intdigest(b"wait %d" % repetition, name) / 2**64
        return min(LONGEST_WAIT, self.config.backoff_s * 2 ** (repetition - 1)) * (1 + place) / 2


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, at most LONGEST_RETRY_AFTER; its form of a date is not read."""
    return min(float(value), LONGEST_RETRY_AFTER) if value and value.strip().isdecimal() else None


def _content(data: bytes) -> str:
    """The text of the first choice; an empty one, which no reader accepts, where the response has no such thing."""
    try:
        content = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return ""
    return content if isinstance(content, str) else ""


def _usage(data: bytes, worst: Usage) -> Usage:
    """What the server says it took; the most it can have been where it says nothing of use."""
    try:
        usage = json.loads(data)["usage"]
        found = Usage(usage["prompt_tokens"], usage["completion_tokens"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return worst
    fits = all(type(n) is int and n >= 0 for n in (found.prompt, found.completion))
    return found if fits else worst
