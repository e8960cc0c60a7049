// The page of the bank: shows what the feed tells, sends what a person asks for.  Plain JavaScript, served as it stands.

const LEDGER_LINES = 10;
const ATTEMPTS = 5;
const accounts = new Map(); // number -> {row, account, timer}
const $ = (id) => document.getElementById(id);
const money = (cents) =>
  (cents / 100).toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
const cents = (text) => Math.round(Number(text) * 100);
const ownerOf = (number) => accounts.get(number)?.account.owner ?? `account ${number}`;

// ---- what the feed tells

function listen() {
  const feed = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/feed`);
  feed.onopen = () => showLive(true);
  feed.onmessage = ({ data }) => {
    const news = JSON.parse(data);
    news.accounts.forEach(showAccount);
    news.entries.forEach(showEntry);
    showTotal();
  };
  feed.onclose = () => {
    showLive(false);
    setTimeout(listen, 1000); // the first message of the next feed tells everything again
  };
}

function showLive(on) {
  $("live").className = on ? "on" : "";
  $("live").textContent = on ? "live" : "not connected";
}

function showAccount(account) {
  const shown = accounts.get(account.id) ?? newRow(account);
  const before = shown.account;
  if (account.version < before.version) return; // an answer that was overtaken by the feed
  shown.account = account;
  const { row, options } = shown;
  row.querySelector(".owner").textContent = row.title = account.owner;
  row.querySelector(".balance").textContent = money(account.balance);
  row.querySelector(".about").textContent =
    `no. ${account.id} · version ${account.version}` + (account.credit ? ` · credit ${money(account.credit)}` : "");
  for (const option of options) option.textContent = `${account.owner} (${account.id})`;
  if (account.balance !== before.balance) flash(shown, account.balance > before.balance ? "more" : "less");
}

function newRow(account) {
  const row = document.createElement("li");
  row.id = `account-${account.id}`;
  for (const [tag, name] of [["span", "owner"], ["span", "balance"], ["button", "edit"], ["span", "about"]]) {
    row.append(Object.assign(document.createElement(tag), { className: name }));
  }
  row.querySelector("button").textContent = "Edit";
  row.querySelector("button").onclick = () => openEditor(account.id);
  const options = ["source", "target"].map((name) => {
    const option = new Option("", account.id);
    $("transfer").elements[name].append(option);
    return option;
  });
  const shown = { row, account, options, timer: 0 };
  accounts.set(account.id, shown);
  $("accounts").append(row);
  if (accounts.size === 2) $("transfer").elements.target.selectedIndex = 1;
  return shown;
}

function flash(shown, how) {
  shown.row.classList.remove("more", "less");
  shown.row.classList.add(how);
  clearTimeout(shown.timer);
  shown.timer = setTimeout(() => shown.row.classList.remove(how), 700);
}

function showEntry(entry) {
  const line = document.createElement("li");
  const from = entry.source === null ? "paid in" : ownerOf(entry.source);
  const who = Object.assign(document.createElement("span"), { className: "who" });
  who.textContent = who.title = `${from} → ${ownerOf(entry.target)}${entry.reference ? ": " + entry.reference : ""}`;
  const sum = Object.assign(document.createElement("span"), { className: "sum", textContent: money(entry.amount) });
  line.append(who, sum);
  $("ledger").prepend(line);
  while ($("ledger").children.length > LEDGER_LINES) $("ledger").lastChild.remove();
  $("quiet").hidden = true;
}

function showTotal() {
  let total = 0;
  for (const { account } of accounts.values()) total += account.balance;
  $("total").textContent = `${accounts.size}, holding ${money(total)} in all`;
}

// ---- what a person asks for

async function ask(method, path, content, headers = {}) {
  try {
    const body = content && JSON.stringify(content);
    const answer = await fetch(path, { method, body, headers: { "content-type": "application/json", ...headers } });
    const said = await answer.json().catch(() => ({ detail: `the server answered ${answer.status}` }));
    const again = answer.headers.has("retry-after");
    const replayed = answer.headers.has("idempotent-replayed");
    return { ok: answer.ok, status: answer.status, etag: answer.headers.get("etag"), again, replayed, said };
  } catch {
    return { ok: false, status: 0, again: true, said: { detail: "the server does not answer; it is not known what it has done" } };
  }
}

function say(where, words, good) {
  where.textContent = words;
  where.className = good ? "" : "bad";
}

$("transfer").onsubmit = async (event) => {
  event.preventDefault();
  const { source, target, amount, reference, lose } = event.target.elements;
  const button = event.target.querySelector("button");
  button.disabled = true;
  const order = {
    source: Number(source.value),
    target: Number(target.value),
    amount: cents(amount.value),
    reference: reference.value,
  };
  const { ok, replayed, said } = await once("/transfers", order, lose.checked);
  button.disabled = false;
  const done = () => `Done: ${money(said.amount)} to ${ownerOf(said.target)}.`;
  say($("said"), (ok ? done() : said.detail) + (replayed ? " The answer was lost, so this is it again." : ""), ok);
};

// Sends a wish until there is an answer, each time with the same key: so it is carried out once.
async function once(path, content, lose) {
  const headers = { "idempotency-key": crypto.randomUUID() };
  if (lose) await ask("POST", path, content, headers); // and look away, as a network that breaks does
  for (let attempt = 1; ; attempt++) {
    const answer = await ask("POST", path, content, headers);
    if (!answer.again || attempt === ATTEMPTS) return answer;
    await new Promise((done) => setTimeout(done, 1000));
  }
}

// ---- the editor: it keeps the etag of what it shows, and sends it back with If-Match

let seen; // {account, etag}: what this person has before them

async function openEditor(number) {
  const { ok, etag, said } = await ask("GET", `/accounts/${number}`);
  if (!ok) return say($("said"), said.detail, false);
  show({ account: said, etag });
  if (!$("editor").open) $("editor").showModal();
}

function show(now) {
  seen = now;
  const { owner, credit } = $("edit").elements;
  owner.value = now.account.owner;
  credit.value = (now.account.credit / 100).toFixed(2);
  showSeen();
}

function showSeen() {
  $("editor-title").textContent = `Edit account ${seen.account.id}`;
  $("seen").textContent = `You see version ${seen.account.version}, with ${money(seen.account.balance)} on it.`;
  $("conflict").hidden = true;
  $("save").disabled = false;
  say($("edit-said"), "", true);
}

$("edit").onsubmit = async (event) => {
  event.preventDefault();
  const { owner, credit } = event.target.elements;
  const path = `/accounts/${seen.account.id}`;
  const wish = { owner: owner.value, credit: cents(credit.value) };
  $("save").disabled = true;
  const { ok, status, said } = await ask("PUT", path, wish, { "if-match": seen.etag });
  $("save").disabled = false;
  if (status === 412) return showConflict(await ask("GET", path));
  if (!ok) return say($("edit-said"), said.detail, false);
  showAccount(said);
  showTotal();
  $("editor").close();
};

function showConflict({ ok, etag, said }) {
  if (!ok) return say($("edit-said"), said.detail, false);
  const now = { account: said, etag };
  $("conflict-words").textContent = inWords(seen.account, said);
  $("conflict").hidden = false;
  $("save").disabled = true;
  $("theirs").onclick = () => show(now);
  $("mine").onclick = () => {
    seen = now; // now this person has seen theirs, and decides against it
    showSeen();
    $("edit").requestSubmit();
  };
}

function inWords(before, now) {
  const changes = [];
  if (now.owner !== before.owner) changes.push(`the owner is “${now.owner}” now, no longer “${before.owner}”`);
  if (now.credit !== before.credit) changes.push(`the credit is ${money(now.credit)}, no longer ${money(before.credit)}`);
  if (now.balance !== before.balance) changes.push(`the balance is ${money(now.balance)}, no longer ${money(before.balance)}`);
  return `While you were editing version ${before.version}, it became version ${now.version}: ` +
    `${changes.join("; ") || "it was changed, and changed back"}.`;
}

$("cancel").onclick = () => $("editor").close();

listen();
