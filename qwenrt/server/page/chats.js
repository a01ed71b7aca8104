// ---- Chats as trees of messages, and the answers that are being written.

const SAVE_EVERY = 700; // milliseconds, while an answer is written
const RECENT = 300000; // milliseconds in which a question that was never answered is asked again after a reload

const newId = () => crypto.randomUUID?.() ?? [...crypto.getRandomValues(new Uint8Array(16))]
  .map(byte => byte.toString(16).padStart(2, "0")).join("");

/** One chat: its record, and all messages by their ids. */
class Chat {
  constructor(record, messages) {
    this.record = record;
    this.messages = new Map();
    for (const message of messages.sort((a, b) => a.created - b.created)) this.messages.set(message.id, message);
  }

  get id() { return this.record.id; }

  /** From the first message to one. */
  path(id) {
    const found = [], seen = new Set();
    for (let at = this.messages.get(id); at && !seen.has(at.id); at = this.messages.get(at.parent)) {
      seen.add(at.id);
      found.unshift(at);
    }
    return found;
  }

  children(id) { return [...this.messages.values()].filter(message => message.parent === id); }

  versions(message) { return this.children(message.parent).filter(other => other.role === message.role); }

  /** The newest message below one, or of all. */
  newest(id) {
    let at = id;
    for (let below = this.children(at); below.length; below = this.children(at)) at = below.at(-1).id;
    return at;
  }
}

const blankChat = settings => ({
  id: newId(), title: "", created: Date.now(), updated: Date.now(), system: "", settings: { ...settings }, leaf: null, from: null,
});

const blankMessage = (chat, parent, role) => ({
  id: newId(), chat: chat.id, parent, role, text: "", thought: "", files: [], created: Date.now(), state: "done",
  usage: null, thinkMs: 0,
});

