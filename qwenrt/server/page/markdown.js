// ---- Markdown as nodes of the page. Nothing of a text becomes HTML, a script or an address that is fetched: there are
// only the elements made here, and links of three schemes. All of it takes time in proportion to the text.

const DEEPEST = 10; // quotes, lists and emphasis within each other; what is deeper stays text
const LINES_TOGETHER = 40; // of code, laid out as one piece
const LONGEST_PARAGRAPH = 4000; // characters; a longer one becomes several

/** An element with properties and children. */
function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]|$)/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])([ \t]+|$)/;
const QUOTE = /^ {0,3}> ?/;
const MATH = { "$$": "$$", "\\[": "\\]" };

const blank = line => line.trim() === "";
const indent = line => line.length - line.trimStart().length;
const isRule = line => indent(line) < 4 && /^([-*_])\1\1+$/.test(line.replace(/[ \t]/g, ""));

/** The cells of a table's row. */
function cells(line) {
  const found = [];
  let cell = "";
  const row = line.trim();
  for (let i = row[0] === "|" ? 1 : 0; i < row.length; i++) {
    if (row[i] === "\\" && row[i + 1] === "|") cell += row[++i];
    else if (row[i] === "|") { found.push(cell.trim()); cell = ""; }
    else cell += row[i];
  }
  if (cell.trim() || !row.endsWith("|")) found.push(cell.trim());
  return found;
}

/** How the columns of a table are aligned, from the line below its head; null where it is none. */
function alignment(line) {
  if (line === undefined || !line.includes("-") || !line.includes("|")) return null;
  const parts = cells(line);
  if (!parts.every(part => /^:?-+:?$/.test(part))) return null;
  return parts.map(part => part.endsWith(":") ? (part[0] === ":" ? "center" : "right") : "");
}

const startsBlock = line => FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || isRule(line)
  || line.trimStart().slice(0, 2) in MATH || /^ {0,3}(?:[-*+]|1[.)])[ \t]+\S/.test(line);

/** The blocks of some lines, each with the line where it starts. within: the rows of a table (its alignment) or the
    "paragraph" in which the lines begin. */
function blocksOf(lines, depth = 0, within = null) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at], start = at, goesOn = at === 0 && within;
    let match, aligned;
    if (blank(line)) {
      at++;
    } else if (goesOn && within !== "paragraph" && line.includes("|")) {
      while (at < lines.length && lines[at].includes("|")) at++;
      found.push({ kind: "table", start, align: within, rows: rowsOf(lines, start, at) });
    } else if (goesOn === "paragraph") {
      at = paragraphIn(lines, at, found);
    } else if ((match = FENCE.exec(line))) {
      at = codeIn(lines, at, match, found);
    } else if ((match = HEADING.exec(line))) {
      const text = line.slice(match[0].length).trim().replace(/(^|[ \t])#+$/, "");
      found.push({ kind: "heading", start, level: match[1].length, text });
      at++;
    } else if (isRule(line)) {
      found.push({ kind: "rule", start });
      at++;
    } else if (QUOTE.test(line) && depth < DEEPEST) {
      while (at < lines.length && QUOTE.test(lines[at])) at++;
      const inner = lines.slice(start, at).map(one => one.replace(QUOTE, ""));
      found.push({ kind: "quote", start, blocks: blocksOf(inner, depth + 1) });
    } else if (ITEM.test(line) && depth < DEEPEST) {
      at = listIn(lines, at, depth, found);
    } else if (line.trimStart().slice(0, 2) in MATH) {
      at = mathIn(lines, at, found);
    } else if (line.includes("|") && (aligned = alignment(lines[at + 1])) && cells(line).length === aligned.length) {
      for (at += 2; at < lines.length && lines[at].includes("|");) at++;
      found.push({ kind: "table", start, head: line, align: aligned, rows: rowsOf(lines, start + 2, at) });
    } else {
      at = paragraphIn(lines, at, found);
    }
  }
  return found;
}

const rowsOf = (lines, from, to) => lines.slice(from, to).map((line, place) => ({ start: from + place, line }));

