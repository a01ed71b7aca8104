// ---- The list of chats: opened, renamed, deleted, exported, changed in another tab.

async function drawList() {
	const chats = (await store.chats()).sort((a, b) => b.updated - a.updated), wanted = $("search").value.trim().toLowerCase()
	const busy = new Set([...answers.live.values()].map(live => live.message.chat))
	const shown = chats.filter(one => one.title.toLowerCase().includes(wanted))
	if ($("list").querySelector("input")) return // somebody writes a name
	$("list").replaceChildren(...shown.map(one => {
		const title = one.title || say("newChat"), here = one.id === chat?.id
		const open = make("button", {className: "open", title, lang: languageOf(title), ariaCurrent: here ? "page" : null, onclick: () => openChat(one.id)}, title)
		const item = make("li", {className: (here ? "here " : "") + (busy.has(one.id) ? "busy" : "")}, open)
		const tools = [iconButton("edit", "rename", () => rename(item, one)), iconButton("remove", "remove", () => removeChat(one))]
		for (const tool of tools) tool.ariaLabel += `: ${title}`
		item.append(...tools)
		return item
	}))
	$("no-chats").hidden = shown.length > 0
}

function rename(item, one) {
	const field = make("input", {value: one.title, ariaLabel: say("name"), maxLength: 200})
	const end = async keep => {
		const title = field.value.trim()
		field.onblur = null
		field.remove()
		if (keep && title) await changeChat(one.id, record => ({...record, title}))
		drawList()
	}
	field.onblur = () => end(true)
	onKeys(field, () => end(true), () => end(false))
	item.replaceChildren(field)
	field.select()
}

async function changeChat(id, change) {
	const record = await store.change("chats", id, old => old && change(old))
	if (record && chat?.id === id) {chat.record = record; drawTitle()}
	store.tell(id)
}

async function removeChat(one) {
	for (const live of answers.live.values()) if (live.message.chat === one.id) answers.stop(live.message)
	const restore = await store.remove(one.id)
	if (chat?.id === one.id) newChat()
	drawList()
	toast(say("removed", one.title || say("newChat")), async () => {await restore(); openChat(one.id)})
}

function newChat() {
	showChat(new Chat(blankChat(JSON.parse(localStorage.getItem("settings") ?? "{}")), []))
	history.replaceState(null, "", location.pathname)
	$("prompt").focus()
}

async function openChat(id) {
	const record = await store.chat(id), messages = await store.messages("chat", id)
	if (!record) return newChat()
	showChat(new Chat(record, messages.map(message => answers.of(message)?.message ?? message)))
	history.replaceState(null, "", `#${id}`)
	for (const live of answers.live.values()) if (live.message.chat === id) live.chat = chat
	if (matchMedia("(min-width: 761px)").matches) $("prompt").focus()
}

function showSide(shown) {
	$("side").classList.toggle("shown", shown)
	$("veil").hidden = !shown
	if (shown) $("close-side").focus() // which is there on narrow screens alone
}

function hideSide() {
	showSide(false)
	$("open-side").focus()
}

async function exportChats() {
	const file = await store.exported(), url = URL.createObjectURL(new Blob([JSON.stringify(file, null, 1)], {type: "application/json"}))
	make("a", {href: url, download: `qwenrt-chats-${file.exported.slice(0, 10)}.json`}).click()
	setTimeout(URL.revokeObjectURL, 60000, url)
	toast(say("exported", count(file.chats.length)))
}

async function importChats(file) {
	try {
		const added = await store.imported(JSON.parse(await file.text()))
		toast(say("imported", count(added.chats), count(added.messages)))
		$("settings").close()
	} catch {
		toast(say("notAFile", file.name))
	}
	drawList()
}

async function otherTab({chat: id, gone}) {
	drawList()
	if (id !== chat?.id) return
	if (gone) {toast(say("elsewhere")); return newChat()}
	const before = leaf, messages = await store.messages("chat", id)
	if (id !== chat.id) return
	for (const message of messages) {
		const known = chat.messages.get(message.id)
		if (!known) chat.messages.set(message.id, message)
		else if (!answers.of(known) && known.state === "running") Object.assign(known, message)
		if (message.state === "running") answers.follow(chat, chat.messages.get(message.id))
	}
	if (!runningHere() && !$("prompt").value.trim()) leaf = chat.newest(before) // who writes stays where they are
	drawPath()
}
