"""The bank's page in a real browser, as a person uses it."""

from __future__ import annotations

import asyncio
import re

import pytest

from tests.examples import browser

MISSING = browser.unavailable()

pytestmark = [
    pytest.mark.drivers("sqlite"),
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]


class Page:
    """What a person does with the page, and sees of it."""

    def __init__(self, chromium):
        self.chromium = chromium

    def find(self, selector):
        return self.chromium.find_element("css selector", selector)

    def text(self, selector):
        return self.find(selector).text

    def until(self, selector, *words):
        """Wait until an element shows all these words, and return what it shows."""
        from selenium.webdriver.support.ui import WebDriverWait  # noqa: PLC0415  # where it is installed

        seen = WebDriverWait(self.chromium, 15, poll_frequency=0.05)
        seen.until(lambda _: all(word in self.text(selector) for word in words), f"{selector} never showed {words}")
        return self.text(selector)

    def open(self, address):
        self.chromium.get(address)
        self.until("#live", "live")
        self.until("#total", "4, holding")

    def write(self, selector, words):
        field = self.find(selector)
        field.clear()
        field.send_keys(words)

    def edit(self, number, owner):
        """Open the editor, and write another name, without saving it."""
        self.find(f"#account-{number} button").click()
        self.until("#seen", "You see version")
        self.write("#edit [name=owner]", owner)

    def complaints(self):
        """Return what the browser's console has, but for answers of 409 and 412, which it lists as errors."""
        told = re.compile("status of (409|412)")
        return [line for line in self.chromium.get_log("browser") if not told.search(line["message"])]


async def visit(bank, folder, visitor):
    """Have a visitor use the page, in a thread: selenium waits."""

    def use():
        with browser.opened(folder) as chromium:
            page = Page(chromium)
            page.open(bank.address)
            visitor(page)
            assert page.complaints() == []

    await asyncio.to_thread(use)


async def test_a_person_transfers_money(bank, db, tmp_path):
    """The form moves money; balances, total and ledger are shown live, and a refusal is told in words."""

    def visitor(page):
        page.write("#transfer [name=amount]", "12.34")
        page.write("#transfer [name=reference]", "<b>tea</b>")
        page.find("#transfer button").click()
        page.until("#said", "Done: 12.34 to Alan.")
        page.until("#account-1 .balance", "187.66")
        page.until("#account-2 .balance", "212.34")
        assert page.text("#total") == "4, holding 800.00 in all"
        assert page.until("#ledger", "12.34").split("\n")[0] == "Ada → Alan: <b>tea</b>"
        page.write("#transfer [name=amount]", "1000")
        page.find("#transfer button").click()
        page.until("#said", "account 1 has too little for that")

    await visit(bank, tmp_path, visitor)
    assert await db.rows("SELECT balance FROM sqla_uow_bank_account ORDER BY id") == [
        (187_66,), (212_34,), (200_00,), (200_00,)
    ]  # fmt: skip


async def test_a_person_whose_answer_is_lost(bank, db, tmp_path):
    """The page sends the transfer again with the same key, and the money moves once."""

    def visitor(page):
        page.write("#transfer [name=amount]", "12.34")
        page.find("#transfer [name=lose]").click()
        page.find("#transfer button").click()
        page.until("#said", "Done: 12.34 to Alan. The answer was lost, so this is it again.")
        page.until("#account-1 .balance", "187.66")

    await visit(bank, tmp_path, visitor)
    assert await db.rows("SELECT source, amount FROM sqla_uow_bank_entry WHERE source IS NOT NULL") == [(1, 12_34)]


async def test_what_others_do_is_shown_live(bank, tmp_path):
    """W5: a commit of somebody else appears without a reload; so does an account that is opened."""
    loop = asyncio.get_running_loop()

    def request(path, **content):
        asyncio.run_coroutine_threadsafe(bank.client.post(path, json=content), loop).result(10)

    def visitor(page):
        request("/accounts/3/deposits", amount=50_00)
        page.until("#account-3 .balance", "250.00")
        request("/accounts", owner="Zuse")
        page.until("#account-5 .owner", "Zuse")
        assert page.text("#total") == "5, holding 850.00 in all"

    await visit(bank, tmp_path, visitor)


async def test_the_second_of_two_tabs_is_told_in_words(bank, db, tmp_path):
    """W7: two tabs edit one account; the second is told who was first, what changed, and that nothing was saved."""

    def visitor(page):
        first = page.chromium.current_window_handle
        page.edit(1, "Ada Lovelace")
        page.chromium.switch_to.new_window("tab")
        page.open(bank.address)
        page.edit(1, "Ada King")
        page.find("#save").click()
        page.until("#account-1 .owner", "Ada King")

        page.chromium.switch_to.window(first)
        page.find("#save").click()
        words = page.until("#conflict", "Somebody else was first. Your change was not saved.", "version 2")
        assert "the owner is “Ada King” now, no longer “Ada”" in words
        assert page.find("#save").get_attribute("disabled") == "true"
        page.find("#mine").click()
        page.until("#account-1 .owner", "Ada Lovelace")

    await visit(bank, tmp_path, visitor)
    assert await db.rows("SELECT owner, version FROM sqla_uow_bank_account WHERE id = 1") == [("Ada Lovelace", 3)]


async def test_the_second_tab_can_take_what_the_first_saved(bank, db, tmp_path):
    """After a 412 a person may look at the other's version, and go on from there."""

    async def somebody_else():
        _, tag = await bank.account(1)
        await bank.client.put("/accounts/1", json={"owner": "Ada King", "credit": 7}, headers={"if-match": tag})

    loop = asyncio.get_running_loop()

    def visitor(page):
        page.edit(1, "Mine")
        asyncio.run_coroutine_threadsafe(somebody_else(), loop).result(10)
        page.find("#save").click()
        page.until("#conflict", "Somebody else was first")
        page.find("#theirs").click()
        page.until("#seen", "You see version 2")
        assert page.find("#edit [name=owner]").get_property("value") == "Ada King"
        page.write("#edit [name=owner]", "Ada K.")
        page.find("#save").click()
        page.until("#account-1 .owner", "Ada K.")

    await visit(bank, tmp_path, visitor)
    assert await db.rows("SELECT owner, credit, version FROM sqla_uow_bank_account WHERE id = 1") == [("Ada K.", 7, 3)]
