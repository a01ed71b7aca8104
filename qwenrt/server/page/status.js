// ---- What is said about the server, and to it: banners, the key, which model serves.

const $ = id => document.getElementById(id)
const composing = event => event.isComposing || event.keyCode === 229 // Enter chooses a word of an input method

// What Enter and Escape do in a field.
function onKeys(field, enter, escape) {
	field.onkeydown = event => {
		const action = composing(event) || event.shiftKey ? null : {Enter: enter, Escape: escape}[event.key]
		if (!action) return
		event.preventDefault()
		event.stopPropagation()
		action()
	}
}

let banner = null // {words: () => text, go: words of the button, action}

function showBanner(next) {
	banner = next
	$("banner").hidden = !next
	if (!next) return
	setText($("banner-text"), next.words())
	$("banner-go").hidden = !next.go
	if (next.go) setText($("banner-go"), say(next.go))
}

// A sentence that goes away, with a button for an action.
function toast(words, action = null) {
	const hide = () => {$("toast").hidden = true}
	setText($("toast-text"), words)
	$("toast-go").hidden = !action
	$("toast-go").onclick = () => {hide(); action()}
	$("toast").hidden = false
	clearTimeout(toast.timer)
	toast.timer = setTimeout(hide, 8000)
}

// Asks the server what it is, until it says so.
async function learn() {
	for (let tries = 0; !server.info; tries++) {
		try {
			await server.learn()
		} catch (error) {
			if (error.kind === "key") {await askKey(); tries = -1; continue}
			const passes = ["gone", "stopping", "busy"].includes(error.kind), words = left => passes ? say(error.kind, left) : say("problem", error.message)
			await countdown(Math.min(2 ** tries, 15), (left, action) => showBanner({words: () => words(left), go: "tryNow", action}))
		}
	}
	showBanner(null)
	drawServer()
}

// Asks for the key -> when there is one to try. Who closes the question can come back to it.
let asking = null
function askKey() {
	asking ??= new Promise(resolve => {
		const ask = () => {
			$("key-why").textContent = say(key() ? "keyWrong" : "keyMissing")
			$("key-value").value = ""
			if (!$("key").open) $("key").showModal()
		}
		$("key").onclose = () => {
			if ($("key").returnValue !== "use") return showBanner({words: () => say("needsKey"), go: "enterKey", action: ask})
			sessionStorage.setItem("key", $("key-value").value.trim())
			showBanner(null)
			asking = null
			resolve()
		}
		ask()
	})
	return asking
}

function drawServer() {
	const {info} = server
	if (!info) return
	const dtype = String(info.dtype).replace("torch.", ""), local = /^(localhost|127\.|\[::1\])/.test(location.hostname)
	$("about").textContent = [info.model, info.device, dtype, info.kernels].join(" · ")
	$("about").title = say("aboutModel")
	$("about").hidden = false
	$("hello-model").textContent = say(info.built_in ? "toy" : local ? "talkTo" : "talkToRemote", info.model, location.host)
	const ideas = inLanguage(WORDS[info.built_in ? "toyIdeas" : "ideas"])
	$("ideas").replaceChildren(...ideas.map(idea => make("button", {className: "small", onclick: () => write(idea)}, idea)))
	$("facts").textContent = `${$("about").textContent} · ${say("tokens", count(info.max_model_len))} · qwenrt ${info.version}`
	for (const field of SAMPLING) $(field).placeholder = info.sampling?.[field] ?? ""
	drawSettings()
	drawContext()
}
