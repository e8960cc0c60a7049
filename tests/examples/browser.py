"""A headless Chromium of Debian's packages, where there is one."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

PROGRAM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1120,900",
)  # fmt: skip


def unavailable():
    """Return why there is no browser, and how to get one; None where there is."""
    if importlib.util.find_spec("selenium") is None:
        return "selenium is not installed; pip install selenium"
    if not PROGRAM.exists() or not DRIVER.exists():
        return f"{PROGRAM} or {DRIVER} not found; Debian: apt-get install chromium chromium-driver"
    return None


@contextlib.contextmanager
def opened(folder):
    """Start a browser with a profile in `folder`, and stop it at the end."""
    from selenium import webdriver  # noqa: PLC0415  # where it is installed

    options = webdriver.ChromeOptions()
    options.binary_location = str(PROGRAM)
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        yield browser
    finally:
        browser.quit()
