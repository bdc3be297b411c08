from __future__ import annotations

import pytest

from graphcache.cache.reservation import Reservation


def test_it_is_released_once_with_itself():
    released = []
    room = Reservation(7, released.append)
    room.release()
    room.release()
    assert released == [room]


def test_a_block_releases_it_even_after_an_exception():
    released = []
    with pytest.raises(ZeroDivisionError), Reservation(7, released.append) as room:
        assert (room.nbytes, released) == (7, [])
        raise ZeroDivisionError
    assert released == [room]
