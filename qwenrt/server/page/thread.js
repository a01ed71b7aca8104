// ---- The messages of a chat on the page.

const ICONS = {
	close: "M6 6l12 12M18 6L6 18", plus: "M12 5v14M5 12h14", theme: "M12 3a9 9 0 1 0 0 18zM12 3a9 9 0 0 1 0 18",
	sliders: "M4 7h10M18 7h2M4 17h2M10 17h10M16 5v4M8 15v4", menu: "M4 7h16M4 12h16M4 17h16", down: "M12 5v14M6 13l6 6 6-6",
	up: "M12 19V5M6 11l6-6 6 6", stop: "M6 6h12v12H6z",
	bulb: "M9 18h6M10 21h4M9.4 16C9.4 13 6 12.5 6 9a6 6 0 0 1 12 0C18 12.5 14.6 13 14.6 16z",
	copy: "M9 9h11v11H9zM5 15H4V4h11v1", check: "M5 13l4.5 4.5L19 7", edit: "M4 20h4L19 9l-4-4L4 16z", again: "M20 11a8 8 0 1 0-2 6M20 5v6h-6",
	before: "M15 6l-6 6 6 6", after: "M9 6l6 6-6 6", remove: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
}

function icon(name) {
	const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), path = document.createElementNS(svg.namespaceURI, "path")
	for (const [key, value] of Object.entries({viewBox: "0 0 24 24", class: "icon", "aria-hidden": true})) svg.setAttribute(key, value)
	path.setAttribute("d", ICONS[name])
	svg.append(path)
	return svg
}

const iconButton = (name, words, onclick) =>
	make("button", {type: "button", className: "icon", title: say(words), ariaLabel: say(words), onclick}, icon(name))

const button = (words, onclick) => make("button", {type: "button", className: "small", onclick}, say(words))

// A button that puts a text on the clipboard, and says so.
function copyButton(words, text) {
	const copy = iconButton("copy", words, async () => {
		try {
			await navigator.clipboard.writeText(text())
		} catch { // not in a secure context: a page of another machine without TLS
			const field = make("textarea", {value: text(), className: "sr"})
			copy.append(field)
			field.select()
			document.execCommand("copy")
			copy.focus()
		}
		copy.replaceChildren(icon("check"))
		announce(say("copied"))
		setTimeout(() => copy.replaceChildren(icon("copy")), 1500)
	})
	return copy
}

const LETTERS = {ja: /[\u3040-\u30ff]/, ko: /[\uac00-\ud7af]/, zh: /[\u4e00-\u9fff]/, en: /[a-z]{3}/i}

// The language of a text by its letters, where they tell.
const languageOf = text => Object.keys(LETTERS).find(name => LETTERS[name].test(text.slice(0, 400))) ?? ""

