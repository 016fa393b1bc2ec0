"""Numbers as a reader wants them."""

import pytest

from stellarbyte_jax.inspect.numbers import factor, of_bytes, percent, short


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (2**20, "1.00 MiB"),
        (5 * 2**40, "5.00 TiB"),
        (2**62, "4,096.00 PiB"),
    ],
)
def test_bytes(count, text):
    assert of_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1.00K"),
        (9999, "10.0K"),
        (12_345, "12.3K"),
        (999_600, "1.00M"),
        (162_417_408, "162M"),
        (8.03e9, "8.03G"),
        (1.2e15, "1.20P"),
    ],
)
def test_short_numbers(count, text):
    assert short(count) == text


def test_percent():
    assert (percent(1), percent(0.12345)) == ("100.00 %", "12.35 %")


def test_factors():
    assert [factor(x) for x in (1.0, 1 / 3, 21.3333, 1899.6)] == ["1×", "0.333×", "21.3×", "1,900×"]
