// ---- Chats and their messages, in this browser. Each message is a record of its own that is added and never replaced by
// another tab's: messages form a tree, each names the one before it, and two tabs that write at once make two branches.

const answered = request => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

/** Opens what is kept -> a Store; one in memory where the browser keeps nothing. */
async function openStore() {
  try {
    const request = indexedDB.open("qwenrt", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("chats", { keyPath: "id" });
      const messages = request.result.createObjectStore("messages", { keyPath: "id" });
      messages.createIndex("chat", "chat");
      messages.createIndex("state", "state");
    };
    return new Store(await answered(request));
  } catch {
    return new Store(null);
  }
}

class Store {
  constructor(database) {
    this.database = database;
    this.memory = { chats: new Map(), messages: new Map() };
    this.channel = new BroadcastChannel("qwenrt");
  }

  get keeps() { return this.database !== null; }

  /** Calls `changed` with {chat} when another tab has changed one, {gone: true} with it when it was deleted. writes:
      whether this tab writes the answer of an id. */
  listen(changed, writes) {
    this.owned = () => {};
    this.channel.onmessage = ({ data }) => {
      if (data.chat) changed(data);
      if (data.owned) this.owned(data.owned);
      if (data.asked && writes(data.asked)) this.channel.postMessage({ owned: data.asked });
    };
  }

  /** Whether another tab writes this answer. */
  elsewhere(id) {
    return new Promise(resolve => {
      this.owned = found => { if (found === id) resolve(true); };
      this.channel.postMessage({ asked: id });
      setTimeout(resolve, 250, false);
    });
  }

  tell(chat, gone = false) { this.channel.postMessage({ chat, gone }); }

  async all(table) {
    if (!this.database) return [...this.memory[table].values()];
    return answered(this.database.transaction(table).objectStore(table).getAll());
  }

  /** The messages whose field "chat" or "state" is this. */
  async messages(field, value) {
    if (!this.database) return [...this.memory.messages.values()].filter(message => message[field] === value);
    return answered(this.database.transaction("messages").objectStore("messages").index(field).getAll(value));
  }

  /** Puts what `change` makes of a record (undefined where there is none) in its place, with no other tab between;
      nothing where it makes nothing of it -> what is there now. */
  async change(table, id, change) {
    if (!this.database) {
      const made = change(this.memory[table].get(id));
      if (made) this.memory[table].set(id, structuredClone(made));
      return made ?? this.memory[table].get(id);
    }
    const transaction = this.database.transaction(table, "readwrite"), records = transaction.objectStore(table);
    const ended = new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error);
    });
    ended.catch(() => {});
    const before = await answered(records.get(id)), made = change(before);
    if (made) records.put(made);
    await ended;
    return made ?? before;
  }

  /** Deletes a chat -> all that is needed to bring it back. */
  async remove(id) {
    const chat = (await this.all("chats")).find(one => one.id === id), messages = await this.messages("chat", id);
    if (this.database) {
      const transaction = this.database.transaction(["chats", "messages"], "readwrite");
      transaction.objectStore("chats").delete(id);
      for (const message of messages) transaction.objectStore("messages").delete(message.id);
      await new Promise(resolve => { transaction.oncomplete = resolve; });
    } else {
      this.memory.chats.delete(id);
      for (const message of messages) this.memory.messages.delete(message.id);
    }
    this.tell(id, true);
    return { ...chat, messages };
  }

  /** Everything, as the file of an export has it. */
  async exported() {
    const chats = await this.all("chats"), messages = await this.all("messages");
    for (const chat of chats) chat.messages = messages.filter(message => message.chat === chat.id);
    return { format: "qwenrt-chats", version: 1, exported: new Date().toISOString(), chats };
  }

  /** Adds what a file has and is not here yet -> {chats, messages}: how many are new. Throws where it is no export. */
  async imported(file) {
    const added = { chats: 0, messages: 0 };
    if (file?.format !== "qwenrt-chats" || !Array.isArray(file.chats)) throw new TypeError("no export");
    const chats = file.chats.map(readChat); // all of it is looked at before anything is kept
    for (const { messages, ...chat } of chats) {
      const put = (table, record) => this.change(table, record.id, old => {
        if (old) return null;
        added[table]++;
        return record;
      });
      await put("chats", chat);
      for (const message of messages) await put("messages", message);
      this.tell(chat.id);
    }
    return added;
  }
}

// ---- what a file says is taken field by field

const text = (value, most = 1 << 26) => typeof value === "string" ? value.slice(0, most) : "";
const number = (value, usual = null) => Number.isFinite(value) ? value : usual;
const name = value => { if (typeof value !== "string" || !/^[\w-]{1,64}$/.test(value)) throw new TypeError("no id"); return value; };

function readChat(given) {
  const id = name(given.id), settings = {};
  for (const field of SAMPLING) if (number(given.settings?.[field]) !== null) settings[field] = given.settings[field];
  if (typeof given.settings?.thinking === "boolean") settings.thinking = given.settings.thinking;
  return {
    id, settings, title: text(given.title, 200), system: text(given.system),
    created: number(given.created, 0), updated: number(given.updated, 0),
    leaf: typeof given.leaf === "string" ? name(given.leaf) : null,
    from: typeof given.from === "string" ? name(given.from) : null,
    messages: [...given.messages].map(message => readMessage(message, id)),
  };
}

function readMessage(given, chat) {
  const files = Array.isArray(given.files) ? given.files : [], usage = {};
  for (const field of ["prompt", "written", "cached", "rate", "first"]) usage[field] = number(given.usage?.[field]);
  return {
    id: name(given.id), chat, parent: given.parent === null ? null : name(given.parent),
    role: given.role === "user" ? "user" : "assistant", text: text(given.text), thought: text(given.thought),
    files: files.map(file => ({ name: text(file?.name, 200), text: text(file?.text) })),
    created: number(given.created, 0), thinkMs: number(given.thinkMs, 0), usage: usage.written === null ? null : usage,
    state: ["done", "stopped", "cut", "late", "lost"].includes(given.state) ? given.state : "stopped",
  };
}
