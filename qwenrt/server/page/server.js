// ---- The server: what the page asks of it, and what may go wrong.

const BASE = location.pathname.replace(/[^/]*$/, "")
const SAMPLING = ["temperature", "top_p", "top_k", "max_tokens", "seed"]
const CHAT = "v1/chat/completions"

// A request that was not served. kind: "gone" where there is no server; wait: seconds after which to come again.
class Trouble extends Error {
	constructor(kind, message = "", wait = 0) {super(message); Object.assign(this, {kind, wait})}
}

const key = () => sessionStorage.getItem("key") ?? ""

// What the network gives. Throws Trouble where it breaks, AbortError where that was wanted.
const reached = promise => promise.catch(error => {throw error.name === "AbortError" ? error : new Trouble("gone")})

async function fetched(path, {body, headers = {}, ...options} = {}) {
	if (key()) headers.Authorization = `Bearer ${key()}`
	if (body) Object.assign(options, {method: "POST", body: JSON.stringify(body)})
	const response = await reached(fetch(BASE + path, {cache: "no-store", headers: {...headers, "Content-Type": "application/json"}, ...options}))
	if (!response.ok) throw await troubleOf(response)
	return response
}

async function troubleOf(response) {
	const told = (await response.json().catch(() => null))?.error ?? {}, wait = Number(response.headers.get("Retry-After")) || 0
	const kinds = {context_length_exceeded: "full", queue_timeout: "slow", 401: "key", 404: "missing", 429: "busy", 502: "stopping", 503: "stopping", 504: "stopping"}
	const kind = kinds[told.code] ?? kinds[response.status] ?? "refused"
	return new Trouble(kind, told.message ?? `${response.status} ${response.statusText}`, kind === "busy" ? wait || 5 : wait)
}

const server = {
	info: null, // what /server_info said

	async learn() {this.info = await (await fetched("server_info")).json()},

	// Begin an answer that outlives its connection under a random id, and the stream of its events.
	ask: (body, stream, signal) => fetched(CHAT, {body, signal, headers: {"X-Conversation-Id": stream}}),

	follow: (stream, from, signal) => fetched(`v1/stream?conv_id=${stream}&from=${from}`, {signal}),

	stop: stream => fetched(`v1/stream?conv_id=${stream}`, {method: "DELETE"}).catch(() => {}),

	// End the thought of an answer, by its own id.
	answerNow: id => fetched(CHAT + "/control", {body: {id, action: "reasoning_end"}}).catch(() => {}),
}

// The data of each event of a response, with the offset behind it. from: of the response's first byte.
async function* events(response, from) {
	const reader = response.body.getReader(), decoder = new TextDecoder()
	for (let rest = new Uint8Array(), read; !(read = await reached(reader.read())).done;) {
		const bytes = rest.length ? new Uint8Array([...rest, ...read.value]) : read.value
		let start = 0
		for (let at = bytes.indexOf(10); at >= 0; at = bytes.indexOf(10, at + 1)) {
			if (bytes[at + 1] !== 10) continue
			const event = decoder.decode(bytes.subarray(start, at))
			from += at + 2 - start
			start = at + 2
			at++
			if (event.startsWith("data: ")) yield {data: event.slice(6), offset: from}
		}
		rest = bytes.slice(start)
	}
}

// Counts seconds down; each is told to `tick`, with a function that ends the wait.
async function countdown(seconds, tick) {
	let now = false
	for (let left = Math.ceil(seconds); left > 0 && !now; left--) {
		await new Promise(resolve => {
			tick(left, () => {now = true; resolve()})
			setTimeout(resolve, 1000)
		})
	}
}
