"""The meters and leases of meters.py in Redis, for all replicas: one script, one round trip and one decision a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from apt_serve.limits.meters import BIN_MS, NUM_BINS, Demand, Level, Refund, Verdict

LEASE_MS: Final = 15_000
"""A lease that nobody has renewed for so long is over: its replica was killed."""
MAX_CONNECTIONS: Final = 16
_PREFIX = "apt:limits:"

# Time is Redis' own, the same for all replicas; a test may give another. KEYS: meters, then leases.
_TAKE = """
local bin_ms, num_bins, lease_ms = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local lease, now_ms, num_meters = ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
if not now_ms then
    local time = redis.call('TIME')
    now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
end

local function read_meter(key)
    local stored, bins, newest = redis.call('HGETALL', key), {}, -1
    for i = 1, #stored, 2 do
        local number = tonumber(stored[i])
        bins[#bins + 1] = {number, tonumber(stored[i + 1])}
        if number > newest then newest = number end
    end
    local now = math.floor(now_ms / bin_ms)
    if newest > now + num_bins then
        redis.call('DEL', key)
        bins, newest = {}, -1
    end
    local meter = {key = key, bins = {}, used = 0, newest = newest, now = math.max(now, newest)}
    for _, bin in ipairs(bins) do
        if bin[1] < meter.now - num_bins then
            redis.call('HDEL', key, bin[1])
        else
            meter.bins[#meter.bins + 1] = bin
            meter.used = meter.used + bin[2]
        end
    end
    return meter
end

local function leaves_ms(number)
    return (number + num_bins + 1) * bin_ms - now_ms
end

local function fits_after_ms(meter, excess)
    table.sort(meter.bins, function(a, b) return a[1] < b[1] end)
    for _, bin in ipairs(meter.bins) do
        excess = excess - bin[2]
        if excess <= 0 then return leaves_ms(bin[1]) end
    end
    return -1
end

local meters, refused, retry_ms = {}, -1, -1
for i = 1, num_meters do
    local meter = read_meter(KEYS[i])
    meter.limit, meter.amount = tonumber(ARGV[5 + 2 * i]), tonumber(ARGV[6 + 2 * i])
    meters[i] = meter
    local excess = meter.used + meter.amount - meter.limit
    if excess > 0 and refused < 0 then
        refused, retry_ms = i - 1, fits_after_ms(meter, excess)
    end
end
for i = num_meters + 1, #KEYS do
    redis.call('ZREMRANGEBYSCORE', KEYS[i], '-inf', now_ms)
    if refused < 0 and redis.call('ZCARD', KEYS[i]) >= tonumber(ARGV[6 + num_meters + i]) then refused = i - 1 end
end

local answer = {refused, retry_ms}
for _, meter in ipairs(meters) do
    if refused < 0 then
        redis.call('HINCRBY', meter.key, meter.now, meter.amount)
        redis.call('PEXPIRE', meter.key, (num_bins + 2) * bin_ms)
        meter.used, meter.newest = meter.used + meter.amount, meter.now
    end
    answer[#answer + 1] = math.max(0, meter.limit - meter.used)
    answer[#answer + 1] = meter.used > 0 and leaves_ms(meter.newest) or 0
    answer[#answer + 1] = meter.now
end
if refused < 0 then
    for i = num_meters + 1, #KEYS do
        redis.call('ZADD', KEYS[i], now_ms + lease_ms, lease)
        redis.call('PEXPIRE', KEYS[i], lease_ms)
    end
end
return answer
"""

# A bin that is gone has left the window, or Redis has forgotten everything: then there is nothing to give back.
_GIVE_BACK = """
local lease, num_meters = ARGV[1], tonumber(ARGV[2])
for i = 1, num_meters do
    local number, amount = ARGV[1 + 2 * i], tonumber(ARGV[2 + 2 * i])
    local taken = tonumber(redis.call('HGET', KEYS[i], number) or 0)
    if taken > amount then
        redis.call('HINCRBY', KEYS[i], number, -amount)
    elseif taken > 0 then
        redis.call('HDEL', KEYS[i], number)
    end
end
for i = num_meters + 1, #KEYS do
    redis.call('ZREM', KEYS[i], lease)
end
"""

# Of each key one lease. Adds those that Redis has forgotten.
_RENEW = """
local time = redis.call('TIME')
local ends = time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[1])
for i, key in ipairs(KEYS) do
    redis.call('ZADD', key, ends, ARGV[1 + i])
    redis.call('PEXPIRE', key, ARGV[1])
end
"""


class RedisMeters:
    """One Redis; no cluster, since a script takes keys of several owners.

    Every call may raise redis.RedisError or OSError, and waits no longer than Redis lets it: whoever calls sets the
    time limit.

    Args:
        url: such as redis://host:6379/0.
        timeout_s: of connecting, and of each answer.
        clock: seconds; None: Redis' own.
    """

    def __init__(self, url: str, timeout_s: float, clock: Callable[[], float] | None = None) -> None:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
        )
        self._redis = Redis.from_pool(pool)
        self._clock = clock
        self._take = self._redis.register_script(_TAKE)
        self._give_back = self._redis.register_script(_GIVE_BACK)
        self._renew = self._redis.register_script(_RENEW)

    async def take(self, demand: Demand) -> Verdict:
        """As MemoryMeters.take."""
        keys = [_PREFIX + take.key for take in demand.takes] + [_PREFIX + seat.key for seat in demand.seats]
        now_ms = "" if self._clock is None else int(self._clock() * 1000)
        args: list[Any] = [BIN_MS, NUM_BINS, LEASE_MS, demand.lease, now_ms, len(demand.takes)]
        for take in demand.takes:
            args += (take.limit, take.amount)
        args += (seat.limit for seat in demand.seats)
        return _verdict(await self._take(keys, args))

    async def give_back(self, refund: Refund) -> None:
        """As MemoryMeters.give_back."""
        keys = [_PREFIX + key for key in (*(take[0] for take in refund.takes), *refund.seats)]
        args: list[Any] = [refund.lease, len(refund.takes)]
        for _, number, amount in refund.takes:
            args += (number, amount)
        await self._give_back(keys, args)

    async def renew(self, leases: Mapping[str, Sequence[str]]) -> None:
        """Let leases, each with its keys, go on for LEASE_MS."""
        pairs = [(_PREFIX + key, lease) for lease, keys in leases.items() for key in keys]
        for start in range(0, len(pairs), 500):
            some = pairs[start : start + 500]
            await self._renew([key for key, _ in some], [LEASE_MS, *(lease for _, lease in some)])

    async def ping(self) -> None:
        """Find out whether it answers."""
        await self._redis.ping()

    async def close(self) -> None:
        """Close all connections."""
        await self._redis.aclose()


def _verdict(answer: Sequence[int]) -> Verdict:
    refused, retry_ms, *rest = answer
    levels = tuple(Level(rest[i], rest[i + 1]) for i in range(0, len(rest), 3))
    return Verdict(levels, tuple(rest[2::3]), None if refused < 0 else refused, None if retry_ms < 0 else retry_ms)
