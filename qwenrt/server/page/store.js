// ---- Chats and their messages, in this browser. Messages form a tree, each a record that names the one before it: two tabs
// that write at once make two branches.

const answered = request => new Promise((resolve, reject) => {
	request.onsuccess = () => resolve(request.result)
	request.onerror = () => reject(request.error)
})

const ended = transaction => new Promise((resolve, reject) => {
	transaction.oncomplete = resolve
	transaction.onabort = () => reject(transaction.error)
})

// Throws where the browser keeps nothing.
async function openStore() {
	const request = indexedDB.open("qwenrt", 1)
	request.onupgradeneeded = () => {
		request.result.createObjectStore("chats", {keyPath: "id"})
		const messages = request.result.createObjectStore("messages", {keyPath: "id"})
		for (const field of ["chat", "state"]) messages.createIndex(field, field)
	}
	return new Store(await answered(request))
}

class Store {
	constructor(database) {
		this.database = database
		this.channel = new BroadcastChannel("qwenrt")
	}

	// Calls `changed` with {chat, gone} when another tab has changed one.
	listen(changed) {this.channel.onmessage = ({data}) => changed(data)}

	tell(chat, gone = false) {this.channel.postMessage({chat, gone})}

	records(table) {return this.database.transaction(table).objectStore(table)}

	chats() {return answered(this.records("chats").getAll())}

	chat(id) {return answered(this.records("chats").get(id))}

	// Those whose field "chat" or "state" is this.
	messages(field, value) {return answered(this.records("messages").index(field).getAll(value))}

	// Puts what `change` makes of a record in its place, with no other tab between -> what is there now.
	async change(table, id, change) {
		const transaction = this.database.transaction(table, "readwrite"), records = transaction.objectStore(table), end = ended(transaction)
		end.catch(() => {})
		const before = await answered(records.get(id)), made = change(before)
		if (made) records.put(made)
		await end
		return made ?? before
	}

	// Deletes a chat -> what brings it back.
	async remove(id) {
		const chat = await this.chat(id), messages = await this.messages("chat", id)
		const transaction = this.database.transaction(["chats", "messages"], "readwrite")
		transaction.objectStore("chats").delete(id)
		for (const message of messages) transaction.objectStore("messages").delete(message.id)
		await ended(transaction)
		this.tell(id, true)
		return () => this.add({...chat, messages})
	}

	// Adds of a chat what is not here -> {chats, messages}: how many are new.
	async add({messages, ...chat}) {
		const added = {chats: 0, messages: 0}, put = (table, record) => this.change(table, record.id, old => {
			if (old) return null
			added[table]++
			return record
		})
		await put("chats", chat)
		for (const message of messages) await put("messages", message)
		this.tell(chat.id)
		return added
	}

	// All of it, for a file.
	async exported() {
		const chats = await this.chats()
		for (const chat of chats) chat.messages = await this.messages("chat", chat.id)
		return {format: "qwenrt-chats", version: 1, exported: new Date().toISOString(), chats}
	}

	// Adds what a file has -> how many are new. Throws where it is no export.
	async imported(file) {
		if (file?.format !== "qwenrt-chats") throw new TypeError("no export")
		const added = {chats: 0, messages: 0}
		for (const chat of file.chats.map(readChat)) { // all of it is looked at before anything is kept
			const more = await this.add(chat)
			for (const table in added) added[table] += more[table]
		}
		return added
	}
}

// ---- what a file says is taken field by field

const name = value => {if (typeof value !== "string" || !/^[\w-]{1,64}$/.test(value)) throw new TypeError("no id"); return value}
const nameOrNull = value => value == null ? null : name(value)

// A model's fields, as given where that is of the same type.
const like = (given, model) => Object.fromEntries(Object.entries(model).map(([field, own]) => [field, typeof given?.[field] === typeof own ? given[field] : own]))

function readChat(given) {
	const id = name(given.id), settings = {thinking: true}
	for (const field of SAMPLING) settings[field] = 0
	for (const field in settings) if (typeof given.settings?.[field] === typeof settings[field]) settings[field] = given.settings[field]; else delete settings[field]
	const messages = [...given.messages].map(message => readMessage(message, id))
	return {...like(given, blankChat({})), id, settings, leaf: nameOrNull(given.leaf), from: nameOrNull(given.from), messages}
}

function readMessage(given, chat) {
	const files = Array.isArray(given.files) ? given.files : [], usage = given.usage && like(given.usage, {prompt: 0, written: 0, rate: 0})
	return {
		...like(given, blankMessage({id: chat}, null, "")), id: name(given.id), chat, parent: nameOrNull(given.parent), usage,
		role: given.role === "user" ? "user" : "assistant", files: files.map(file => like(file, {name: "", text: ""})),
		state: ["done", "stopped", "cut", "late", "lost"].includes(given.state) ? given.state : "stopped",
	}
}
