"""Names of concepts, in arguments, notes and files."""

from __future__ import annotations

import unicodedata

import pytest
from _amounts import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from slug_lightning.errors import UnlearnError
from slug_lightning.utils.names import LONGEST, check_names, concept_of, file_name, grouped, notes_on

# Also what Hypothesis leaves out by default: halves of surrogate pairs, which a name read from a broken file may hold.
ANYTHING = st.text(st.characters(codec=None), min_size=1, max_size=120)


@examples(300)
@given(ANYTHING)
def test_a_file_name_is_safe_whatever_the_concept(concept):
    name = file_name(concept)
    assert 0 < len(name.encode()) <= LONGEST
    assert all(letter == "-" or unicodedata.category(letter)[0] in "LMN" for letter in name)
    assert name[0] != "-" != name[-1] and "--" not in name
    assert file_name(name) == name, "the name of a file names it"


@examples(300)
@given(st.lists(ANYTHING.filter(str.strip), min_size=1, max_size=6) | st.lists(st.text("aA-é ", min_size=1), min_size=1))
def test_names_have_files_of_their_own_or_are_refused(names):
    files = {file_name(name) for name in names if name.strip()}
    if len(files) == len(names):
        check_names("forget", names)
    else:
        with pytest.raises(UnlearnError, match=r"^forget: (the concepts .* would have the same files, |.* not a concept name)"):
            check_names("forget", names)


@pytest.mark.parametrize(
    ("one", "other"),
    [("Fire truck", "fire  TRUCK!"), ("cat", "cat"), ("café", "cafe\u0301"), ("STRASSE", "straße"), ("a/b", "a-b"), ("２", "2")],
)
def test_names_that_differ_in_writing_alone_clash(one, other):
    with pytest.raises(UnlearnError, match=r"forget: the concepts .* rename one") as caught:
        check_names("forget", [one, "owl", other])
    assert repr(one) in str(caught.value) and repr(other) in str(caught.value)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("का", "कि"),  # vowel signs are no letters
        ("🐙", "🦑"),  # nothing is left of either
        ("x" * 200, "x" * 201),
        ("火" * 100, "火" * 99),
        ("cat", "cats"),
    ],
)
def test_different_names_have_different_files(one, other):
    check_names("forget", [one, other])
    assert file_name(one) != file_name(other)


@pytest.mark.parametrize(("concept", "name"), [("Fire truck!", "fire-truck"), ("../etc/passwd", "etc-passwd"), ("סוס", "סוס")])
def test_a_file_name_can_be_read(concept, name):
    assert file_name(concept) == name


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "forget: no concept is given; name at least one"),
        (["cat", ""], "forget: '' is not a concept name"),
        ([" \n"], "is not a concept name"),
        ([3], "forget: 3 is not a concept name"),
        ([None], "forget: None is not a concept name"),
    ],
)
def test_what_is_no_name_is_refused(names, message):
    with pytest.raises(UnlearnError, match=message):
        check_names("forget", names)


def test_a_datamodule_may_name_its_concept_in_one_word_or_several():
    class Data:
        concept = ["octopus", "octopuses"]

    assert concept_of(Data()) == "octopus, octopuses"
    Data.concept = "cat"
    assert concept_of(Data()) == "cat"
    Data.concept = None
    assert concept_of(Data()) == concept_of(object()) == "the forget set"


@settings(deadline=None)
@given(st.dictionaries(st.text(), st.tuples(st.sampled_from(["{} of {} read", "a stream", "part {}"]), st.integers(0, 99))))
def test_a_group_says_what_each_of_its_sentences_says(made):
    sentences = {name: form.format(number, number + 1) for name, (form, number) in made.items()}
    groups = grouped(sentences)
    assert sorted(name for names, _ in groups for name in names) == sorted(made)
    assert len(groups) == len({form for form, _ in made.values()})
    for names, told in groups:
        own = [made[name][1] for name in names]
        low, high = min(own), max(own)
        numbers = [f"{a}" if low == high else f"{a} to {b}" for a, b in ((low, high), (low + 1, high + 1))]
        assert told == made[names[0]][0].format(*numbers)


def test_notes_name_the_few_and_count_the_many():
    sentences = {f"c{i}": f"{i} samples" for i in range(5, 15)} | {"stream": "a stream", "other": "three loaders"}
    assert notes_on(sentences, 12) == [
        "forget 'c5', 'c6', 'c7', 'c8', 'c9' and 5 more, each: 5 to 14 samples",
        "forget 'stream': a stream",
        "forget 'other': three loaders",
    ]
    assert notes_on({}, 12) == []
    few = {name: f"{number} samples" for number, name in enumerate(("cat", "dog", "owl"))}
    assert notes_on(few, 3) == ["forget 'cat': 0 samples", "forget 'dog': 1 samples", "forget 'owl': 2 samples"]