function paragraphIn(lines, start, found) {
  let at = start + 1;
  while (at < lines.length && !blank(lines[at]) && !startsBlock(lines[at])) at++;
  const text = lines.slice(start, at).join("\n");
  for (let skip = 0; skip < text.length;) {
    const rest = text.length - skip;
    const space = rest > LONGEST_PARAGRAPH ? text.lastIndexOf(" ", skip + LONGEST_PARAGRAPH) : -1;
    const end = rest <= LONGEST_PARAGRAPH ? text.length : space > skip ? space + 1 : skip + LONGEST_PARAGRAPH;
    found.push({ kind: "paragraph", start, skip, text: text.slice(skip, end).trim() });
    skip = end;
  }
  return at;
}

function codeIn(lines, start, [, fence, info], found) {
  const cut = indent(lines[start]), own = [];
  let at = start + 1, closed = false;
  for (; at < lines.length && !closed; at++) {
    const trimmed = lines[at].trim();
    closed = trimmed.startsWith(fence) && indent(lines[at]) < 4 && /^(`+|~+)$/.test(trimmed);
    if (!closed) own.push(lines[at].slice(Math.min(cut, indent(lines[at]))));
  }
  found.push({ kind: "code", start, name: info.trim().split(/\s/)[0].slice(0, 40), lines: own });
  return at;
}

function mathIn(lines, start, found) {
  const end = MATH[lines[start].trimStart().slice(0, 2)];
  let at = start;
  const closed = () => lines[at].indexOf(end, at === start ? indent(lines[at]) + 2 : 0) >= 0;
  while (at < lines.length && !blank(lines[at]) && !closed()) at++;
  if (at < lines.length && !blank(lines[at])) at++;
  found.push({ kind: "math", start, text: lines.slice(start, at).join("\n").trim() });
  return at;
}

/** A list: items of one kind of marker. What is indented by two or more, or as far as the item's text, is the item's. */
function listIn(lines, start, depth, found) {
  const kind = marker => /\d/.test(marker) ? marker.at(-1) : marker;
  const first = ITEM.exec(lines[start])[2], items = [];
  let at = start;
  while (at < lines.length) {
    const match = ITEM.exec(lines[at]);
    if (!match || kind(match[2]) !== kind(first) || isRule(lines[at])) break;
    const width = match[0].length > match[1].length + match[2].length + 4 ? match[1].length + match[2].length + 1 : match[0].length;
    const own = [lines[at].slice(width)], began = at++;
    let gap = blank(own[0]);
    for (; at < lines.length; at++) {
      const line = lines[at], inner = indent(line) >= Math.min(width, match[1].length + 2);
      if (!blank(line) && !inner && (gap || startsBlock(line) || ITEM.test(line))) break;
      if (gap && blank(line) && at + 1 < lines.length && blank(lines[at + 1])) { at++; break; }
      gap = blank(line);
      own.push(line.slice(Math.min(width, indent(line))));
    }
    items.push({ start: began, blocks: blocksOf(own, depth + 1) });
    while (at < lines.length && blank(lines[at]) && ITEM.test(lines[at + 1] ?? "")) at++;
  }
  const number = parseInt(first, 10);
  found.push({ kind: "list", start, ordered: !Number.isNaN(number), number, marker: kind(first), items });
  return at;
}

// ---- blocks as nodes

const MAKERS = {
  heading: block => make("h" + Math.min(6, block.level + 2), {}, inline(block.text)),
  rule: () => make("hr"),
  quote: block => make("blockquote", {}, ...block.blocks.map(nodeOf)),
  math: block => make("p", { className: "math" }, block.text),
  paragraph: block => make("p", {}, inline(block.text)),
  list: block => {
    const list = make(block.ordered ? "ol" : "ul", {}, ...block.items.map(itemNode));
    if (block.ordered && block.number !== 1) list.start = block.number;
    return list;
  },
  table: block => {
    const head = make("thead", {}, rowNode(block.head, block.align, "th"));
    const body = make("tbody", {}, ...block.rows.map(row => rowNode(row.line, block.align, "td")));
    const frame = make("div", { className: "table", tabIndex: 0, role: "region", ariaLabel: say("table") });
    frame.append(make("table", {}, head, body));
    return frame;
  },
  code: block => {
    const label = make("span", {}, block.name), pre = make("pre", { tabIndex: 0, role: "region", ariaLabel: say("code") });
    const copy = iconButton("copy", "copyCode", () => copyText(copy, pre.textContent.slice(0, -1)));
    fillCode(pre, block.lines);
    return make("figure", { className: "code" }, make("figcaption", {}, label, copy), pre);
  },
};

function nodeOf(block) {
  return MAKERS[block.kind](block);
}

function itemNode(item) {
  const node = make("li", {}, ...item.blocks.map(nodeOf)), first = node.firstChild;
  const box = first?.nodeName === "P" && /^\[([ xX])\] /.exec(first.firstChild?.data ?? "");
  if (box) first.firstChild.replaceData(0, 3, box[1] === " " ? "☐" : "☑");
  return node;
}

function rowNode(line, align, name) {
  const row = make("tr"), texts = cells(line);
  align.forEach((side, place) => {
    const cell = make(name, {}, inline(texts[place] ?? ""));
    if (name === "th") cell.scope = "col";
    if (side) cell.style.textAlign = side;
    row.append(cell);
  });
  return row;
}

/** Makes a <pre> have these lines, of which it may have the first already; in pieces, so that a long one can grow. */
function fillCode(pre, lines) {
  for (let at = Math.max(0, (pre.childElementCount - 1) * LINES_TOGETHER); at < lines.length; at += LINES_TOGETHER) {
    const text = lines.slice(at, at + LINES_TOGETHER).join("\n") + "\n", piece = pre.children[at / LINES_TOGETHER];
    if (!piece) pre.append(make("code", {}, text));
    else if (piece.textContent !== text) piece.textContent = text;
  }
}

// ---- what is within a line

const SPECIAL = /[\\`*_~[\]!<$\n]|https?:\/\//g;
const EMPHASIS = { "*": ["em", "strong"], _: ["em", "strong"], "~": [null, "del"] };
const PUNCTUATION = /[!-/:-@[-`{-~]/;

/** An address that may be linked, else null. */
function linkable(text) {
  if (text.length > 2000 || !/^(?:https?:\/\/|mailto:)[^\s\p{Cc}\p{Cf}]+$/iu.test(text)) return null;
  try {
    const url = new URL(text);
    return ["http:", "https:", "mailto:"].includes(url.protocol) && !url.password ? url.href : null;
  } catch { return null; }
}

function anchor(url, ...children) {
  return make("a", { href: url, title: url, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}

/** The text of a paragraph, heading or cell as a fragment. */
function inline(text) {
  return new Inline(text).read();
}

class Inline {
  constructor(text) {
    this.text = text;
    this.out = []; // texts, {node, depth}, and marks that may still become the beginning of something
    this.marks = { "*": [], _: [], "~": [], "[": [] }; // their places in `out`
    this.at = 0;
    this.missing = new Set(); // what ends something and is not in the rest of the text
  }

  read() {
    const { text } = this;
    while (this.at < text.length) {
      SPECIAL.lastIndex = this.at;
      const match = SPECIAL.exec(text), next = match ? match.index : text.length;
      if (next > this.at) this.out.push(text.slice(this.at, next));
      this.at = next;
      if (match) this.special(match[0]);
    }
    return this.nodes(this.out);
  }

  nodes(items) {
    const fragment = document.createDocumentFragment();
    let text = "";
    for (const item of items) {
      if (!item.node) { text += typeof item === "string" ? item : item.mark.repeat(item.size); continue; }
      if (text) fragment.append(text);
      fragment.append(item.node);
      text = "";
    }
    if (text) fragment.append(text);
    return fragment;
  }

  put(node, length) {
    this.out.push({ node, depth: 1 });
    this.at += length;
  }

  plain(text) {
    this.out.push(text);
    this.at += text.length;
  }

  special(mark) {
    const { text, at } = this, next = text[at + 1] ?? "";
    if (mark === "\n") this.put(make("br"), 1);
    else if (mark === "\\") this.backslash(next);
    else if (mark === "`") this.code();
    else if (mark in EMPHASIS) this.emphasis(mark);
    else if (mark === "[") this.bracket("[");
    else if (mark === "!") { if (next === "[") this.bracket("!["); else this.plain("!"); }
    else if (mark === "]") this.link();
    else if (mark === "<") this.angle();
    else if (mark === "$") this.dollar(next);
    else this.address();
  }

  backslash(next) {
    if (next === "(" && this.verbatim("\\(", "\\)") || next === "[" && this.verbatim("\\[", "\\]")) return;
    if (next === "\n") this.put(make("br"), 2);
    else if (next && PUNCTUATION.test(next)) { this.out.push(next); this.at += 2; }
    else this.plain("\\");
  }

  /** Math, left as it is written. */
  verbatim(open, close, farthest = Infinity) {
    if (this.missing.has(close)) return false;
    const end = this.text.indexOf(close, this.at + open.length);
    if (end < 0) this.missing.add(close);
    if (end < 0 || end - this.at > farthest) return false;
    const length = end + close.length - this.at;
    this.put(make("span", { className: "math" }, this.text.substr(this.at, length)), length);
    return true;
  }

  dollar(next) {
    if (next === "$" && this.verbatim("$$", "$$", 2000)) return;
    const match = /\$(?![\s$])[^$\n]{0,500}(?<!\s)\$(?!\d)/y;
    match.lastIndex = this.at;
    const found = match.exec(this.text);
    if (found) this.put(make("span", { className: "math" }, found[0]), found[0].length);
    else this.plain("$");
  }

  code() {
    const { text, at } = this;
    let size = 1;
    while (text[at + size] === "`") size++;
    const ticks = "`".repeat(size);
    let end = this.missing.has(ticks) ? -1 : at;
    while (end >= 0) {
      end = text.indexOf(ticks, end + (end === at ? size : 1));
      if (end < 0 || (text[end - 1] !== "`" && text[end + size] !== "`")) break;
      while (text[end + 1] === "`") end++;
    }
    if (end < 0) { this.missing.add(ticks); this.plain(ticks); return; }
    let inner = text.slice(at + size, end).replace(/\n/g, " ");
    if (/^ .*[^ ].* $/.test(inner)) inner = inner.slice(1, -1);
    this.put(make("code", {}, inner), end + size - at);
  }

  emphasis(mark) {
    const { text, at } = this;
    let size = 1;
    while (text[at + size] === mark) size++;
    this.at += size;
    const before = text[at - 1] ?? " ", after = text[at + size] ?? " ", word = /[\p{L}\p{N}]/u;
    const inWord = mark === "_" && word.test(before) && word.test(after);
    if (size > 3 || inWord || (mark === "~" && size !== 2)) { this.out.push(mark.repeat(size)); return; }
    if (!/\s/.test(before)) size = this.close(mark, size);
    if (!size) return;
    if (!/\s/.test(after)) this.marks[mark].push(this.out.length);
    this.out.push({ mark, size });
  }

  /** Ends what marks of this kind have begun -> how many of them are left. */
  close(mark, size) {
    const places = this.marks[mark];
    while (size && places.length) {
      const place = places.at(-1), open = this.out[place];
      const taken = Math.min(2, size, open.size), name = EMPHASIS[mark][taken - 1];
      const inner = this.out.slice(place + 1), depth = 1 + inner.reduce((most, item) => Math.max(most, item.depth ?? 0), 0);
      if (!name || !inner.length || depth > DEEPEST) { places.length = 0; return size; }
      open.size -= taken;
      size -= taken;
      this.out.length = open.size ? place + 1 : place;
      this.forget();
      this.out.push({ node: make(name, {}, this.nodes(inner)), depth });
    }
    return size;
  }

  /** Marks that are within something now begin nothing any more. */
  forget() {
    for (const places of Object.values(this.marks)) while (places.length && places.at(-1) >= this.out.length) places.pop();
  }

  bracket(mark) {
    this.marks["["].push(this.out.length);
    this.out.push({ mark, size: 1 });
    this.at += mark.length;
  }

  link() {
    const place = this.marks["["].pop();
    const match = /\]\([ \t]{0,9}(?:<([^<>\n]{0,2000})>|((?:[^\s()]|\([^\s()]{0,500}\)){0,2000}))(?:[ \t]{1,9}["'(][^\n)]{0,500})?[ \t]{0,9}\)/y;
    match.lastIndex = this.at;
    const found = place === undefined || this.text[this.at + 1] !== "(" ? null : match.exec(this.text);
    const url = found && linkable(found[1] ?? found[2]);
    if (!url) { this.plain("]"); return; }
    const inner = this.out.slice(place + 1);
    this.out.length = place;
    this.forget();
    this.marks["["].length = 0; // no link within a link
    this.put(anchor(url, inner.length ? this.nodes(inner) : url), found[0].length);
  }

  angle() {
    const match = /<(?:br[ ]?\/?|((?:https?:\/\/|mailto:)[^\s<>]{1,2000}))>/iy;
    match.lastIndex = this.at;
    const found = match.exec(this.text), url = found?.[1] && linkable(found[1]);
    if (found && !found[1]) this.put(make("br"), found[0].length);
    else if (url) this.put(anchor(url, found[1]), found[0].length);
    else this.plain("<");
  }

  address() {
    const match = /https?:\/\/[!#$%&'()*+,\-./\w:;=?@[\]~]{1,2000}/y;
    match.lastIndex = this.at;
    let found = match.exec(this.text)?.[0] ?? "";
    while (/[.,;:!?'*_~\]]$/.test(found) || (found.endsWith(")") && !found.includes("("))) found = found.slice(0, -1);
    const url = /\w/.test(this.text[this.at - 1] ?? "") ? null : linkable(found);
    if (url) this.put(anchor(url, found), found.length);
    else this.plain("http");
  }
}

// ---- a text that grows

/** Shows a Markdown text in an element while it is written: only its last block, item or row is made again. */
class MarkdownView {
  constructor(root) {
    this.root = root;
    this.text = "";
    this.settled = 0; // characters whose nodes stay
    this.open = null; // the list, table or paragraph that the rest goes on in
    this.loose = []; // the nodes of the rest
    this.code = null; // the block of code that the rest is
  }

  /** Show more of the text. */
  push(more) {
    this.text += more;
    const lines = this.text.slice(this.settled).split("\n"), places = [0];
    for (const line of lines) places.push(places.at(-1) + line.length + 1);
    const blocks = blocksOf(lines, 0, this.open?.within), placeOf = block => places[block.start] + (block.skip ?? 0);
    const point = this.point(lines, blocks, placeOf), live = this.code;
    for (const node of this.loose) if (node !== live || blocks[0]?.kind !== "code") node.remove();
    this.loose = [];
    this.code = null;
    const opened = this.open;
    blocks.forEach((block, place) => this.show(block, placeOf, point, place ? null : opened, place ? null : live));
    if (!point.inside) this.open = point.paragraph ? { within: "paragraph" } : null;
    this.settled += point.at;
  }

  /** Where the text settles: before the last block, item or row of whole lines, as the last line may still become
      anything; or before the last piece of a paragraph that is very long. */
  point(lines, blocks, placeOf) {
    const whole = blocksOf(lines.slice(0, -1), 0, this.open?.within), firm = whole.at(-1), last = blocks.at(-1);
    if (last?.skip) return { at: placeOf(last), paragraph: true };
    if (!firm) return { at: 0, inside: Boolean(this.open?.node), paragraph: this.open?.within === "paragraph" };
    const parts = firm.items ?? firm.rows, goesOn = whole.length === 1 && this.goesOn(firm, this.open);
    if (parts && (parts.length > 1 || goesOn)) return { at: placeOf(parts.at(-1)), inside: true };
    return { at: placeOf(firm), paragraph: placeOf(firm) === 0 && this.open?.within === "paragraph" };
  }

  goesOn(block, open) {
    return Boolean(open?.node) && block.kind === open.kind && block.marker === open.marker && !block.head;
  }

  show(block, placeOf, point, opened, live) {
    const parts = block.items ?? block.rows, settled = node => placeOf(node) < point.at;
    const goesOn = this.goesOn(block, opened);
    if (goesOn || (parts?.length && settled(parts[0]) && !settled(parts.at(-1)))) {
      if (!goesOn) this.begin(block);
      for (const part of parts) {
        const node = block.items ? itemNode(part) : rowNode(part.line, block.align, "td");
        this.open.node.append(node);
        if (!settled(part)) this.loose.push(node);
      }
      return;
    }
    const goesOnAsCode = live && block.kind === "code";
    const node = goesOnAsCode ? live : nodeOf(block);
    if (goesOnAsCode) fillCode(live.querySelector("pre"), block.lines);
    else this.root.append(node);
    if (settled(block)) return;
    this.loose.push(node);
    if (block.kind === "code" && placeOf(block) === point.at) this.code = node;
  }

  begin(block) {
    const empty = nodeOf({ ...block, items: [], rows: [] });
    this.root.append(empty);
    this.open = { node: empty.querySelector("tbody") ?? empty, kind: block.kind, marker: block.marker, within: block.align };
  }
}
