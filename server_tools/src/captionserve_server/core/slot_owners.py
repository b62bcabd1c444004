"""Who holds slots, so that those of an owner that died come back.

An owner is named role/instance. Each role has a decoder memory of its own, in which its captions
stand without gaps; all share one number of slots.

    - A new instance of a role replaces the one before it, whose slots are free at once.
    - An owner that holds slots and is not heard of for the lease time has lost them.
    - One that holds none keeps its memory, however long it is silent: to lay it anew made the first
      caption after a pause take up to 1.6 s longer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Memory(Protocol):
    """A decoder memory."""

    @property
    def slots_used(self) -> int:
        """Captions in it."""


MemoryType = TypeVar("MemoryType", bound=Memory)


@dataclass
class _Holding(Generic[MemoryType]):
    instance: str
    memory: MemoryType
    heard_at: float


class SlotOwners(Generic[MemoryType]):
    """The decoder memories of all owners."""

    def __init__(
        self,
        new_memory: Callable[[], MemoryType],
        capacity: int,
        lease_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        """Begin without owners.

        Args:
            new_memory: makes an empty memory.
            capacity: slots of all owners together.
            lease_seconds: an owner that is silent for longer has lost the slots it held.
            clock: seconds, never going back.
        """
        self._new_memory = new_memory
        self._capacity = capacity
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._holdings: dict[str, _Holding[MemoryType]] = {}

    def memory_of(self, owner: str) -> MemoryType:
        """The owner's memory; hearing of an owner renews its lease.

        Args:
            owner: role/instance.
        """
        role, _, instance = owner.partition("/")
        now = self._clock()
        self._drop_silent(now)
        holding = self._holdings.get(role)
        if holding is None or holding.instance != instance:
            holding = _Holding(instance, self._new_memory(), now)
            self._holdings[role] = holding
        holding.heard_at = now
        return holding.memory

    @property
    def memories(self) -> list[MemoryType]:
        """All memories there are."""
        return [holding.memory for holding in self._holdings.values()]

    @property
    def room(self) -> int:
        """Captions that could still be taken in, by all owners together."""
        return self._capacity - sum(memory.slots_used for memory in self.memories)

    def _drop_silent(self, now: float) -> None:
        self._holdings = {
            role: holding
            for role, holding in self._holdings.items()
            if not holding.memory.slots_used or now - holding.heard_at <= self._lease_seconds
        }
