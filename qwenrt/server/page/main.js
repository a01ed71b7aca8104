// ---- The page: the chat that is shown, the field to write in, settings, keys.

const LARGEST_FILE = 256 // KiB

let store, answers, chat = null // the one that is shown
let leaf = null, files = [], filling = 0 // the last message shown, what is attached
const views = new Map() // by the message's id

function showChat(next) {
	chat = next
	leaf = next.messages.has(next.record.leaf) ? next.record.leaf : next.newest(null)
	clearViews()
	showSide(false)
	$("prompt").value = sessionStorage.getItem(`draft ${chat.id}`) ?? ""
	fit()
	pinned = true
	drawPath()
	drawTitle()
	drawSettings()
	drawList()
}

function drawTitle() {
	const {title} = chat.record
	setText($("title"), title || say("newChat"))
	$("title").lang = languageOf(title)
	document.title = title ? `${title} · qwenrt` : "qwenrt"
}

// -- the messages

function clearViews() {
	for (const view of views.values()) view.node.remove()
	views.clear()
}

// Shows the messages from the first to the leaf.
function drawPath() {
	const path = chat.path(leaf), fresh = [], thread = $("thread")
	for (const [id, view] of views) if (!path.includes(view.message)) {view.node.remove(); views.delete(id)}
	path.forEach((message, place) => {
		if (!views.has(message.id)) fresh.push(views.set(message.id, new MessageView(chat, message)).get(message.id))
		const view = views.get(message.id)
		view.draw(answers.of(message))
		if (thread.children[place] !== view.node) thread.insertBefore(view.node, thread.children[place] ?? null)
	})
	thread.querySelector(".divider")?.remove()
	views.get(chat.record.from)?.node.before(make("p", {className: "divider quiet"}, say("notSent")))
	thread.classList.toggle("far", path.length > 30)
	$("hello").hidden = path.length > 0
	fill(fresh, ++filling)
	drawButtons()
}

// Writes texts into new views, the last first, a few milliseconds at a time.
function fill(fresh, turn) {
	for (const until = performance.now() + 12; fresh.length && turn === filling && performance.now() < until;) if (fresh.at(-1).grow(8000)) fresh.pop()
	keepEnd()
	if (fresh.length && turn === filling) setTimeout(fill, 0, fresh, turn)
}

const dirty = new Set() // answers that have changed since the last frame
function changed(live) {
	if (live.message.chat !== chat?.id) return void (live.message.state === "running" || drawList())
	if (!dirty.size) (document.hidden ? setTimeout : requestAnimationFrame)(drawChanged)
	dirty.add(live)
}

function drawChanged() {
	for (const live of dirty) {
		const {message} = live, view = views.get(message.id)
		if (view?.message === message) {view.grow(); view.draw(live)}
		if (message.state !== "running") {drawList(); if (answers.full) toast(say("noRoom"))}
	}
	dirty.clear()
	drawButtons()
	keepEnd()
}

function drawButtons() {
	$("stop").hidden = !runningHere()
	$("send").hidden = !$("stop").hidden
	$("send").disabled = !$("prompt").value.trim() && !files.length
	drawContext()
}

function drawContext() {
	const usage = chat?.path(leaf).findLast(message => message.usage)?.usage, most = server.info?.max_model_len
	setText($("context"), usage && most ? say("context", count(usage.prompt + usage.written), count(most)) : "")
}

const runningHere = () => chat.path(leaf).find(message => answers.of(message))

let pinned = true // the end stays in sight, until somebody scrolls away from it
function keepEnd() {if (pinned) $("scroll").scrollTop = $("scroll").scrollHeight}
function scrolled() {
	const {scrollTop, scrollHeight, clientHeight} = $("scroll")
	$("to-end").hidden = pinned = scrollHeight - scrollTop - clientHeight < 60
}

// -- what a person does

async function goTo(id) {
	leaf = id
	drawPath()
	await changeChat(chat.id, record => ({...record, leaf: id, updated: Date.now()}))
}

