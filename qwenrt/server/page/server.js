// ---- The server: what the page asks of it, and what may go wrong.

const BASE = location.pathname.replace(/[^/]*$/, "");
const SAMPLING = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const CHAT = "v1/chat/completions";

/** A request that was not served. kind: "gone" (no server), "stopping", "key", "busy", "slow", "full", "missing" or
    "refused"; wait: seconds after which to come again. */
class Trouble extends Error {
  constructor(kind, message = "", wait = 0) {
    super(message);
    Object.assign(this, { kind, wait });
  }
}

const key = {
  get: () => sessionStorage.getItem("key") ?? "",
  set: value => sessionStorage.setItem("key", value),
};

/** The response to a request. Throws Trouble, and AbortError where the signal says so. */
async function fetched(path, { body, headers = {}, ...options } = {}) {
  const own = { ...headers };
  if (key.get()) own.Authorization = `Bearer ${key.get()}`;
  if (body) own["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(BASE + path, {
      method: body ? "POST" : "GET", body: body && JSON.stringify(body), headers: own, cache: "no-store", ...options,
    });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Trouble("gone");
  }
  if (!response.ok) throw await troubleOf(response);
  return response;
}

async function troubleOf(response) {
  const told = (await response.json().catch(() => null))?.error ?? {};
  const message = told.message ?? `${response.status} ${response.statusText}`;
  const wait = Number(response.headers.get("Retry-After")) || 0;
  if (response.status === 401) return new Trouble("key", message);
  if (response.status === 404) return new Trouble("missing", message);
  if (response.status === 429) return new Trouble("busy", message, wait || 5);
  if (told.code === "context_length_exceeded") return new Trouble("full", message);
  if (told.code === "queue_timeout") return new Trouble("slow", message);
  if ([502, 503, 504].includes(response.status)) return new Trouble("stopping", message, wait);
  return new Trouble("refused", message);
}

const server = {
  info: null, // what /server_info said

  async learn() {
    this.info = await (await fetched("server_info")).json();
  },

  /** Begin an answer that outlives its connection under a random id, and the stream of its events. */
  ask: (body, stream, signal) => fetched(CHAT, { body, signal, headers: { "X-Conversation-Id": stream } }),

  /** The stream of such an answer from a byte on. */
  follow: (stream, from, signal) => fetched(`v1/stream?conv_id=${encodeURIComponent(stream)}&from=${from}`, { signal }),

  stop: stream => fetched(`v1/stream?conv_id=${encodeURIComponent(stream)}`, { method: "DELETE" }).catch(() => {}),

  /** End the thought of the answer with this id, which is not the stream's. */
  answerNow: id => fetched(CHAT + "/control", { body: { id, action: "reasoning_end" } }).catch(() => {}),

  /** How many tokens a request's prompt has; Infinity where it does not fit. */
  async size(body) {
    try {
      return (await (await fetched(CHAT + "/input_tokens", { body })).json()).input_tokens;
    } catch (error) {
      if (error.kind === "full") return Infinity;
      throw error;
    }
  },
};

/** The data of each event of a response, with the offset behind it. from: of the response's first byte. */
async function* events(response, from) {
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let rest = new Uint8Array();
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      throw error.name === "AbortError" ? error : new Trouble("gone");
    }
    if (read.done) return;
    const bytes = rest.length ? new Uint8Array([...rest, ...read.value]) : read.value;
    let start = 0;
    for (let at = bytes.indexOf(10); at >= 0; at = bytes.indexOf(10, at + 1)) {
      if (bytes[at + 1] !== 10) continue;
      const event = decoder.decode(bytes.subarray(start, at));
      from += at + 2 - start;
      start = at + 2;
      at++;
      if (event.startsWith("data: ")) yield { data: event.slice(6), offset: from };
    }
    rest = bytes.slice(start);
  }
}
