// ---- The messages of a chat on the page.

const ICONS = {
  close: "M6 6l12 12M18 6L6 18", plus: "M12 5v14M5 12h14", moon: "M20 14.5A8.5 8.5 0 1 1 9.5 4a7 7 0 0 0 10.5 10.5z",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.5 1.5M17.5 17.5L19 19M19 5l-1.5 1.5M6.5 17.5L5 19",
  sliders: "M4 7h10M18 7h2M4 17h2M10 17h10M16 5v4M8 15v4", menu: "M4 7h16M4 12h16M4 17h16", down: "M12 5v14M6 13l6 6 6-6",
  up: "M12 19V5M6 11l6-6 6 6", stop: "M6 6h12v12H6z", clip: "M20 11l-8.5 8.5a5 5 0 0 1-7-7L13 4a3.3 3.3 0 0 1 4.7 4.7L9.5 17a1.6 1.6 0 0 1-2.3-2.3L15 7",
  bulb: "M9 18h6M10 21h4M12 3a6 6 0 0 0-3.5 10.9c.6.500.9 1.2.900 2.1h5.2c0-.9.300-1.6.900-2.1A6 6 0 0 0 12 3z",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1", check: "M5 13l4.5 4.5L19 7", edit: "M4 20h4L19 9l-4-4L4 16z", again: "M20 11a8 8 0 1 0-2 6M20 5v6h-6",
  goOn: "M5 5l8 7-8 7zM18 5v14", before: "M15 6l-6 6 6 6", after: "M9 6l6 6-6 6", remove: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
};

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), path = document.createElementNS(svg.namespaceURI, "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

function iconButton(name, words, action) {
  return make("button", { type: "button", className: "icon", title: say(words), ariaLabel: say(words), onclick: action }, icon(name));
}

const button = (words, action) => make("button", { type: "button", className: "small", onclick: action }, say(words));

/** Puts a text on the clipboard, and shows on the button that it is there. */
async function copyText(from, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // not in a secure context: a page of another machine without TLS
    const field = make("textarea", { value: text, className: "sr" });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    from.focus();
  }
  from.replaceChildren(icon("check"));
  announce(say("copied"));
  setTimeout(() => from.replaceChildren(icon("copy")), 1500);
}

/** The language of a text by its letters, where they tell. */
function languageOf(text) {
  const part = text.slice(0, 400);
  if (/[\u3040-\u30ff]/.test(part)) return "ja";
  if (/[\uac00-\ud7af]/.test(part)) return "ko";
  if (/[\u4e00-\u9fff]/.test(part)) return "zh";
  return /[a-z]{3}/i.test(part) && language === "zh" ? "en" : "";
}

