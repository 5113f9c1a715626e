"""A missing library is named with a command that installs it."""

import importlib.metadata
import sys

import pytest

from anyquant.core.errors import MissingExtraError
from anyquant.core.extras import EXTRAS, require


def test_every_extra_that_a_message_names_exists() -> None:
    offered = importlib.metadata.metadata("anyquant").get_all("Provides-Extra") or []
    assert set(EXTRAS.values()) <= set(offered)


@pytest.mark.parametrize(
    ("library", "command"),
    [("torch", "pip install 'anyquant[torch]'"), ("numba", "pip install numba")],
)
def test_the_command_for_a_missing_library(library: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match="not installed") as caught:
        require(library)
    assert str(caught.value).endswith(command)
