// ---- Markdown as nodes of the page. Nothing of a text becomes HTML, a script or an address that is fetched: there are
// only the elements made here, and links of three schemes.

const DEEPEST = 10 // quotes, lists and emphasis within each other; what is deeper stays text
const TOGETHER = 40 // lines of code that are laid out as one piece
const PIECES = /[^]{1,4000}(?=\s|$)|[^]{1,4000}/gu // what is read at once

function make(name, properties = {}, ...children) {
	const element = Object.assign(document.createElement(name), properties)
	element.append(...children)
	return element
}

// -- blocks: {start, source, make, shell, parts}. start: the first line. make: makes the element, empty where it has
// `parts()`, with which it is filled again and again as long as its `shell` is the same.

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]|$)/
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])([ \t]+|$)/
const QUOTE = /^ {0,3}> ?/
const MATH = {$$: "$$", "\\[": "\\]"}

const blank = line => line.trim() === ""
const indent = line => line.length - line.trimStart().length
const isRule = line => indent(line) < 4 && /^([-*_])\1\1+$/.test(line.replace(/[ \t]/g, ""))
const mathEnd = line => MATH[line.trimStart().slice(0, 2)]
const isRow = line => line.includes("|")
const startsBlock = line => FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || isRule(line) || mathEnd(line)
	|| /^ {0,3}(?:[-*+]|1[.)])[ \t]+\S/.test(line)

// How many lines pass a test, from one on.
function run(lines, from, test) {
	let at = from
	while (at < lines.length && test(lines[at])) at++
	return at - from
}

function blocksOf(lines, depth = 0) {
	const blocks = []
	for (let start = 0; start < lines.length;) {
		const rest = lines.slice(start), found = blank(rest[0]) ? {size: 1} : READERS.map(read => read(rest, depth)).find(Boolean)
		const source = rest.slice(0, found.size).join("\n")
		if (found.make) blocks.push({start, source, ...found})
		else for (const piece of source.trim().match(PIECES) ?? []) blocks.push({start, source: piece, make: () => make("p", {}, inline(piece.trim()))})
		start += found.size
	}
	return blocks
}

// -- readers: the block that the first of some lines begins, with its size in lines