// Whole sentences for who listens.
function announce(text) {
	const words = text.replace(/[*_`#>|]+/g, " ").trim()
	if (words) $("said").append(make("p", {lang: languageOf(words)}, words))
	while ($("said").childElementCount > 40) $("said").firstChild.remove()
}

function setText(node, text) {if (node.textContent !== text) node.textContent = text}

// One message.
class MessageView {
	constructor(chat, message) {
		Object.assign(this, {chat, message, told: message.state === "running" ? message.text.length : Infinity})
		this.node = make("article", {className: `message ${message.role}`, ariaLabel: say(message.role === "user" ? "you" : "assistant")})
		if (message.role === "user") this.drawUser()
		else this.buildAnswer()
	}

	drawUser() {
		this.shape = this.chat.versions(this.message).length
		const {text, files} = this.message, parts = []
		if (files.length) parts.push(make("ul", {className: "chips", ariaLabel: say("attached")}, ...files.map(file => make("li", {}, file.name))))
		if (text) parts.push(make("div", {className: "body", lang: languageOf(text)}, text))
		const tools = [this.branches(), copyButton("copy", () => wholeText(this.message)), iconButton("edit", "edit", () => this.edit())]
		this.node.replaceChildren(...parts, make("div", {className: "tools"}, ...tools))
	}

	edit() {
		const {text} = this.message, field = make("textarea", {value: text, rows: Math.min(12, text.split("\n").length + 1), ariaLabel: say("edit")})
		const leave = () => {this.drawUser(); this.node.querySelector(".tools button:last-child").focus()}
		const go = button("send", () => {if (field.value.trim()) actions.edited(this.message, field.value)})
		go.classList.add("main")
		onKeys(field, () => go.click(), leave)
		this.node.replaceChildren(field, make("div", {className: "buttons"}, button("cancel", leave), go))
		field.focus()
	}

	branches() {
		const versions = this.chat.versions(this.message), place = versions.indexOf(this.message), many = versions.length
		if (many < 2) return ""
		const step = (name, to) => Object.assign(iconButton(name, name, () => actions.show(versions[to], name)), {disabled: !versions[to]})
		const shown = make("span", {ariaHidden: "true"}, `${place + 1}/${many}`), label = make("span", {className: "sr"}, say("version", place + 1, many))
		return make("span", {className: "branches"}, step("before", place - 1), shown, label, step("after", place + 1))
	}

	// -- answers

	buildAnswer() {
		const part = name => make("div", {className: name})
		this.thought = make("details", {className: "thought", hidden: true}, make("summary"), part("text"))
		Object.assign(this, {body: part("text"), note: part("note"), tools: part("tools")})
		this.node.append(this.thought, this.body, this.note, this.tools)
		this.views = [new MarkdownView(this.thought.lastChild), new MarkdownView(this.body)]
	}

	// Shows at most `most` more characters -> whether that is all there is.
	grow(most = Infinity) {
		const texts = [this.message.thought, this.message.text]
		return !this.views || this.views.map((view, which) => {
			const more = texts[which].slice(view.text.length, view.text.length + most)
			if (more) view.push(more)
			return view.text.length >= texts[which].length
		}).every(Boolean)
	}

	// Draws what is around the text.
	draw(live) {
		const {message} = this, running = message.state === "running", thinks = running && !message.text, many = this.chat.versions(message).length
		if (!this.views) return void (this.shape === many || this.node.querySelector("textarea") || this.drawUser())
		this.node.classList.toggle("running", running && !live?.note)
		this.body.lang = languageOf(message.text)
		this.thought.hidden = !message.thought
		this.thought.classList.toggle("live", thinks)
		setText(this.thought.firstChild, thinks ? say("thinking") : message.thinkMs ? say("thoughtFor", count(Math.round(message.thinkMs / 100) / 10)) : say("thought"))
		this.drawNote(live, thinks)
		const shape = [message.state, many, language, thinks].join()
		if (shape !== this.shape) {
			const buttons = running ? [] : [this.branches(), copyButton("copy", () => message.text), iconButton("again", "again", () => actions.again(message))]
			this.tools.replaceChildren(...buttons, make("span", {className: "figures"}))
		}
		this.shape = shape
		setText(this.tools.lastChild, running ? figures(live ?? {}) : figures(message.usage ?? {}))
		this.tell(!running)
	}

	drawNote(live, thinks) {
		const {message} = this, {note, progress} = live ?? {}, begun = message.thought || message.text
		const shape = JSON.stringify([message.state, note, message.problem, progress, thinks, language])
		if (shape === this.noted) return
		this.noted = shape
		const waiting = () => progress ? say("reading", count(progress.processed), count(progress.total)) : say("waiting")
		const parts = note ? this.delay(note, live) : message.state !== "running" ? this.end() : !begun ? [waiting()]
			: thinks ? [button("answerNow", () => actions.answerNow(live))] : []
		this.note.hidden = !parts.length
		this.note.classList.toggle("warn", Boolean(note) || ["failed", "lost"].includes(message.state))
		const [words, way] = parts
		if (way && this.note.lastChild?.textContent === way.textContent) this.note.firstChild.data = words // its focus stays
		else this.note.replaceChildren(...parts)
	}

	// Why an answer does not come.
	delay(note, live) {
		if (note.kind === "key") return [say("needsKey"), button("enterKey", actions.enterKey)]
		return [say(note.kind, note.left), ...(note.left ? [button("tryNow", () => live.wake?.())] : [])]
	}

	// How an answer ended, and the ways on.
	end() {
		const {message} = this, {state, problem} = message
		if (state === "done") return []
		if (problem?.kind === "full") return actions.tooLong(message, problem)
		const words = state !== "failed" ? say(state) : problem.kind === "slow" ? say("slow") : say("problem", problem.message)
		return [words, button(message.text || message.thought ? "goOn" : "tryAgain", () => actions.goOn(message))]
	}

	// Announces the sentences that are whole by now.
	tell(all) {
		const {text} = this.message, rest = text.slice(this.told), match = all ? [rest] : /^[^]*(?:[.!?…](?=\s)|[。！？\n])/.exec(rest)
		if (!rest || !match) return
		this.told += match[0].length
		for (const sentence of match[0].split(/(?<=[.!?…])\s+|(?<=[。！？])|\n+/)) announce(sentence)
	}
}

// What an answer took, or takes.
const figures = ({written, rate}) => written ? say("figures", count(written), rate ? count(Number(rate.toPrecision(3))) : "–") : ""