// Begins an answer to a message.
async function answerTo(parent) {
	const message = blankMessage(chat, parent, "assistant")
	message.created++ // after what it answers
	chat.messages.set(message.id, message)
	answers.begin(chat, message)
	pinned = true
	await goTo(message.id)
	drawList()
}

async function write(text, parent = leaf, attached = []) {
	const message = Object.assign(blankMessage(chat, parent, "user"), {text, files: attached}), first = chat.record.title === ""
	if (first) chat.record.title = (text || attached[0].name).trim().split("\n")[0].slice(0, 80)
	await store.change("chats", chat.id, old => old ?? chat.record)
	await store.change("messages", message.id, () => message)
	if (first) {history.replaceState(null, "", `#${chat.id}`); drawTitle()}
	chat.messages.set(message.id, message)
	$("prompt").focus()
	await answerTo(message.id)
}

function send() {
	const text = $("prompt").value.trim(), attached = files
	if ((!text && !files.length) || runningHere()) return
	files = []
	$("prompt").value = ""
	keepDraft()
	drawFiles()
	write(text, leaf, attached)
}

const actions = {
	async show(message, direction) {
		await goTo(chat.newest(message.id))
		const steps = [...views.get(message.id).node.querySelectorAll(".branches button:enabled")]
		steps.at(direction === "before" ? 0 : -1)?.focus()
	},
	again(message) {$("prompt").focus(); answerTo(message.parent)},
	goOn(message) {$("prompt").focus(); answers.begin(chat, message); drawPath()},
	edited(message, text) {write(text, message.parent, message.files)},
	answerNow(live) {server.answerNow(live.id)},
	enterKey() {$("banner-go").click()},
	tooLong(message, problem) {
		const [most, size] = problem.message.match(/\d+/g).map(Number), alone = chat.sent(message).filter(one => one.role === "user").length < 2
		if (alone) return [say("fullAlone", count(size), count(most))]
		return [say("full", count(size), count(most)), button("leaveOut", () => leaveOut(message)), button("newChat", newChat)]
	},
}

// Sends the later half of the conversation, and asks again.
async function leaveOut(message) {
	const asked = chat.sent(message).filter(one => one.role === "user"), {id: from} = asked[asked.length >> 1]
	await changeChat(chat.id, record => ({...record, from}))
	actions.goOn(message)
}

// -- the field to write in

function fit() {
	$("prompt").style.height = "auto"
	$("prompt").style.height = `${$("prompt").scrollHeight}px`
}

function keepDraft() {
	fit()
	sessionStorage.setItem(`draft ${chat.id}`, $("prompt").value)
	drawButtons()
}

async function attach(list) {
	for (const file of list) {
		const text = file.size > LARGEST_FILE * 1024 ? null : await file.text()
		if (text === null) toast(say("tooLarge", file.name, LARGEST_FILE))
		else if (/[\0\ufffd]/.test(text)) toast(say("notText", file.name))
		else files.push({name: file.name, text})
	}
	drawFiles()
}

function drawFiles() {
	$("files").hidden = !files.length
	$("files").replaceChildren(...files.map(file => {
		const remove = iconButton("close", "remove", () => {files = files.filter(other => other !== file); drawFiles(); $("prompt").focus()})
		remove.ariaLabel = say("removeFile", file.name)
		return make("li", {}, file.name, remove)
	}))
	drawButtons()
}

// -- settings

function drawSettings() {
	if (!chat) return
	const {settings, system} = chat.record
	$("system").value = system
	for (const field of SAMPLING) $(field).value = settings[field] ?? ""
	$("think").hidden = server.info?.thinking !== "optional"
	$("think").ariaPressed = settings.thinking ?? true
}

function setSettings(change) {
	chat.record = change({...chat.record})
	changeChat(chat.id, change)
	localStorage.setItem("settings", JSON.stringify(chat.record.settings))
	drawSettings()
}

const setSetting = (name, value) => setSettings(record => ({...record, settings: {...record.settings, [name]: value}}))

