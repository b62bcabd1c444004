"""What is done at a pace is done at once, and then not before its time."""

from __future__ import annotations

from captionserve_server.triton.pace import Pace


def test_due_at_first_and_then_every_so_many_seconds() -> None:
    made, asked = 100.0, (100.0, 100.5, 101.9, 102.0, 103.9, 110.0, 111.0, 112.0)
    pace = Pace(seconds=2.0, clock=iter((made, *asked)).__next__)
    due = [pace.is_due() for _ in asked]
    assert due == [True, False, False, True, False, True, False, True]