function readCode(lines) {
	const match = FENCE.exec(lines[0])
	if (!match) return null
	const name = match[2].trim().split(/\s/)[0].slice(0, 40), cut = indent(lines[0]), pieces = []
	const ends = line => indent(line) < 4 && line.trim().startsWith(match[1]) && /^(`+|~+)$/.test(line.trim())
	const end = 1 + run(lines, 1, line => !ends(line)), own = lines.slice(1, end).map(line => line.slice(Math.min(cut, indent(line))))
	for (let at = 0; at < own.length; at += TOGETHER) {
		const source = own.slice(at, at + TOGETHER).join("\n") + "\n"
		pieces.push({source, make: () => make("code", {}, source)})
	}
	return {size: end + 1, shell: `code ${name}`, make: () => codeNode(name), parts: () => pieces}
}

function readHeading(lines) {
	const match = HEADING.exec(lines[0]), text = match && lines[0].slice(match[0].length).trim().replace(/(^|[ \t])#+$/, "")
	return match && {size: 1, make: () => make("h" + Math.min(6, match[1].length + 2), {}, inline(text))}
}

const readRule = lines => isRule(lines[0]) && {size: 1, make: () => make("hr")}

function readQuote(lines, depth) {
	const size = depth < DEEPEST ? run(lines, 0, line => QUOTE.test(line)) : 0
	const inner = () => blocksOf(lines.slice(0, size).map(line => line.replace(QUOTE, "")), depth + 1)
	return size > 0 && {size, shell: "quote", make: () => make("blockquote"), parts: inner}
}

// Items of one kind of marker. What is indented by two or more, or as far as the item's text, is the item's.
function readList(lines, depth) {
	const kind = line => ITEM.exec(line)?.[2].replace(/\d+/, "1"), first = kind(lines[0]), number = parseInt(lines[0], 10), items = []
	let at = 0
	while (depth < DEEPEST && first && at < lines.length && kind(lines[at]) === first && !isRule(lines[at])) {
		const [all, before, marker] = ITEM.exec(lines[at]), least = before.length + marker.length + 1
		const width = all.length > least + 3 ? least : all.length, near = Math.min(width, before.length + 2)
		const own = [lines[at++].slice(width).replace(/^\[([ xX])\] /, (_, mark) => mark === " " ? "☐ " : "☑ ")]
		for (let gap = blank(own[0]); at < lines.length; at++) {
			const line = lines[at]
			if (!blank(line) && indent(line) < near && (gap || startsBlock(line) || ITEM.test(line))) break
			gap = blank(line)
			own.push(line.slice(Math.min(width, indent(line))))
		}
		items.push({source: own.join("\n"), shell: "item", make: () => make("li"), parts: () => blocksOf(own, depth + 1)})
	}
	const node = () => number >= 0 ? make("ol", number === 1 ? {} : {start: number}) : make("ul")
	return at > 0 && {size: at, shell: `list ${first} ${number}`, make: node, parts: () => items}
}

function readTable(lines) {
	const sides = isRow(lines[0]) && isRow(lines[1] ?? "") && cells(lines[1]), size = run(lines, 0, isRow)
	if (!sides || !sides.every(side => /^:?-+:?$/.test(side)) || cells(lines[0]).length !== sides.length) return null
	const align = sides.map(side => side.endsWith(":") ? (side[0] === ":" ? "center" : "right") : "")
	const table = () => {
		const inside = make("tbody"), head = make("thead", {}, rowNode(lines[0], align, "th"))
		return make("div", {className: "table", tabIndex: 0, inside}, make("table", {}, head, inside))
	}
	const rows = () => lines.slice(2, size).map(source => ({source, make: () => rowNode(source, align, "td")}))
	return {size, shell: lines[0] + lines[1], make: table, parts: rows}
}

// Also math that begins a line, whatever its other lines begin with.
function readParagraph(lines) {
	const end = mathEnd(lines[0]), open = end && !lines[0].includes(end, indent(lines[0]) + 2)
	return {size: 1 + Boolean(open) + run(lines, 1, line => !blank(line) && !(open ? line.includes(end) : startsBlock(line)))}
}

const READERS = [readCode, readHeading, readRule, readQuote, readList, readTable, readParagraph]

const cells = row => row.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/).map(cell => cell.replace(/\\\|/g, "|").trim())

function rowNode(line, align, name) {
	const texts = cells(line)
	return make("tr", {}, ...align.map((side, place) => {
		const cell = make(name, {}, inline(texts[place] ?? ""))
		cell.style.textAlign = side
		return cell
	}))
}

function codeNode(name) {
	const inside = make("pre", {tabIndex: 0}), copy = copyButton("copyCode", () => inside.textContent.slice(0, -1))
	return make("figure", {className: "code", inside}, make("figcaption", {}, make("span", {}, name), copy), inside)
}

// -- what is within a line

const TOKEN = new RegExp([
	/(?<math>\$\$[^]+?\$\$|\\\([^]+?\\\)|\\\[[^]+?\\\]|\$(?![\s$])[^$\n]{0,500}(?<!\s)\$(?!\d))/,
	/\\?(?<line>\n)|<(?<br>br ?\/?)>|\\(?<escaped>[!-\/:-@[-`{-~])/,
	/(?<ticks>(?<!`)`+(?!`))(?<code>[^]*?[^`])\k<ticks>(?!`)|(?<text>`+)/,
	/(?<open>!?\[)|(?<close>\])(?:\([ \t]{0,9}(?:<(?<wide>[^<>\n]{0,2000})>|(?<url>(?:[^\s()]|\([^\s()]{0,500}\)){0,2000}))(?:[ \t]{1,9}["'(][^\n)]{0,500})?[ \t]{0,9}\))?/,
	/<(?<angle>(?:https?:\/\/|mailto:)[^\s<>]{1,2000})>|(?<!\w)(?<address>https?:\/\/[!#$%&'()*+,\-./\w:;=?@[\]~]{1,2000})/,
	/(?<mark>[*_~])\k<mark>*/,
].map(pattern => pattern.source).join("|"), "gi")
const EMPHASIS = {"*": ["em", "strong"], _: ["em", "strong"], "~": [null, "del"]}

// An address that may be linked, else "".
function linkable(text) {
	if (!/^(?:https?:\/\/|mailto:)[^\s\p{Cc}\p{Cf}]{1,2000}$/iu.test(text) || !URL.canParse(text)) return ""
	const url = new URL(text)
	return url.password ? "" : url.href
}

const anchor = (url, ...children) =>
	make("a", {href: url, title: url, target: "_blank", rel: "noopener noreferrer nofollow"}, ...children)

function inline(text) {
	const whole = document.createDocumentFragment()
	for (const piece of text.match(PIECES) ?? []) whole.append(inlinePiece(piece))
	return whole
}

function inlinePiece(text) {
	const out = [] // texts, {node, depth}, and {mark, size}, which may still become the beginning of something
	const marks = {"*": [], _: [], "~": [], "[": []} // their places in `out`
	let at = 0
	const put = (node, depth = 1) => out.push({node, depth})
	const nodes = items => {
		const some = document.createDocumentFragment()
		some.append(...items.map(item => item.node ?? item.mark?.repeat(item.size) ?? item))
		some.normalize()
		return some
	}
	// Puts a node in the place of all that came from `place` on; marks in there begin nothing any more.
	const wrap = (place, node, depth) => {
		out.length = place
		for (const places of Object.values(marks)) while (places.at(-1) >= place) places.pop()
		put(node, depth)
	}
	// Ends what marks of this kind have begun -> how many of them are left.
	const close = (mark, size) => {
		for (const places = marks[mark]; size && places.length;) {
			const place = places.at(-1), open = out[place], taken = Math.min(2, size, open.size), inner = out.slice(place + 1)
			const depth = 1 + Math.max(0, ...inner.map(item => item.depth ?? 0))
			if (!inner.length || depth > DEEPEST) {places.length = 0; break}
			open.size -= taken
			size -= taken
			wrap(open.size ? place + 1 : place, make(EMPHASIS[mark][taken - 1], {}, nodes(inner)), depth)
		}
		return size
	}
	const emphasis = (mark, size, before = " ", after = " ") => {
		const inWord = mark === "_" && /[\p{L}\p{N}]{2}/u.test(before + after)
		if (size > 3 || inWord || (mark === "~" && size !== 2)) return out.push(mark.repeat(size))
		if (!/\s/.test(before)) size = close(mark, size)
		if (size && !/\s/.test(after)) marks[mark].push(out.length)
		if (size) out.push({mark, size})
	}
	for (let match; (match = TOKEN.exec(text)); TOKEN.lastIndex = at) {
		const [whole] = match, found = match.groups, {index} = match
		if (index > at) out.push(text.slice(at, index))
		at = index + whole.length
		if (found.math) put(make("span", {className: "math"}, whole))
		else if (found.line || found.br) put(make("br"))
		else if (found.code) put(make("code", {}, found.code.replace(/\n/g, " ").replace(/^ (.*[^ ].*) $/, "$1")))
		else if (found.open) {marks["["].push(out.length); out.push({mark: whole, size: 1})}
		else if (found.close) {
			const place = marks["["].pop(), url = place === undefined ? "" : linkable(found.wide ?? found.url ?? ""), inner = out.slice(place + 1)
			if (!url) {out.push("]"); at = index + 1; continue}
			wrap(place, anchor(url, inner.length ? nodes(inner) : url), 1)
			marks["["].length = 0 // no link within a link
		} else if (found.angle || found.address) {
			let shown = found.angle ?? whole
			while (!found.angle && (/[.,;:!?'*_~\]]$/.test(shown) || (shown.endsWith(")") && !shown.includes("(")))) shown = shown.slice(0, -1)
			const url = linkable(shown)
			if (!found.angle || !url) at = index + (url ? shown.length : 1)
			if (url) put(anchor(url, shown)); else out.push(text[index])
		} else if (found.mark) emphasis(found.mark, whole.length, text[index - 1], text[at])
		else out.push(found.escaped ?? whole)
	}
	out.push(text.slice(at))
	return nodes(out)
}

// -- a text that grows

// Gives an element the children of some parts, from one on; what has the same source stays.
function show(element, parts, from = 0) {
	parts.forEach((part, place) => {
		let node = element.children[from + place]
		if (node?.source === part.source) return
		if (!part.shell || node?.shell !== part.shell) {
			const fresh = Object.assign(part.make(), {shell: part.shell})
			if (node) node.replaceWith(fresh)
			else element.append(fresh)
			node = fresh
		}
		if (part.parts) show(node.inside ?? node, part.parts())
		node.source = part.source
	})
	while (element.children.length > from + parts.length) element.lastChild.remove()
}

// Shows a Markdown text in an element while it is written.
class MarkdownView {
	constructor(root) {
		Object.assign(this, {root, text: "", settled: 0, firm: 0}) // characters whose nodes stay, and these nodes
	}

	// Show more of the text. It settles before the last block whose first line is whole.
	push(more) {
		this.text += more
		const lines = this.text.slice(this.settled).split("\n"), blocks = blocksOf(lines)
		show(this.root, blocks, this.firm)
		const start = blocks.findLast(block => block.start < lines.length - 1)?.start ?? 0
		this.firm += blocks.filter(block => block.start < start).length
		this.settled += lines.slice(0, start).reduce((sum, line) => sum + line.length + 1, 0)
	}
}
