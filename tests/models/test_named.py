"""A user's own family, by MODULE:NAME."""

import pytest

from jvdiff import models
from jvdiff.errors import UsageError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere:FAMILY", "which cannot be imported"),
        ("jvdiff.models:FAMILYY", "which cannot be imported"),
        ("jvdiff.models", "which cannot be imported"),
        ("", "which cannot be imported"),
        ("jvdiff.models:FAMILIES", "a tuple; expected a Family"),
    ],
)
def test_a_family_that_is_not_there_is_a_sentence(text, message):
    with pytest.raises(UsageError, match=message):
        models.named(text)


def test_no_name_is_no_family():
    assert models.named(None) is None
