// ---- The page: lists, fields and keys, and what they do.

const LARGEST_FILE = 256; // KiB
const $ = id => document.getElementById(id);
const composing = event => event.isComposing || event.keyCode === 229; // Enter chooses a word of an input method

let store, answers, chat = null; // the chat that is shown; one that is not kept yet has no messages
let leaf = null, files = [], filling = 0;
const views = new Map();

const settingsUsed = () => JSON.parse(localStorage.getItem("settings") ?? "{}");

// -- what is said about the server

let banner = null; // {words: () => text, go: words of the button, action}

function showBanner(next) {
  banner = next;
  $("banner").hidden = !next;
  if (!next) return;
  setText($("banner-text"), next.words());
  $("banner-go").hidden = !next.go;
  if (next.go) setText($("banner-go"), say(next.go));
}

/** A sentence that goes away; action: what its button does. */
function toast(words, action = null) {
  setText($("toast-text"), words);
  $("toast-go").hidden = !action;
  $("toast-go").onclick = () => { $("toast").hidden = true; action(); };
  $("toast").hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => { $("toast").hidden = true; }, 8000);
}

/** Asks the server what it is, until it says so. */
async function learn() {
  for (let tries = 0; ; tries++) {
    try {
      await server.learn();
      showBanner(null);
      return drawServer();
    } catch (error) {
      if (error.kind === "key") { await askKey(); tries = -1; continue; }
      const passes = ["gone", "stopping", "busy"].includes(error.kind);
      await countdown(Math.min(2 ** tries, 15), left => passes ? say(error.kind, left) : say("problem", error.message));
    }
  }
}

async function countdown(seconds, words) {
  let now = false;
  for (let left = seconds; left > 0 && !now; left--) {
    await new Promise(resolve => {
      showBanner({ words: () => words(left), go: "tryNow", action: () => { now = true; resolve(); } });
      setTimeout(resolve, 1000);
    });
  }
}

/** Asks for the key -> when there is one to try. Who closes the question can come back to it. */
let asking = null;
function askKey() {
  asking ??= new Promise(resolve => {
    const ask = () => {
      $("key-why").textContent = say(key.get() ? "keyWrong" : "keyMissing");
      $("key-value").value = "";
      if (!$("key").open) $("key").showModal();
    };
    $("key").onclose = () => {
      if ($("key").returnValue !== "use") return showBanner({ words: () => say("needsKey"), go: "enterKey", action: ask });
      key.set($("key-value").value.trim());
      showBanner(null);
      asking = null;
      resolve();
      if (!server.info) learn();
    };
    ask();
  });
  return asking;
}

function drawServer() {
  const { info } = server;
  if (!info) return;
  const dtype = String(info.dtype).replace("torch.", "");
  $("about").replaceChildren(make("b", {}, info.model), ` · ${info.device} · ${dtype} · ${info.kernels}`);
  $("about").title = say("aboutModel");
  $("about").hidden = false;
  const local = /^(localhost|127\.|\[::1\])/.test(location.hostname);
  $("hello-model").textContent = info.built_in ? say("toy", info.model) : local ? say("talkTo", info.model) : say("talkToRemote", info.model, location.host);
  const ideas = WORDS[language][info.built_in ? "toyIdeas" : "ideas"];
  $("ideas").replaceChildren(...ideas.map(idea => make("button", { type: "button", className: "small", onclick: () => write(idea) }, idea)));
  const facts = { model: info.model, device: info.device, dtype, kernels: info.kernels, window: say("tokens", count(info.max_model_len)), version_: `qwenrt ${info.version}` };
  $("facts").replaceChildren(...Object.entries(facts).flatMap(([name, fact]) => [make("dt", {}, say(name)), make("dd", {}, String(fact))]));
  for (const field of SAMPLING) $(field).placeholder = info.sampling?.[field] ?? "";
  drawSettings();
  drawContext();
}

// -- the list of chats

