// ---- Chats as trees of messages, and the answers that are being written.

const SAVE_EVERY = 700 // milliseconds, while an answer is written
const RECENT = 300000 // milliseconds in which a question that the server lost is asked again

const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), byte => byte.toString(16).padStart(2, "0")).join("")

// One chat: its record, and all messages by their ids.
class Chat {
	constructor(record, messages) {
		this.record = record
		this.messages = new Map(messages.sort((a, b) => a.created - b.created).map(message => [message.id, message]))
	}

	get id() {return this.record.id}

	// From the first message to one.
	path(id) {
		const found = new Set() // an imported file could go in a circle
		for (let at = this.messages.get(id); at && !found.has(at); at = this.messages.get(at.parent)) found.add(at)
		return [...found].reverse()
	}

	// What is sent for an answer.
	sent(answer) {
		const path = this.path(answer.parent)
		return path.slice(Math.max(0, path.findIndex(message => message.id === this.record.from)))
	}

	children(id) {return [...this.messages.values()].filter(message => message.parent === id)}

	versions(message) {return this.children(message.parent).filter(other => other.role === message.role)}

	// The newest message below one, or of all.
	newest(id) {
		const below = this.children(id).at(-1)
		return below ? this.newest(below.id) : id
	}
}

const blankChat = settings => ({id: newId(), title: "", created: Date.now(), updated: Date.now(), system: "", settings, leaf: null, from: null})

const blankMessage = (chat, parent, role) => ({
	id: newId(), chat: chat.id, parent, role, text: "", thought: "", files: [], created: Date.now(), state: "done", usage: null, thinkMs: 0,
})