/** Whole sentences for who listens to the page. */
const said = document.getElementById("said");
function announce(text) {
  const words = text.replace(/[*_`#>|]+/g, " ").trim();
  if (!words) return;
  said.append(make("p", { lang: languageOf(words) }, words));
  while (said.childElementCount > 40) said.firstChild.remove();
}

/** One message. `actions` is what its buttons do. */
class MessageView {
  constructor(chat, message, actions) {
    Object.assign(this, { chat, message, actions, told: message.state === "running" ? message.text.length : Infinity });
    this.node = make("article", { className: `message ${message.role}`, ariaLabel: say(message.role === "user" ? "you" : "assistant") });
    if (message.role === "user") this.drawUser();
    else this.buildAnswer();
  }

  drawUser() {
    this.shape = this.chat.versions(this.message).length;
    const { message } = this, files = message.files.map(file => make("li", {}, file.name));
    const tools = make("div", { className: "tools" }, this.branches(), this.copyButton(), iconButton("edit", "edit", () => this.edit()));
    this.node.replaceChildren(make("div", { className: "body", lang: languageOf(message.text) }, message.text), tools);
    if (files.length) this.node.prepend(make("ul", { className: "chips", ariaLabel: say("attached") }, ...files));
    if (!message.text) this.node.querySelector(".body").remove();
  }

  edit() {
    const field = make("textarea", { value: this.message.text, rows: Math.min(12, this.message.text.split("\n").length + 1), ariaLabel: say("edit") });
    const leave = () => { this.drawUser(); this.node.querySelector(".tools button:last-child").focus(); };
    const send = () => { if (field.value.trim()) this.actions.edited(this.message, field.value); };
    field.onkeydown = event => {
      if (event.key === "Escape") { event.stopPropagation(); leave(); }
      if (event.key === "Enter" && !event.shiftKey && !composing(event)) { event.preventDefault(); send(); }
    };
    const go = button("sendEdited", send);
    go.classList.add("main");
    this.node.replaceChildren(field, make("div", { className: "buttons" }, button("cancel", leave), go));
    field.focus();
  }

  copyButton() {
    const copy = iconButton("copy", "copy", () => copyText(copy, this.views ? this.message.text : wholeText(this.message)));
    return copy;
  }

  branches() {
    const versions = this.chat.versions(this.message), place = versions.indexOf(this.message);
    if (versions.length < 2) return "";
    const step = (name, to) => {
      const go = iconButton(name, name, () => this.actions.show(versions[to], name));
      go.disabled = !versions[to];
      return go;
    };
    const label = say("version", place + 1, versions.length);
    const shown = make("span", {}, make("span", { ariaHidden: "true" }, `${place + 1}/${versions.length}`), make("span", { className: "sr" }, label));
    return make("span", { className: "branches" }, step("before", place - 1), shown, step("after", place + 1));
  }

  // -- answers

  buildAnswer() {
    this.thought = make("details", { className: "thought", hidden: true }, make("summary"), make("div", { className: "text" }));
    this.body = make("div", { className: "text" });
    this.note = make("div", { className: "note", hidden: true });
    this.tools = make("div", { className: "tools" });
    this.node.append(this.thought, this.body, this.note, this.tools);
    this.views = [new MarkdownView(this.thought.lastChild), new MarkdownView(this.body)];
  }

  /** Shows at most `most` more characters -> whether that is all there is. */
  grow(most = Infinity) {
    if (!this.views) return true;
    let all = true;
    [this.message.thought, this.message.text].forEach((text, which) => {
      const view = this.views[which], more = text.slice(view.text.length, view.text.length + most);
      if (more) view.push(more);
      all &&= view.text.length >= text.length;
    });
    return all;
  }

  /** Brings what is around the text up to date. */
  draw(live) {
    if (!this.views && this.shape !== this.chat.versions(this.message).length && !this.node.querySelector("textarea")) this.drawUser();
    if (!this.views) return;
    const { message } = this, running = message.state === "running", thinks = running && !message.text;
    this.node.classList.toggle("running", running && !live?.note);
    this.body.lang = languageOf(message.text);
    this.thought.hidden = !message.thought;
    this.thought.classList.toggle("live", thinks);
    const seconds = count(Math.round(message.thinkMs / 100) / 10);
    setText(this.thought.firstChild, thinks ? say("thinks") : message.thinkMs ? say("thoughtFor", seconds) : say("thought"));
    this.drawNote(live, thinks);
    const shape = [message.state, this.chat.versions(message).length, language, thinks].join();
    if (shape !== this.shape) this.drawTools(running);
    this.shape = shape;
    const figures = this.tools.querySelector(".figures");
    if (figures) setText(figures, running ? liveFigures(live) : figuresOf(message.usage));
    this.tell(!running);
  }

  drawTools(running) {
    const figures = make("span", { className: "figures" });
    const buttons = [this.copyButton(), iconButton("again", "again", () => this.actions.again(this.message))];
    this.tools.replaceChildren(...(running ? [] : [this.branches(), ...buttons]), figures);
  }

  drawNote(live, thinks) {
    const { message, actions } = this, note = live?.note;
    const progress = live?.progress, shape = JSON.stringify([message.state, note, message.problem, progress, thinks, language]);
    if (shape === this.noted) return;
    this.noted = shape;
    const parts = note ? this.waits(note, live) : message.state === "running" ? [] : this.ended();
    if (message.state === "running" && !note && !message.thought && !message.text) {
      parts.push(progress ? say("reading", count(progress.processed), count(progress.total)) : say("waiting"));
    } else if (thinks && message.thought && !note) {
      parts.push(button("answerNow", () => actions.answerNow(live)));
    }
    this.note.hidden = !parts.length;
    this.note.classList.toggle("warn", Boolean(note) || ["failed", "lost"].includes(message.state));
    this.note.replaceChildren(...parts);
  }

  /** Why an answer that is asked for does not come. */
  waits(note, live) {
    if (note.kind === "key") return [say("needsKey"), button("enterKey", () => this.actions.enterKey())];
    return [say(note.kind, note.left), ...(note.left ? [button("tryNow", () => live.wake?.())] : [])];
  }

  /** How an answer ended, and the ways on. */
  ended() {
    const { message, actions } = this, { state, problem } = message;
    const goOn = message.text || message.thought ? [button("goOn", () => actions.goOn(message))] : [];
    if (state === "done") return [];
    if (state === "failed" && problem.kind === "full") return actions.tooLong(message, problem);
    const words = state !== "failed" ? say(state) : problem.kind === "slow" ? say("slow") : say("problem", problem.message);
    return [words, goOn.length || ["stopped", "cut", "late"].includes(state) ? goOn[0] ?? "" : button("tryAgain", () => actions.goOn(message))];
  }

  /** Announces the sentences that are whole by now. */
  tell(all) {
    const { text } = this.message;
    if (this.told >= text.length) return;
    const rest = text.slice(this.told), match = all ? [rest] : /^[^]*(?:[.!?…](?=\s)|[。！？\n])/.exec(rest);
    if (!match) return;
    this.told += match[0].length;
    for (const sentence of match[0].split(/(?<=[.!?…])\s+|(?<=[。！？])|\n+/)) announce(sentence);
  }
}

/** Sets a text where it is another one: who listens hears nothing then. */
function setText(node, text) { if (node.textContent !== text) node.textContent = text; }

const figuresOf = usage => !usage?.written ? "" : [
  say("figures", count(usage.written), count(Number((usage.rate ?? 0).toPrecision(3)))),
  usage.first == null ? "" : say("figuresFirst", count(Number(usage.first.toFixed(2)))),
].filter(Boolean).join(" · ");

const liveFigures = live => live?.written ? say("figures", count(live.written), live.rate ? count(Number(live.rate.toPrecision(3))) : "–") : "";
