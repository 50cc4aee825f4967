"""The numbers of compound scaling."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.variants import VARIANTS, from_multipliers, from_phi, round_filters, round_repeats


@pytest.mark.parametrize(
    ("filters", "width", "expected"),
    [
        (32, 1.0, 32),
        (32, 1.1, 32),
        (16, 1.1, 16),
        (24, 1.2, 32),
        (1280, 1.1, 1408),
        (320, 4.3, 1376),
        (8, 0.1, 8),
        (12, 1.0, 16),
        (11, 1.0, 16),
    ],
)
def test_filters_go_to_the_nearest_multiple_of_eight_but_not_below_ninety_per_cent(
    filters: int, width: float, expected: int
) -> None:
    assert round_filters(filters, width) == expected


@given(st.integers(1, 2000), st.floats(0.05, 10))
def test_rounded_filters_are_a_positive_multiple_of_eight_near_the_exact_value(filters: int, width: float) -> None:
    rounded = round_filters(filters, width)
    assert rounded >= 8
    assert rounded % 8 == 0
    assert 0.9 * filters * width <= rounded <= filters * width + 8


@pytest.mark.parametrize(
    ("repeats", "depth", "expected"), [(1, 1.0, 1), (1, 1.1, 2), (4, 3.1, 13), (3, 5.3, 16), (2, 0.1, 1)]
)
def test_repeats_are_rounded_up(repeats: int, depth: float, expected: int) -> None:
    assert round_repeats(repeats, depth) == expected


def test_phi_zero_is_b0() -> None:
    b0, scaled = VARIANTS["b0"], from_phi(0)
    assert (scaled.width, scaled.depth, scaled.resolution, scaled.dropout) == (
        b0.width,
        b0.depth,
        b0.resolution,
        b0.dropout,
    )


def test_phi_seven_is_the_formula_and_not_the_hand_picked_b7() -> None:
    scaled = from_phi(7)
    assert scaled.resolution == 596
    assert scaled.depth == pytest.approx(3.58, abs=0.005)
    assert scaled.width == pytest.approx(1.95, abs=0.005)
    assert scaled.dropout == VARIANTS["b7"].dropout


def test_a_unit_of_phi_about_doubles_the_cost() -> None:
    zero, one = from_phi(0), from_phi(1)
    assert one.depth * one.width**2 * (one.resolution / zero.resolution) ** 2 == pytest.approx(2, rel=0.05)


def test_free_multipliers_take_the_dropout_of_the_nearest_published_width() -> None:
    assert from_multipliers(1.45, 1.0, 128).dropout == VARIANTS["b4"].dropout
    assert from_multipliers(1.0, 1.0, 128).family_name == "efficientnet"


def test_the_table_names_every_variant_after_itself() -> None:
    assert list(VARIANTS) == [f"b{i}" for i in range(9)] + ["l2"] + [f"lite{i}" for i in range(5)]
    assert all(
        variant.name == name and (variant.family_name == "efficientnet_lite") == name.startswith("lite")
        for name, variant in VARIANTS.items()
    )
