"""Numbers as text."""

import pytest

from meteor.formatting import (
    flatten,
    format_bytes,
    format_count,
    format_duration,
    format_interval,
    format_number,
    format_parameters,
    format_share,
    format_value,
    humanise,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4217, "0.42 s"),
        (42.4, "42 s"),
        (59.4, "59 s"),
        (59.7, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_durations_have_two_units_at_most(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (5_912_000_000_000, "5.91 TB"), (2e16, "20 PB")],
)
def test_sizes_have_decimal_units(size_bytes, text):
    assert format_bytes(size_bytes) == text


@pytest.mark.parametrize(("size_bytes", "text"), [(999_999, "1 MB"), (999_400, "999 kB")])
def test_a_size_just_below_a_unit_is_not_written_with_an_exponent(size_bytes, text):
    assert format_bytes(size_bytes) == text


@pytest.mark.parametrize(
    ("value", "text"), [(20730.4, "20,730"), (99.96, "100"), (48.0, "48.0"), (0.01234, "0.0123"), (0.0, "0")]
)
def test_rates_keep_three_digits(value, text):
    assert format_number(value) == text


def test_counts_have_thousands_separators_and_parameters_are_millions():
    assert format_count(1250881) == "1,250,881"
    assert format_parameters(37_080_000) == "37.08 M"
    assert format_parameters(12_000) == "12,000"


def test_shares_are_percentages():
    assert format_share(0.81249) == "81.2 %"
    assert format_interval(0.775, 0.845) == "77.5 – 84.5"


@pytest.mark.parametrize(
    ("value", "text"), [(None, "none"), (True, "true"), (2e-05, "2e-05"), ("a b", "a b"), ([1, "é"], '[1, "é"]')]
)
def test_settings_of_any_type_become_one_line(value, text):
    assert format_value(value) == text


def test_a_key_becomes_a_label():
    assert humanise("num_sub_images") == "sub images"


def test_nested_settings_become_dotted_names_and_an_empty_mapping_is_a_value():
    assert flatten({"a": {"b": {"c": 1}, "d": {}}, "e": [1]}) == {"a.b.c": 1, "a.d": {}, "e": [1]}
