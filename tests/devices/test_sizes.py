"""Sizes in and out, exact to the byte."""

from __future__ import annotations

import random

import pytest
from satchel.devices.sizes import format_size, parse_size
from satchel.errors import OptionError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1500000000", 1_500_000_000),
        ("17B", 17),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("800MB", 800_000_000),
        ("512MiB", 512 * 1024**2),
        ("1.2GB", 1_200_000_000),
        ("1.5GiB", 3 * 512 * 1024**2),
        ("2TB", 2 * 1000**4),
        ("1TiB", 1024**4),
        (" 1.2 gb ", 1_200_000_000),
        ("1.GB", 1_000_000_000),
        (".5MB", 500_000),
        ("0.0001KB", 0),
        (4096, 4096),
    ],
)
def test_parse(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", " ", "GB", "2G", "2 gigabytes", "-1GB", "+1GB", "1e9", "1,2GB", "1_000", "0x10", "1.2.3GB", "١GB",
     "nan", "inf", "9" * 30, "1GB" * 50, -1, 2**63, "99999999TB", True, None, 1.5],
)
def test_bad_text_is_refused_with_examples(text: object) -> None:
    with pytest.raises(OptionError, match=r"800MB, 1\.2GB, 2GiB or 1500000000 \(bytes\)") as caught:
        parse_size(text)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


def test_half_a_byte_means_a_missing_unit() -> None:
    with pytest.raises(OptionError, match=r"'1\.5' is not a number of bytes, a unit is missing"):
        parse_size("1.5")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (999, "999B"),
        (1000, "1KB"),
        (1234, "1.23KB"),
        (12_345, "12.3KB"),
        (123_456, "123KB"),
        (999_949, "1MB"),
        (1_200_000_000, "1.2GB"),
        (3 * 1000**4, "3TB"),
        (5_000 * 1000**4, "5000TB"),
        (-1_500_000, "-1.5MB"),
    ],
)
def test_format(size: int, text: str) -> None:
    assert format_size(size) == text


def test_formatted_sizes_read_back_and_rounding_up_never_names_less() -> None:
    rng = random.Random(7)
    for _ in range(2000):
        size = rng.randrange(10 ** rng.randrange(1, 18))
        assert abs(parse_size(format_size(size)) - size) <= size * 0.0051
        assert size <= parse_size(format_size(size, round_up=True)) <= size * 1.0101
