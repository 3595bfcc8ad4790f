"""JSON as it is read from files: one kind of error, whatever is wrong."""

import pytest

from mpq_jax.checks import strict_json


def test_sound_text_is_read_as_json_is():
    text = '{"a": [1, 2.5, null, true, "b"], "c": {"a": {}}}'
    wanted = {"a": [1, 2.5, None, True, "b"], "c": {"a": {}}}
    assert strict_json.parse(text) == strict_json.parse(text.encode()) == wanted
    assert strict_json.parse("[" * 60 + "]" * 60)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the text is not JSON"),
        ("bits: 4", "the text is not JSON"),
        (b"\xff\xfe\x00", "the text is not JSON"),
        ("9" * 5000, "the text is not JSON"),
        ('{"a": 1, "b": 2, "a": 1}', r"the text names \['a'\] more than once"),
        ('[{"x": {"b": 2, "b": 3}}]', r"names \['b'\] more than once"),
        ("[" * 100 + "]" * 100, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ("[" * 200_000, "nested too deeply"),
    ],
)
def test_anything_else_is_refused_by_one_kind_of_error(text, message):
    with pytest.raises(ValueError, match=message):
        strict_json.parse(text)
