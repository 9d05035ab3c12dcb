"""Keys, values and words for made-up facts: everything drawn from a seeded generator, nothing twice."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator

_ADJECTIVES = """
able amber ancient ardent autumn azure bashful basic bitter blazing blunt bold boundless brave breezy brief bright
brisk broad bronze calm candid careful cheerful chilly civil clever cloudy coarse cobalt copper coral cosmic
crimson crisp curious curly daring dapper dusty eager earnest early elegant emerald faint fair famous fancy
fearless fierce floral fluent foggy formal fragile frosty frugal gentle giddy gilded glad golden graceful grand
grateful hasty hazel hearty hidden hollow humble icy idle indigo jolly jovial keen kind lavish lazy lively lofty
lonely loyal lucid lunar mellow merry mighty misty modest narrow neat nimble noble oaken odd olive opal orderly
pale patient placid plain playful polite proud purple quaint quick quiet rapid rare restless robust rocky rosy
rugged rustic scarlet serene sharp shy silent silver simple sleepy slender smooth snowy sober solar solemn spare
speedy spicy stark steady steep stern stormy sturdy subtle sunny supple swift tame tender thrifty tidy tiny topaz
tranquil trusty upbeat urban vast velvet violet vivid warm weary wild windy wise witty wooden young zealous
"""
_NOUNS = """
acorn alcove anchor anvil apron arch arrow atlas attic badge bakery balcony banjo barge barley basin basket beacon
bench blanket bobbin bonfire bottle boulder bridge broom bucket buckle bureau button cabin cactus canal candle
canoe canyon carpet castle cellar chapel chariot chimney cider cinder citadel clover cobbler comet compass coral
cottage cradle crater crystal cupboard curtain cushion dagger dairy desert dolphin drawer drum eagle easel elbow
engine falcon fathom feather fern ferry fiddle fjord flagon flute forest fountain furnace galaxy garden gazebo
geyser glacier goblet granary grotto guitar hammer hamlet harbor hatchet haven hedge helmet heron hollow horizon
island ivory jacket jasmine journal kayak kennel kettle kiln ladder lagoon lantern lattice ledger lemon lichen
lighthouse lilac loom magnet mallet mandolin maple marble market meadow medal mirror mitten monsoon mosaic nectar
needle nettle notebook nutmeg oasis oboe orchard otter oyster paddle pagoda parcel pasture pavilion pebble pelican
pencil pepper pigeon pillow plateau plum pocket pony portrait prairie prism pulley pumpkin quarry quill quilt
rafter raven reef ribbon river rocket saddle saffron satchel scarf schooner seashell shutter sickle sparrow spindle
stable statue summit sundial tavern teapot temple thicket thimble timber toolbox tower tractor trellis trumpet
tulip tunnel turbine turnip umbrella valley vessel village viola walnut waterfall whistle willow window workshop
yarrow zephyr
"""
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def draw_keys(rng: random.Random, kind: str) -> Iterator[str]:
    """Different keys without end: ``words`` (adjective-noun, later with a number) or ``uuid``."""
    if kind == "uuid":
        yield from draw_uuids(rng)
    seen: set[str] = set()
    while True:
        key = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
        if len(seen) > len(ADJECTIVES) * len(NOUNS) // 2:  # most are taken
            key += f"-{rng.randrange(2, 10_000)}"
        if key not in seen:
            seen.add(key)
            yield key


def draw_values(rng: random.Random, kind: str) -> Iterator[str]:
    """Different values without end: ``number`` (seven digits) or ``uuid`` (version 4)."""
    if kind == "uuid":
        yield from draw_uuids(rng)
    seen: set[int] = set()
    while True:
        number = rng.randrange(1_000_000, 10_000_000)
        if number not in seen:
            seen.add(number)
            yield str(number)


def draw_uuids(rng: random.Random) -> Iterator[str]:
    """Random UUIDs, version 4."""
    while True:
        yield str(uuid.UUID(int=rng.getrandbits(128), version=4))


def draw_letters(rng: random.Random, length: int, *, upper: bool = False) -> Iterator[str]:
    """Different strings of random letters."""
    seen: set[str] = set()
    while True:
        word = "".join(rng.choice(LETTERS) for _ in range(length))
        if word not in seen:
            seen.add(word)
            yield word.upper() if upper else word


def draw_pseudo_words(rng: random.Random) -> Iterator[str]:
    """Different words that could be pronounced, of three syllables."""
    seen: set[str] = set()
    while True:
        word = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(3)) + rng.choice(CONSONANTS)
        if word not in seen:
            seen.add(word)
            yield word