async function drawList() {
  const chats = (await store.all("chats")).sort((a, b) => b.updated - a.updated), wanted = $("search").value.trim().toLowerCase();
  const busy = new Set([...answers.live.values()].map(live => live.message.chat));
  const shown = chats.filter(one => one.title.toLowerCase().includes(wanted));
  if ($("list").querySelector("input")) return; // somebody writes a name
  $("list").replaceChildren(...shown.map(one => {
    const title = one.title || say("untitled"), here = one.id === chat?.id;
    const open = make("button", { type: "button", className: "open", title, lang: languageOf(title), onclick: () => openChat(one.id) }, title);
    if (here) open.setAttribute("aria-current", "page");
    const item = make("li", { className: (here ? "here " : "") + (busy.has(one.id) ? "busy" : "") }, open);
    for (const [name, action] of [["rename", () => rename(item, one)], ["remove", () => removeChat(one)]]) {
      const tool = iconButton(name === "rename" ? "edit" : name, name, action);
      tool.ariaLabel += `: ${title}`;
      item.append(tool);
    }
    return item;
  }));
  $("no-chats").hidden = shown.length > 0;
}

function rename(item, one) {
  const field = make("input", { value: one.title, ariaLabel: say("name"), maxLength: 200 });
  const end = async keep => {
    field.onblur = null;
    field.remove();
    if (keep && field.value.trim()) await changeChat(one.id, record => ({ ...record, title: field.value.trim() }));
    drawList();
  };
  field.onblur = () => end(true);
  field.onkeydown = event => {
    if (event.key === "Enter" && !composing(event)) end(true);
    if (event.key === "Escape") { event.stopPropagation(); end(false); }
  };
  item.replaceChildren(field);
  field.select();
}

async function changeChat(id, change) {
  const record = await store.change("chats", id, old => old && change(old));
  if (record && chat?.id === id) { chat.record = record; drawTitle(); }
  store.tell(id);
  return record;
}

async function removeChat(one) {
  for (const live of answers.live.values()) if (live.message.chat === one.id) answers.stop(live.message);
  const { messages, ...record } = await store.remove(one.id);
  if (chat?.id === one.id) newChat();
  drawList();
  toast(say("removed", one.title || say("untitled")), async () => {
    await store.change("chats", record.id, () => record);
    for (const message of messages) await store.change("messages", message.id, () => message);
    openChat(record.id);
  });
}

function newChat() {
  showChat(new Chat(blankChat(settingsUsed()), []));
  history.replaceState(null, "", location.pathname);
  $("prompt").focus();
}

async function openChat(id) {
  const [record, messages] = [(await store.all("chats")).find(one => one.id === id), await store.messages("chat", id)];
  if (!record) return newChat();
  showChat(new Chat(record, messages.map(message => answers.of(message)?.message ?? message)));
  history.replaceState(null, "", `#${id}`);
  for (const live of answers.live.values()) if (live.message.chat === id) live.chat = chat;
  if (matchMedia("(min-width: 761px)").matches) $("prompt").focus();
}

function showChat(next) {
  chat = next;
  leaf = next.messages.has(next.record.leaf) ? next.record.leaf : next.newest(null);
  for (const view of views.values()) view.node.remove();
  views.clear();
  showSide(false);
  $("prompt").value = sessionStorage.getItem(`draft ${chat.id}`) ?? "";
  fit();
  pinned = true;
  drawPath();
  drawTitle();
  drawSettings();
  drawList();
}

function drawTitle() {
  setText($("title"), chat.record.title || say("untitled"));
  $("title").lang = languageOf(chat.record.title);
  document.title = chat.record.title ? `${chat.record.title} · qwenrt` : "qwenrt";
}

// -- the messages

/** Shows the messages from the first to the leaf; those that are there already stay as they are. */
function drawPath() {
  const path = chat.path(leaf), ids = new Set(path.map(message => message.id));
  for (const [id, view] of views) if (!ids.has(id)) { view.node.remove(); views.delete(id); }
  const fresh = [];
  path.forEach((message, place) => {
    let view = views.get(message.id);
    if (!view) {
      view = new MessageView(chat, message, actions);
      views.set(message.id, view);
      fresh.push(view);
    }
    view.draw(answers.of(message));
    if ($("thread").children[place] !== view.node) $("thread").insertBefore(view.node, $("thread").children[place] ?? null);
  });
  $("thread").querySelector(".divider")?.remove();
  const from = views.get(chat.record.from);
  if (from) from.node.before(make("p", { className: "divider quiet" }, say("notSent")));
  $("thread").classList.toggle("far", path.length > 30);
  $("hello").hidden = path.length > 0;
  fill(fresh, ++filling);
  drawButtons();
}