/** What the model gets of a user's message: its text, then its files. */
function wholeText(message) {
  const files = message.files.map(file => {
    const longest = Math.max(2, ...[...file.text.matchAll(/`{3,}/g)].map(match => match[0].length));
    const fence = "`".repeat(longest + 1);
    return `${file.name}:\n${fence}\n${file.text}\n${fence}`;
  });
  return [message.text, ...files].filter(Boolean).join("\n\n");
}

/** The body of the request that writes `answer`, or goes on with it where it has begun. */
function requestOf(chat, answer) {
  const { record } = chat, messages = [], path = chat.path(answer.parent);
  if (record.system.trim()) messages.push({ role: "system", content: record.system });
  const first = Math.max(0, path.findIndex(message => message.id === record.from));
  for (const message of [...path.slice(first), answer]) {
    if (message.role === "user") messages.push({ role: "user", content: wholeText(message) });
    else if (message.text || message.thought) {
      const thought = message.thought ? { reasoning_content: message.thought } : {};
      messages.push({ role: "assistant", content: message.text, ...thought });
    }
  }
  const body = { model: server.info?.model ?? "", messages, stream: true };
  body.stream_options = { include_usage: true, continuous_usage_stats: true };
  body.return_progress = true;
  if (answer.text || answer.thought) body.continue_final_message = true;
  for (const field of SAMPLING) if (record.settings[field] != null) body[field] = record.settings[field];
  if (server.info?.thinking === "optional" && record.settings.thinking != null) {
    body.enable_thinking = record.settings.thinking;
  }
  return body;
}

/** The answers that are being written, in whatever chat. `changed` is called with a message that has changed. */
class Answers {
  constructor(store, changed, needKey) {
    Object.assign(this, { store, changed, needKey });
    this.live = new Map(); // by the message's id
    document.addEventListener("visibilitychange", () => this.saveAll());
    window.addEventListener("pagehide", () => this.saveAll());
  }

  of(message) { return this.live.get(message.id); }

  saveAll() { for (const live of this.live.values()) this.save(live.message); }

  /** Keeps a message, unless another tab that follows the same stream has come further. */
  async save(message) {
    const done = message.state !== "running";
    try {
      await this.store.change("messages", message.id, old => {
        const theirs = old && old.stream === message.stream && (old.state !== "running" || old.offset > message.offset);
        return old && theirs && !done ? null : { ...message };
      });
    } catch { this.full = true; }
    if (done) this.store.tell(message.chat);
  }

  /** Write a new answer, or more of one. */
  begin(chat, message) {
    Object.assign(message, { state: "running", stream: newId(), offset: 0, begun: false, asked: Date.now(), problem: null });
    return this.run(chat, message, true);
  }

  /** Write on what was being written when the page was left. */
  async resume(chat, message) {
    if (await this.store.elsewhere(message.id)) this.follow(chat, message);
    else await this.run(chat, message, true);
  }

  /** Show what another tab writes, once its server has begun. */
  follow(chat, message) {
    if (message.begun) this.run(chat, message, false);
  }

  /** Write on until the answer ends, however often the connection is lost on the way. mine: no other tab does. */
  async run(chat, message, mine) {
    if (this.live.has(message.id)) return;
    const live = { mine, message, chat, abort: new AbortController(), saved: 0, began: 0, note: null, wake: null };
    this.live.set(message.id, live);
    if (mine) await this.save(message);
    for (let tries = 0; message.state === "running";) {
      try {
        const before = message.offset;
        await this.once(live);
        tries = message.offset > before ? 0 : tries + 1;
        if (message.state === "running") await this.pause(live, { kind: "gone" }, Math.min(tries, 15));
      } catch (error) {
        if (live.abort.signal.aborted) break;
        await this.overcome(live, error, tries++);
      }
    }
    this.live.delete(message.id);
    if (message.state === "running" && !mine) return this.changed(message, live);
    if (message.state === "running") message.state = "stopped";
    live.note = null;
    await this.save(message);
    this.changed(message, live);
  }

  /** One connection. */
  async once(live) {
    const { message, abort } = live;
    const response = message.begun
      ? await server.follow(message.stream, message.offset, abort.signal)
      : await server.ask(requestOf(live.chat, message), message.stream, abort.signal);
    message.begun = true;
    live.note = null;
    await this.save(message);
    if (live.mine) this.store.tell(message.chat);
    this.changed(message, live);
    for await (const { data, offset } of events(response, message.offset)) {
      this.take(live, data);
      message.offset = offset;
      if (message.state === "running" && Date.now() - live.saved > SAVE_EVERY) {
        live.saved = Date.now();
        this.save(message);
      }
    }
  }

  /** One event of the stream. */
  take(live, data) {
    const { message } = live;
    if (data === "[DONE]") {
      message.state = live.end ?? "done";
    } else {
      const event = JSON.parse(data), choice = event.choices?.[0];
      if (event.id) live.id = event.id;
      if (event.error) {
        message.state = "failed";
        message.problem = { kind: "refused", message: String(event.error.message) };
      }
      live.progress = event.prompt_progress ?? (choice ? null : live.progress);
      if (choice) this.takeChoice(live, choice);
      if (event.usage) takeUsage(live, event.usage, event.qwenrt);
    }
    this.changed(message, live);
  }

  takeChoice(live, { delta, finish_reason: reason, qwenrt }) {
    const { message } = live, thought = delta?.reasoning_content ?? "", text = delta?.content ?? "";
    if (thought || text) live.began ||= performance.now();
    if (thought) live.thinkBegan ??= performance.now();
    if (text && live.thinkBegan && !live.thinkEnded) live.thinkEnded = performance.now();
    if (live.thinkBegan) message.thinkMs = (live.thinkEnded ?? performance.now()) - live.thinkBegan;
    message.thought += thought;
    message.text += text;
    if (reason) live.end = { abort: "stopped", timeout: "late", error: "stopped" }[qwenrt?.finish_reason] ?? (reason === "length" ? "cut" : "done");
  }

  /** What to do about a request that was not served: wait and try again, or let the person decide. */
  async overcome(live, error, tries) {
    const { message } = live;
    if (!(error instanceof Trouble)) throw error;
    if (error.kind === "gone" || error.kind === "stopping") {
      await this.pause(live, error, error.wait || Math.min(2 ** tries, 15));
    } else if (!live.mine) {
      live.abort.abort(); // the other tab says how it ends
    } else if (error.kind === "busy") {
      await this.pause(live, error, error.wait);
    } else if (error.kind === "key") {
      live.note = error;
      this.changed(message, live);
      await this.needKey();
    } else if (message.begun && (error.kind === "missing" || message.offset)) {
      if (message.offset === 0 && Date.now() - message.asked < RECENT) message.begun = false; // it was never begun
      else message.state = "lost";
    } else {
      message.state = "failed";
      message.problem = { kind: error.kind, message: error.message };
    }
  }

  /** Says why nothing comes, and counts down the seconds. */
  async pause(live, error, seconds) {
    for (let left = Math.ceil(seconds); left > 0 && !live.abort.signal.aborted; left--) {
      live.note = { kind: error.kind, left };
      this.changed(live.message, live);
      const now = await new Promise(resolve => {
        live.wake = () => resolve(true);
        live.abort.signal.addEventListener("abort", resolve, { once: true });
        setTimeout(resolve, 1000);
      });
      if (now === true) break;
    }
    live.wake = null;
    if (seconds) live.note = { kind: error.kind, left: 0 };
    this.changed(live.message, live);
  }

  /** Stop an answer where it is. */
  stop(message) {
    const live = this.of(message);
    if (!live || live.stopping) return;
    live.stopping = true;
    live.end = "stopped";
    if (message.begun && !live.note) setTimeout(() => live.abort.abort(), 1500); // its last events say what it took
    else live.abort.abort();
    server.stop(message.stream);
  }
}

function takeUsage(live, usage, own) {
  const { message } = live;
  live.written = usage.completion_tokens;
  const seconds = (performance.now() - live.began) / 1000;
  if (live.began && live.written > 1) live.rate = (live.written - (live.firstCount ??= live.written)) / seconds;
  if (!own) return;
  message.usage = {
    prompt: usage.prompt_tokens, written: usage.completion_tokens, cached: own.cached_tokens,
    rate: own.tokens_per_s, first: own.first_token_s,
  };
}
