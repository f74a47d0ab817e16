"""Long curves and tables are reduced to a number of points that can be drawn."""

from hypothesis import given
from hypothesis import strategies as st

from jaxprm.report.panels import evenly_spaced


@given(st.integers(0, 500), st.integers(2, 50))
def test_evenly_spaced_items_keep_both_ends_and_the_order(length: int, limit: int) -> None:
    kept = evenly_spaced(range(length), limit)
    assert len(kept) == min(length, limit)
    assert kept == sorted(set(kept))
    assert not length or (kept[0] == 0 and kept[-1] == length - 1)
