"""The tests judge the wheel, with what it asks for, and not the checkout that they are read from."""

import importlib.metadata
import importlib.util
import os
import re
import sysconfig
from pathlib import Path

import pytest

import sqla_uow
import sqla_uow_starlette
from sqla_uow import errors

CHECKOUT = Path(__file__).parents[1]

expects_wheel = pytest.mark.skipif(
    os.environ.get("SQLA_UOW_EXPECT_INSTALLED") != "1",
    reason="SQLA_UOW_EXPECT_INSTALLED=1 is not set: sqla_uow may be the checkout's",
)
expects_lowest = pytest.mark.skipif(
    os.environ.get("SQLA_UOW_EXPECT_LOWEST") != "1",
    reason="SQLA_UOW_EXPECT_LOWEST=1 is not set: versions are free",
)


@expects_wheel
@pytest.mark.parametrize("package", [sqla_uow, sqla_uow_starlette], ids=lambda package: package.__name__)
def test_packages_come_from_site_packages(package):
    """The tox environments hide the checkout's packages behind the wheel's, which carries the typing marker."""
    site_packages = Path(sysconfig.get_path("purelib"))
    assert Path(package.__file__).parent.parent == site_packages
    assert (site_packages / package.__name__ / "py.typed").is_file()


@expects_wheel
def test_tests_come_from_the_checkout():
    """No dependency's own top-level `tests` comes before ours."""
    spec = importlib.util.find_spec("tests")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    assert Path(next(iter(spec.submodule_search_locations))) == CHECKOUT / "tests"


@expects_lowest
def test_lowest_versions_are_installed():
    """What setup.cfg gives as the oldest version of a dependency is what `tox -e lowest` runs."""
    bounds = {}
    for requirement in importlib.metadata.requires("sqla-uow") or ():
        match = re.match(r"([A-Za-z0-9_-]+)(?:\[\w+\])?\s*[^;]*?>=([\d.]+)", requirement)
        assert match, requirement
        bounds[match[1]] = match[2]
    installed = {name: importlib.metadata.version(name) for name in bounds}

    def release(version):
        return [int(part) for part in version.split(".") if part != "0"]

    assert {name: release(version) for name, version in installed.items()} == {
        name: release(bound) for name, bound in bounds.items()
    }


def test_every_public_name_is_found_when_asked_for():
    """What `sqla_uow` offers is imported when it is asked for, and is what its module has."""
    assert set(sqla_uow.__all__) == {"errors", *sqla_uow._MODULES}
    for name in sqla_uow.__all__:
        assert getattr(sqla_uow, name) is not None
    assert set(sqla_uow.__all__) <= set(dir(sqla_uow))
    with pytest.raises(AttributeError, match=r"^module 'sqla_uow' has no attribute 'transactionl'$"):
        sqla_uow.transactionl  # noqa: B018  # what is raised is the point


def test_the_version_is_that_of_the_metadata():
    """`sqla_uow.__version__` is what pip installed, and is looked up when it is asked for."""
    assert sqla_uow.__version__ == importlib.metadata.version("sqla-uow")
    assert "__version__" not in vars(sqla_uow)


@pytest.mark.drivers("sqlite")
def test_the_module_of_errors_is_an_attribute(driver):
    """Also for who has not imported it."""
    assert sqla_uow.__getattr__("errors") is errors