// What the model gets of a message: its text, then its files.
function wholeText(message) {
	const files = message.files.map(file => {
		const fence = "`".repeat(1 + Math.max(2, ...(file.text.match(/`{3,}/g) ?? []).map(ticks => ticks.length)))
		return `${file.name}:\n${fence}\n${file.text}\n${fence}`
	})
	return [message.text, ...files].filter(Boolean).join("\n\n")
}

// The body of the request that writes `answer`, or goes on with it.
function requestOf(chat, answer) {
	const {system, settings} = chat.record, begun = answer.text || answer.thought
	const messages = system.trim() ? [{role: "system", content: system}] : []
	for (const {role, text, thought, ...message} of [...chat.sent(answer), answer]) {
		if (role === "user") messages.push({role, content: wholeText({text, ...message})})
		else if (text || thought) messages.push({role, content: text, ...(thought && {reasoning_content: thought})})
	}
	const body = {
		model: server.info?.model ?? "", messages, stream: true, stream_options: {include_usage: true, continuous_usage_stats: true},
		return_progress: true, ...(begun && {continue_final_message: true}),
	}
	for (const field of SAMPLING) if (settings[field] != null) body[field] = settings[field]
	if (server.info?.thinking === "optional" && settings.thinking != null) body.enable_thinking = settings.thinking
	return body
}

// The answers that are being written, in whatever chat.
class Answers {
	live = new Map() // by the message's id

	constructor() {
		const saveAll = () => {for (const live of this.live.values()) this.save(live.message)}
		document.addEventListener("visibilitychange", saveAll)
		window.addEventListener("pagehide", saveAll)
	}

	of(message) {return this.live.get(message.id)}

	// Keeps a message, unless another tab has come further with its stream.
	async save(message) {
		const done = message.state !== "running"
		try {
			await store.change("messages", message.id, old => {
				const theirs = old && old.stream === message.stream && (old.state !== "running" || old.offset > message.offset)
				return theirs && !done ? null : {...message}
			})
		} catch {this.full = true}
		if (done) store.tell(message.chat)
	}

	// Write a new answer, or more of one.
	begin(chat, message) {
		Object.assign(message, {state: "running", stream: newId(), offset: 0, begun: false, asked: Date.now(), problem: null})
		const written = this.run(chat, message, true)
		navigator.locks?.request(message.id, () => written)
	}

	// Write on, or show what another tab writes, which has a lock (in secure contexts).
	resume(chat, message) {
		const run = lock => lock ? this.run(chat, message, true) : this.follow(chat, message)
		navigator.locks?.request(message.id, {ifAvailable: true}, run) ?? run(true)
	}

	follow(chat, message) {if (message.begun) this.run(chat, message, false)}

	// Write on until the end, however often the connection is lost. mine: no other tab does.
	async run(chat, message, mine) {
		if (this.live.has(message.id)) return
		const live = {mine, message, chat, abort: new AbortController(), saved: 0, began: 0, note: null, wake: null}
		this.live.set(message.id, live)
		if (mine) await this.save(message)
		for (let tries = 0; message.state === "running" && !live.abort.signal.aborted;) {
			try {
				const before = message.offset
				await this.once(live)
				tries = message.offset > before ? 0 : tries + 1
				if (message.state === "running") await this.pause(live, "gone", Math.min(tries, 15))
			} catch (error) {
				if (!live.abort.signal.aborted) await this.overcome(live, error, tries++)
			}
		}
		this.live.delete(message.id)
		if (mine || message.state !== "running") {
			if (message.state === "running") message.state = "stopped"
			live.note = null
			await this.save(message)
		}
		changed(live)
	}

	async once(live) {
		const {message, abort: {signal}} = live
		const response = await (message.begun ? server.follow(message.stream, message.offset, signal) : server.ask(requestOf(live.chat, message), message.stream, signal))
		message.begun = true
		live.note = null
		await this.save(message)
		if (live.mine) store.tell(message.chat)
		changed(live)
		for await (const {data, offset} of events(response, message.offset)) {
			if (data === "[DONE]") message.state = live.end ?? "done"
			else this.take(live, JSON.parse(data))
			changed(live)
			message.offset = offset
			if (message.state === "running" && Date.now() - live.saved > SAVE_EVERY) {
				live.saved = Date.now()
				this.save(message)
			}
		}
	}

	take(live, {id, error, choices, usage, prompt_progress: progress, qwenrt}) {
		const {message} = live, choice = choices?.[0]
		if (id) live.id = id
		if (error) Object.assign(message, {state: "failed", problem: {kind: "refused", message: String(error.message)}})
		live.progress = progress ?? (choice ? null : live.progress)
		if (choice) this.takeChoice(live, choice)
		if (usage) takeUsage(live, usage, qwenrt)
	}

	takeChoice(live, {delta, finish_reason: reason, qwenrt}) {
		const {message} = live, thought = delta?.reasoning_content ?? "", text = delta?.content ?? "", now = performance.now()
		if (thought || text) live.began ||= now
		if (thought) live.thinkBegan ??= now
		if (text && live.thinkBegan) live.thinkEnded ??= now
		if (live.thinkBegan) message.thinkMs = (live.thinkEnded ?? now) - live.thinkBegan
		message.thought += thought
		message.text += text
		if (reason) live.end = {abort: "stopped", timeout: "late", error: "stopped"}[qwenrt?.finish_reason] ?? (reason === "length" ? "cut" : "done")
	}

	// After a request that was not served: try again, or let the person decide.
	async overcome(live, error, tries) {
		const {message} = live, {kind} = error
		if (!(error instanceof Trouble)) throw error
		if (kind === "gone" || kind === "stopping") await this.pause(live, kind, error.wait || Math.min(2 ** tries, 15))
		else if (!live.mine) live.abort.abort() // the other tab says how it ends
		else if (kind === "busy") await this.pause(live, kind, error.wait)
		else if (kind === "key") {
			live.note = error
			changed(live)
			await askKey()
		} else if (message.begun && (kind === "missing" || message.offset)) {
			if (message.offset === 0 && Date.now() - message.asked < RECENT) message.begun = false // it was never begun
			else message.state = "lost"
		} else Object.assign(message, {state: "failed", problem: {kind, message: error.message}})
	}

	async pause(live, kind, seconds) {
		await countdown(seconds, (left, wake) => {
			Object.assign(live, {wake, note: {kind, left}})
			changed(live)
		})
		live.wake = null
		if (seconds) live.note = {kind, left: 0}
		changed(live)
	}

	stop(message) {
		const live = this.of(message), abort = () => {live.abort.abort(); live.wake?.()}
		if (!live || live.end === "stopped") return
		live.end = "stopped"
		if (message.begun && !live.note) setTimeout(abort, 1500) // its last events say what it took
		else abort()
		server.stop(message.stream)
	}
}

function takeUsage(live, usage, own) {
	const written = live.written = usage.completion_tokens, seconds = (performance.now() - live.began) / 1000
	if (live.began && written > 1) live.rate = (written - (live.firstCount ??= written)) / seconds
	if (own) live.message.usage = {prompt: usage.prompt_tokens, written, rate: own.tokens_per_s}
}
