"""Numbers as answers write them."""

# ruff: noqa: RUF001 (characters that look alike are told apart on purpose)

from __future__ import annotations

from fractions import Fraction

import pytest

from beaver_ray.rules.written_numbers import last_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,000.50", "1000.5"),
        ("-3/4", "-3/4"),
        ("−7", "-7"),
        ("1e3", "1000"),
        ("2.5E-2", "1/40"),
        (r"\frac{1}{2}", "1/2"),
        (r"-\dfrac{3}{4}", "-3/4"),
        (r"2 \times 10^{3}", "2000"),
        ("3 * 10^-2", "3/100"),
        ("$1,234", "1234"),
        ("50%", "50"),
        (r"12{,}345", "12345"),
        ("２４", "24"),
        (".5", "1/2"),
        ("3.", "3"),
        ("It took 3 tries and then 12 more.", "12"),
        ("10-3", "3"),
        ("x = -2", "-2"),
        # A whole number and a fraction.
        ("2 1/3 cups", "7/3"),
        (r"1\frac{1}{2}", "3/2"),
        (r"-3 \tfrac14", "-13/4"),
        ("1½", "3/2"),
        # Powers, also raised: 5² is no 52.
        ("10³", "1000"),
        ("2×10³", "2000"),
        ("6.02 × 10²³", "602000000000000000000000"),
        ("3·10⁻²", "3/100"),
        ("2 x 10^3", "2000"),
        ("1.5X10^3", "1500"),
        ("The area is 5²", "25"),
        ("2³.", "8"),
        ("2^{10}", "1024"),
        ("-2^2", "-4"),
        ("5²/2", "25/2"),
        (r"\frac{1}{2^3}", "1/8"),
        ("共5²", "25"),
        ("0^0", "1"),
        (r"9π ≈ 28.27", "28.27"),
        (r"28.27 (9\pi)", "28.27"),
        (r"\sqrt{16} = 4", "4"),
        (r"\log_{2} 8 = 3", "3"),
        ("5 circles and π", "5"),
        # Of a sum the parts are none, what it comes to is.
        ("15 = 12 + 3", "15"),
        ("x + y = 7", "7"),
        (r"\sqrt{16} + 1 = 5", "5"),
        ("5+", "5"),
        ("written in C++ 11", "11"),
        ("It is *5*.", "5"),
        ("between 5-7 days", "7"),
        # Degrees, ordinals and units that are raised are none; nor does what follows a power take it away.
        (r"90^\circ", "90"),
        (r"The angle is 90^{\circ}.", "90"),
        (r"60^\circ C", "60"),
        ("30^o", "30"),
        ("5^{th}", "5"),
        ("12m^2", "12"),
        ("10^6 dollars", "1000000"),
        ("3×10^8 m/s", "300000000"),
        (r"It is 2 \times 10^3.", "2000"),
        (r"\frac{1}{2^{10}}", "1/1024"),
        ("**42** 7^1", "7"),
        ("12 m²", "12"),
        ("½", "1/2"),
        ("5 7/3", "7/3"),
        # Units and money beside it, in scripts with and without spaces.
        ("5kg", "5"),
        ("about 12.5 km/h", "25/2"),
        ("一共12元", "12"),
        ("共有３个苹果", "3"),
        ("12 cm^2", "12"),
        ("12cm²", "12"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("So we get:\n- 42", "42"),
        ("Total \u2013 12 dollars", "12"),
        (r"50\%", "50"),
        # Powers of ten, and thousands apart.
        ("10^3", "1000"),
        ("10**-2", "1/100"),
        ("1\u202f234\u202f567", "1234567"),
    ],
)
def test_numbers_as_they_are_written(text: str, number: str) -> None:
    assert last_number(text) == Fraction(number)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "none",
        "12,5",
        "1/0",
        "1e999999",
        "9^999",
        "999999^999",
        "9" * 5000,
        "v1.2.3",
        "7th",
        "2nd",
        "1e",
        "x2",
        "4abc",
        # Parts of what is not read.
        r"\sqrt{2}",
        r"\sqrt 2",
        r"2\sqrt[3]{5}",
        r"2 \times \sqrt{3}",
        "2√3",
        "√16",
        r"3\pi",
        "2 π",
        "π / 2",
        "1 + π",
        r"\frac{\sqrt{3}}{2}",
        r"\frac{1}{\sqrt{2}}",
        r"\frac{3\pi}{4}",
        r"\ln 2",
        r"\sin(30)",
        "x^2+3",
        "2 + 3",
        r"3 + 2\pi",
        r"16-4\pi",
        "x-5",
        r"2x + 5",
        r"1 + \frac{1}{2}",
        r"\sqrt{\frac{1}{2}}",
        r"\sqrt{\frac12}",
        r"\sqrt\frac12",
        r"\log_2 3",
        r"\log_{10} 3",
        "sqrt(2)",
        "log(5)",
        "log_2(5)",
        "2^n",
        "2^{n+1}",
        "2^{-3}",
        "10^{1/2}",
        "4^{3/2}",
        "2^3.5",
        "2^3^2",
    ],
)
def test_what_is_no_number(text: str) -> None:
    assert last_number(text) is None
