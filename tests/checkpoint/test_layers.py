"""Layer selections: what they select, and what is said of those that cannot."""

import pytest

from elo.checkpoint.layers import parse_layers
from elo.errors import EloError


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("first:1,last:1", (0, 11)),
        ("first:2,last:2", (0, 1, 10, 11)),
        ("0,1,-1", (0, 1, 11)),
        ("0-3", (0, 1, 2, 3)),
        (" 0 , 5-6 ,-1", (0, 5, 6, 11)),
        ("last:1", (11,)),
        ([0, -1], (0, 11)),
        (3, (3,)),
        ("-12", (0,)),
    ],
)
def test_selects(selection, expected):
    assert parse_layers(selection, 12) == expected


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        ("12", "names layer 12, but the model has 12 decoder layers"),
        ("-13", "names layer -13"),
        ("first:0", "asks for 0 layers"),
        ("first:13", "asks for 13 layers"),
        ("first:7,last:7", "twice"),
        ("0,-12", "selects layer 0 twice"),
        ("5-2", "runs backwards; write 2-5"),
        ("", "cannot read ''"),
        ("0,,1", "cannot read ''"),
        ("first", "cannot read 'first'"),
        ("0:2", "cannot read '0:2'"),
        ("0-99", "names layer 99"),
        ("1.5", "cannot read '1.5'"),
        ("0-11", "selects all 12 layers"),
        ([], "selects no layer"),
    ],
)
def test_refuses(selection, said):
    with pytest.raises(EloError, match="layers: ") as error:
        parse_layers(selection, 12)
    assert said in str(error.value)