const isDark = () => root.classList.contains("dark")

function setTheme(theme) {
	root.classList.toggle("dark", theme === "dark")
	$("theme").dataset.label = isDark() ? "light" : "dark"
	translate()
}

function setLanguage(next) {
	localStorage.setItem("language", language = next)
	setText($("language"), next === "zh" ? "En" : "中")
	translate()
	clearViews()
	drawServer()
	if (chat) {drawPath(); drawTitle(); drawList()}
	if (banner) showBanner(banner)
}

// -- keys and clicks

function shortcut(event) {
	const letter = event.key.toLowerCase(), control = event.ctrlKey || event.metaKey
	if (control && event.shiftKey && letter === "n") newChat()
	else if (control && !event.shiftKey && letter === "k") {showSide(true); $("search").select()}
	else if (event.key === "Escape" && !document.querySelector("dialog[open]") && !composing(event)) {
		if ($("side").classList.contains("shown")) hideSide()
		else if (runningHere()) answers.stop(runningHere())
		return
	} else return
	event.preventDefault()
}

function listen() {
	const settings = () => {showSide(false); $("settings").showModal()}
	const clicks = {
		new: newChat, send, "open-side": () => showSide(true), "close-side": hideSide, veil: hideSide, "open-settings": settings, about: settings,
		theme: () => {localStorage.setItem("theme", isDark() ? "light" : "dark"); setTheme(localStorage.getItem("theme"))},
		language: () => setLanguage(language === "zh" ? "en" : "zh"), export: exportChats, import: () => $("pick-import").click(),
		"set-key": () => {$("settings").close(); askKey()}, attach: () => $("pick-files").click(),
		think: () => setSetting("thinking", !(chat.record.settings.thinking ?? true)), stop: () => {answers.stop(runningHere()); $("prompt").focus()},
		"to-end": () => {pinned = true; keepEnd()}, "banner-go": () => banner.action(),
	}
	for (const [id, action] of Object.entries(clicks)) $(id).onclick = action
	for (const node of document.querySelectorAll("[data-icon]")) node.prepend(icon(node.dataset.icon))
	for (const field of SAMPLING) {
		$(field).onchange = ({target}) => {if (target.reportValidity()) setSetting(field, target.value === "" ? undefined : Number(target.value))}
	}
	$("system").onchange = ({target}) => setSettings(record => ({...record, system: target.value}))
	$("search").oninput = drawList
	$("pick-files").onchange = ({target}) => {attach([...target.files]); target.value = ""}
	$("pick-import").onchange = ({target}) => {importChats(target.files[0]); target.value = ""}
	$("prompt").oninput = keepDraft
	onKeys($("prompt"), send)
	$("scroll").onscroll = scrolled
	document.onkeydown = shortcut
	document.ondragover = document.ondragleave = document.ondrop = event => {
		event.preventDefault()
		$("composer").querySelector(".box").classList.toggle("drop", event.type === "dragover")
		if (event.type === "drop") attach([...event.dataTransfer.files])
	}
	$("settings").onclick = event => {if (event.target === $("settings")) $("settings").close()}
	new ResizeObserver(keepEnd).observe($("scroll"))
}

async function start() {
	const dark = matchMedia("(prefers-color-scheme: dark)"), theme = () => setTheme(localStorage.getItem("theme") ?? (dark.matches ? "dark" : "light"))
	listen()
	theme()
	setLanguage(language)
	dark.onchange = theme
	try {
		store = await openStore()
	} catch {
		return showBanner({words: () => say("notKept")})
	}
	answers = new Answers()
	store.listen(otherTab)
	learn()
	await (location.hash ? openChat(location.hash.slice(1)) : newChat())
	for (const message of await store.messages("state", "running")) {
		const own = chat.messages.get(message.id), record = own ? chat.record : await store.chat(message.chat)
		if (record) answers.resume(own ? chat : new Chat(record, await store.messages("chat", record.id)), own ?? message)
	}
}

start()