/** Writes texts into new views from the last to the first, a few milliseconds at a time. */
function fill(fresh, turn) {
  const until = performance.now() + 12;
  while (fresh.length && turn === filling) {
    while (!fresh.at(-1).grow(8000)) if (performance.now() > until) break;
    if (fresh.at(-1).grow(0)) fresh.pop();
    if (performance.now() > until) break;
  }
  keepEnd();
  if (fresh.length && turn === filling) setTimeout(fill, 0, fresh, turn);
}

const dirty = new Map(); // messages that have changed since the last frame
function changed(message, live) {
  if (message.chat !== chat?.id) return void (message.state === "running" || drawList());
  if (!dirty.size) (document.hidden ? setTimeout : requestAnimationFrame)(drawChanged);
  dirty.set(message, live);
}

function drawChanged() {
  for (const [message, live] of dirty) {
    const view = views.get(message.id);
    if (view?.message === message) { view.grow(); view.draw(live); }
    if (message.state !== "running") { drawList(); if (answers.full) toast(say("noRoom")); }
  }
  dirty.clear();
  drawButtons();
  keepEnd();
}

function drawButtons() {
  const running = runningHere();
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("send").disabled = !$("prompt").value.trim() && !files.length;
  drawContext();
}

function drawContext() {
  const usage = chat?.path(leaf).findLast(message => message.usage)?.usage, most = server.info?.max_model_len;
  setText($("context"), usage && most ? say("context", count(usage.prompt + usage.written), count(most)) : "");
}

const runningHere = () => chat.path(leaf).find(message => answers.of(message));

// -- the end stays in sight while it grows, unless somebody scrolls away from it

let pinned = true;
function keepEnd() {
  if (pinned) $("scroll").scrollTop = $("scroll").scrollHeight;
}
function scrolled() {
  const { scrollTop, scrollHeight, clientHeight } = $("scroll");
  pinned = scrollHeight - scrollTop - clientHeight < 60;
  $("to-end").hidden = pinned;
}

// -- what a person does

async function goTo(id) {
  leaf = id;
  drawPath();
  await changeChat(chat.id, record => ({ ...record, leaf: id, updated: Date.now() }));
}

/** Begins an answer to a message. */
async function answerTo(parent) {
  const message = blankMessage(chat, parent, "assistant");
  message.created = Date.now() + 1; // after what it answers
  chat.messages.set(message.id, message);
  const running = answers.begin(chat, message);
  pinned = true;
  await goTo(message.id);
  drawList();
  return running;
}

async function write(text, parent = leaf, attached = []) {
  const message = Object.assign(blankMessage(chat, parent, "user"), { text, files: attached });
  const first = chat.record.title === "";
  if (first) chat.record.title = (text || attached[0].name).trim().split("\n")[0].slice(0, 80);
  await store.change("chats", chat.id, old => old ?? chat.record);
  await store.change("messages", message.id, () => message);
  if (first) { history.replaceState(null, "", `#${chat.id}`); drawTitle(); }
  chat.messages.set(message.id, message);
  $("prompt").focus();
  await answerTo(message.id);
}

function send() {
  const text = $("prompt").value.trim();
  if ((!text && !files.length) || runningHere()) return;
  const attached = files;
  files = [];
  $("prompt").value = "";
  keepDraft();
  fit();
  drawFiles();
  write(text, leaf, attached);
}

const actions = {
  show(message, direction) {
    goTo(chat.newest(message.id)).then(() => {
      const steps = [...views.get(message.id).node.querySelectorAll(".branches button:enabled")];
      steps.at(direction === "before" ? 0 : -1)?.focus();
    });
  },
  again(message) { $("prompt").focus(); answerTo(message.parent); },
  goOn(message) { $("prompt").focus(); answers.begin(chat, message); drawPath(); },
  edited(message, text) { write(text, message.parent, message.files); },
  answerNow(live) { server.answerNow(live.id); },
  enterKey() { $("banner-go").click(); },
  tooLong(message, problem) {
    const [most, size] = problem.message.match(/\d+/g).map(Number);
    const path = chat.path(message.parent), first = Math.max(0, path.findIndex(one => one.id === chat.record.from));
    const alone = path.slice(first).filter(one => one.role === "user").length < 2;
    if (alone) return [say("fullAlone", count(size), count(most))];
    const parts = [say("full", count(size), count(most)), button("leaveOut", () => leaveOut(message, most))];
    return [...parts, button("newChat", newChat)];
  },
};

