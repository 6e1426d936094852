"""Spaces nested in any way, for tests that hold whatever an environment observes."""

from __future__ import annotations

from gymnasium import spaces
from hypothesis import strategies as st

LEAVES = st.one_of(
    st.builds(spaces.Discrete, st.integers(1, 9), start=st.integers(-3, 3)),
    st.builds(spaces.MultiBinary, st.sampled_from([1, 3, (2, 2)])),
    st.builds(spaces.MultiDiscrete, st.lists(st.integers(1, 5), min_size=1, max_size=3)),
    st.builds(
        spaces.Box,
        low=st.just(0),
        high=st.just(9),
        shape=st.sampled_from([(), (1,), (3,), (2, 0), (2, 3)]),
        dtype=st.sampled_from(["float32", "float64", "uint8", "int16"]),
    ),
)
SPACES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3).map(spaces.Dict),
        st.lists(inner, min_size=1, max_size=3).map(spaces.Tuple),
    ),
    max_leaves=5,
)
