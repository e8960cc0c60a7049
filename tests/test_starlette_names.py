"""Until it is written, sqla_uow_starlette says what it will hold."""

import importlib
import re

import pytest

import sqla_uow_starlette

PLANNED = ["UnitOfWorkMiddleware", "dispose_on_shutdown"]


@pytest.mark.parametrize("name", PLANNED)
def test_a_planned_name_says_so_and_what_to_do(name):
    """The docstring promises the name, and using it gives the fact and the remedy."""
    assert f"`{name}`" in (sqla_uow_starlette.__doc__ or "")
    with pytest.raises(AttributeError) as caught:
        getattr(sqla_uow_starlette, name)
    assert str(caught.value) == (
        f"sqla_uow_starlette.{name} is not written yet; until it is, open manager.scope() in your own middleware"
    )
    assert caught.value.name == name


def test_another_name_is_missing_as_usual():
    """A typing error is not taken for a plan."""
    with pytest.raises(
        AttributeError,
        match="^" + re.escape("module 'sqla_uow_starlette' has no attribute 'UnitOfWorkMidleware'") + "$",
    ):
        importlib.import_module("sqla_uow_starlette").UnitOfWorkMidleware  # noqa: B018  # looking is the point