/** Sends no more of the beginning than fits with room for an answer, and asks again. */
async function leaveOut(message, most) {
  const asked = chat.path(message.parent).filter(one => one.role === "user"), room = most - Math.min(1024, most / 4);
  const probe = { ...blankMessage(chat, message.parent, "assistant") };
  let low = Math.max(0, asked.findIndex(one => one.id === chat.record.from)) + 1, high = asked.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1, trial = { record: { ...chat.record, from: asked[middle].id }, path: id => chat.path(id) };
    if (await server.size(requestOf(trial, probe)) <= room) high = middle;
    else low = middle + 1;
  }
  await changeChat(chat.id, record => ({ ...record, from: asked[low].id }));
  actions.goOn(message);
}

// -- the field to write in

function fit() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight}px`;
}

function keepDraft() {
  sessionStorage.setItem(`draft ${chat.id}`, $("prompt").value);
  drawButtons();
}

async function attach(list) {
  for (const file of list) {
    const content = file.size > LARGEST_FILE * 1024 ? null : await file.text();
    if (content === null) toast(say("tooLarge", file.name, LARGEST_FILE));
    else if (/[\0\ufffd]/.test(content)) toast(say("notText", file.name));
    else files.push({ name: file.name, text: content });
  }
  drawFiles();
}

function drawFiles() {
  $("files").hidden = !files.length;
  $("files").replaceChildren(...files.map(file => {
    const remove = iconButton("close", "remove", () => { files = files.filter(other => other !== file); drawFiles(); $("prompt").focus(); });
    remove.ariaLabel = say("removeFile", file.name);
    return make("li", {}, file.name, remove);
  }));
  drawButtons();
}

// -- settings

function drawSettings() {
  if (!chat) return;
  const { settings, system } = chat.record;
  $("system").value = system;
  for (const field of SAMPLING) $(field).value = settings[field] ?? "";
  $("think").hidden = server.info?.thinking !== "optional";
  $("think").setAttribute("aria-pressed", settings.thinking ?? true);
}

function setSettings(change) {
  chat.record = change({ ...chat.record });
  changeChat(chat.id, change);
  localStorage.setItem("settings", JSON.stringify(chat.record.settings));
  drawSettings();
}

const setSetting = (name, value) => setSettings(record => ({ ...record, settings: { ...record.settings, [name]: value } }));

function setTheme(theme) {
  document.documentElement.classList.toggle("dark", theme === "dark");
  $("theme").replaceChildren(icon(theme === "dark" ? "sun" : "moon"));
  $("theme").dataset.label = theme === "dark" ? "light" : "dark";
  translate();
}

function setLanguage(next) {
  localStorage.setItem("language", language = next);
  setText($("language"), next === "zh" ? "En" : "中");
  translate();
  for (const view of views.values()) view.node.remove();
  views.clear();
  drawServer();
  if (chat) { drawPath(); drawTitle(); drawList(); }
  if (banner) showBanner(banner);
}

function showSide(shown) {
  $("side").classList.toggle("shown", shown);
  $("veil").hidden = !shown;
  if (shown) $("close-side").focus(); // which is there on narrow screens alone
}

// -- files of chats

async function exportChats() {
  const file = await store.exported(), url = URL.createObjectURL(new Blob([JSON.stringify(file, null, 1)], { type: "application/json" }));
  make("a", { href: url, download: `qwenrt-chats-${file.exported.slice(0, 10)}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
  toast(say("exported", count(file.chats.length)));
}

async function importChats(file) {
  try {
    const added = await store.imported(JSON.parse(await file.text()));
    toast(say("imported", count(added.chats), count(added.messages)));
    $("settings").close();
  } catch {
    toast(say("notAFile", file.name));
  }
  drawList();
}

// -- what another tab did

async function otherTab({ chat: id, gone }) {
  drawList();
  if (id !== chat?.id) return;
  if (gone) { toast(say("elsewhere")); return newChat(); }
  const before = leaf, messages = await store.messages("chat", id);
  if (id !== chat.id) return;
  for (const message of messages) {
    const known = chat.messages.get(message.id);
    if (!known) chat.messages.set(message.id, message);
    else if (!answers.of(known) && known.state === "running") Object.assign(known, message);
    if (message.state === "running") answers.follow(chat, chat.messages.get(message.id));
  }
  if (!runningHere() && !$("prompt").value.trim()) leaf = chat.newest(before); // who writes stays where they are
  drawPath();
}

