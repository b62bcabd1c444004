"""Slots come back from owners that are replaced or silent."""

from __future__ import annotations

from captionserve_server.core.slot_owners import SlotOwners

LEASE_SECONDS = 30.0


class Memory:
    """Counts its slots."""

    def __init__(self) -> None:
        self.slots_used = 0


class Setup:
    """Owners of 10 slots, and a clock that goes as told."""

    def __init__(self) -> None:
        self.now = 100.0
        self.owners = SlotOwners(Memory, 10, LEASE_SECONDS, lambda: self.now)


def test_owners_share_the_slots_but_not_the_memory() -> None:
    setup = Setup()
    first, second = setup.owners.memory_of("a/1"), setup.owners.memory_of("b/1")
    assert first is not second
    assert setup.owners.memory_of("a/1") is first
    first.slots_used, second.slots_used = 3, 4
    assert setup.owners.room == 3


def test_a_new_instance_of_a_role_frees_what_the_last_one_held() -> None:
    setup = Setup()
    setup.owners.memory_of("a/1").slots_used = 9
    setup.owners.memory_of("b/1").slots_used = 1
    assert setup.owners.room == 0
    assert setup.owners.memory_of("a/2").slots_used == 0
    assert setup.owners.room == 9


def test_a_silent_owner_loses_its_slots_after_the_lease() -> None:
    setup = Setup()
    setup.owners.memory_of("a/1").slots_used = 9
    setup.now += LEASE_SECONDS
    setup.owners.memory_of("b/1")
    assert setup.owners.room == 1
    setup.now += 1.0
    setup.owners.memory_of("b/1")
    assert setup.owners.room == 10


def test_an_owner_that_is_heard_of_keeps_its_slots() -> None:
    setup = Setup()
    memory = setup.owners.memory_of("a/1")
    memory.slots_used = 9
    for _ in range(5):
        setup.now += LEASE_SECONDS - 1
        assert setup.owners.memory_of("a/1") is memory
    assert setup.owners.room == 1


def test_an_owner_without_slots_keeps_its_memory_however_long_it_is_silent() -> None:
    setup = Setup()
    memory = setup.owners.memory_of("a/1")
    setup.now += 100 * LEASE_SECONDS
    assert setup.owners.memory_of("a/1") is memory