// -- keys of the keyboard, and all that is clicked

function shortcut(event) {
  const letter = event.key.toLowerCase(), control = event.ctrlKey || event.metaKey;
  if (control && event.shiftKey && (letter === "n" || letter === "o")) newChat();
  else if (control && !event.shiftKey && letter === "k") { showSide(true); $("search").select(); }
  else if (event.key === "Escape" && !document.querySelector("dialog[open]") && !composing(event)) {
    if ($("side").classList.contains("shown")) { showSide(false); $("open-side").focus(); }
    else if (runningHere()) answers.stop(runningHere());
    return;
  } else return;
  event.preventDefault();
}

function listen() {
  const clicks = {
    new: newChat, "open-side": () => showSide(true), "close-side": () => { showSide(false); $("open-side").focus(); }, veil: () => showSide(false),
    "open-settings": () => { showSide(false); $("settings").showModal(); }, about: () => $("settings").showModal(),
    theme: () => { const next = document.documentElement.classList.contains("dark") ? "light" : "dark"; localStorage.setItem("theme", next); setTheme(next); },
    language: () => setLanguage(language === "zh" ? "en" : "zh"), export: exportChats, import: () => $("pick-import").click(),
    "set-key": () => { $("settings").close(); askKey(); }, attach: () => $("pick-files").click(),
    think: () => setSetting("thinking", !(chat.record.settings.thinking ?? true)), stop: () => { answers.stop(runningHere()); $("prompt").focus(); },
    "to-end": () => { pinned = true; keepEnd(); }, "banner-go": () => banner.action(),
  };
  for (const [id, action] of Object.entries(clicks)) $(id).onclick = action;
  for (const node of document.querySelectorAll("[data-icon]")) node.prepend(icon(node.dataset.icon));
  for (const field of SAMPLING) {
    $(field).onchange = event => { if (event.target.reportValidity()) setSetting(field, event.target.value === "" ? undefined : Number(event.target.value)); };
  }
  $("system").onchange = event => setSettings(record => ({ ...record, system: event.target.value }));
  $("search").oninput = drawList;
  $("pick-files").onchange = event => { attach([...event.target.files]); event.target.value = ""; };
  $("pick-import").onchange = event => { importChats(event.target.files[0]); event.target.value = ""; };
  $("composer").onsubmit = event => { event.preventDefault(); send(); };
  $("prompt").oninput = () => { fit(); keepDraft(); };
  $("prompt").onkeydown = event => { if (event.key === "Enter" && !event.shiftKey && !composing(event)) { event.preventDefault(); send(); } };
  $("prompt").onpaste = event => { if (event.clipboardData.files.length) { event.preventDefault(); attach([...event.clipboardData.files]); } };
  $("scroll").onscroll = scrolled;
  document.onkeydown = shortcut;
  document.ondragover = event => { event.preventDefault(); $("composer").querySelector(".box").classList.add("drop"); };
  document.ondragleave = document.ondrop = event => {
    event.preventDefault();
    $("composer").querySelector(".box").classList.remove("drop");
    if (event.type === "drop" && event.dataTransfer.files.length) attach([...event.dataTransfer.files]);
  };
  $("settings").onclick = event => { if (event.target === $("settings")) $("settings").close(); };
  new ResizeObserver(keepEnd).observe($("scroll"));
}

async function start() {
  const dark = matchMedia("(prefers-color-scheme: dark)"), theme = () => localStorage.getItem("theme") ?? (dark.matches ? "dark" : "light");
  listen();
  setTheme(theme());
  setLanguage(language);
  dark.onchange = () => setTheme(theme());
  store = await openStore();
  answers = new Answers(store, changed, askKey);
  store.listen(otherTab, id => answers.live.get(id)?.mine);
  if (!store.keeps) toast(say("notKept"));
  learn();
  if (location.hash) await openChat(location.hash.slice(1));
  else newChat();
  for (const message of await store.messages("state", "running")) {
    const own = chat.messages.get(message.id);
    const [record] = own ? [chat.record] : (await store.all("chats")).filter(one => one.id === message.chat);
    if (record) answers.resume(own ? chat : new Chat(record, await store.messages("chat", record.id)), own ?? message);
  }
}

start();
