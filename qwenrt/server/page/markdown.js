// ---- Markdown as nodes of the page. Nothing of a text becomes HTML, a script or an address that is fetched: there are
// only the elements made here, and links of three schemes. All of it takes time in proportion to the text.

const DEEPEST = 10; // quotes, lists and emphasis within each other; what is deeper stays text
const TOGETHER = 40; // lines of code that are laid out as one piece
const LONGEST = 4000; // characters of a paragraph; a longer one becomes several

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
const MATH = { $$: "$$", "\\[": "\\]" };

const blank = line => line.trim() === "";
const indent = line => line.length - line.trimStart().length;
const isRule = line => indent(line) < 4 && /^([-*_])\1\1+$/.test(line.replace(/[ \t]/g, ""));
const isMath = line => line.trimStart().slice(0, 2) in MATH;
const startsBlock = line => FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || isRule(line) || isMath(line)
  || /^ {0,3}(?:[-*+]|1[.)])[ \t]+\S/.test(line);

/** The cells of a table's row. */
function cells(line) {
  const row = line.trim().replace(/^\|/, ""), found = row.match(/(?:\\.|[^|\\]|\\$)*(?:\||$)/g) ?? [];
  if (row.endsWith("|") || found.length > 1) found.pop(); // the empty match at the end
  return found.map(cell => cell.replace(/\|$/, "").replace(/\\\|/g, "|").trim());
}

/** How the columns of a table are aligned, from the line below its head; null where it is none. */
function alignment(head, line) {
  if (!line?.includes("-") || !line.includes("|")) return null;
  const parts = cells(line);
  if (!parts.every(part => /^:?-+:?$/.test(part)) || cells(head).length !== parts.length) return null;
  return parts.map(part => part.endsWith(":") ? (part[0] === ":" ? "center" : "right") : "");
}

/** The blocks of some lines, each with the line where it starts. within: the rows of a table (its alignment) or the
    "paragraph" in which the lines begin. */
function blocksOf(lines, depth = 0, within = null) {
  const found = [];
  for (let at = 0; at < lines.length;) {
    const line = lines[at], start = at, goesOn = at === 0 && within, rest = test => {
      while (at < lines.length && test(lines[at])) at++;
      return lines.slice(start, at);
    };
    let match;
    if (blank(line)) at++;
    else if (goesOn === "paragraph") at = paragraphIn(lines, at, found);
    else if (goesOn && line.includes("|")) found.push(rows({ start, align: within }, start, rest(one => one.includes("|"))));
    else if ((match = FENCE.exec(line))) at = codeIn(lines, at, match, found);
    else if ((match = HEADING.exec(line))) {
      const text = line.slice(match[0].length).trim().replace(/(^|[ \t])#+$/, "");
      found.push({ kind: "heading", start: at++, level: match[1].length, text });
    } else if (isRule(line)) found.push({ kind: "rule", start: at++ });
    else if (QUOTE.test(line) && depth < DEEPEST) {
      const inner = rest(one => QUOTE.test(one)).map(one => one.replace(QUOTE, ""));
      found.push({ kind: "quote", start, blocks: blocksOf(inner, depth + 1) });
    } else if (ITEM.test(line) && depth < DEEPEST) at = listIn(lines, at, depth, found);
    else if (isMath(line)) at = mathIn(lines, at, found);
    else if (line.includes("|") && (match = alignment(line, lines[at + 1]))) {
      at += 2;
      found.push(rows({ start, head: line, align: match }, start + 2, rest(one => one.includes("|")).slice(2)));
    } else at = paragraphIn(lines, at, found);
  }
  return found;
}

const rows = (table, from, lines) => ({ kind: "table", ...table, rows: lines.map((line, place) => ({ start: from + place, line })) });

function paragraphIn(lines, start, found) {
  let at = start + 1;
  while (at < lines.length && !blank(lines[at]) && !startsBlock(lines[at])) at++;
  const text = lines.slice(start, at).join("\n");
  for (let skip = 0; skip < text.length;) {
    const far = skip + LONGEST, space = far < text.length ? text.lastIndexOf(" ", far) : -1, end = space > skip ? space + 1 : far;
    found.push({ kind: "paragraph", start, skip, text: text.slice(skip, end).trim() });
    skip = end;
  }
  return at;
}

function codeIn(lines, start, [, fence, info], found) {
  const cut = indent(lines[start]), own = [];
  let at = start + 1, closed = false;
  for (; at < lines.length && !closed; at++) {
    const text = lines[at].trim();
    closed = text.startsWith(fence) && indent(lines[at]) < 4 && /^(`+|~+)$/.test(text);
    if (!closed) own.push(lines[at].slice(Math.min(cut, indent(lines[at]))));
  }
  found.push({ kind: "code", start, name: info.trim().split(/\s/)[0].slice(0, 40), lines: own });
  return at;
}

function mathIn(lines, start, found) {
  const end = MATH[lines[start].trimStart().slice(0, 2)];
  let at = start;
  for (let closed = false; at < lines.length && !blank(lines[at]) && !closed; at++) {
    closed = lines[at].indexOf(end, at === start ? indent(lines[at]) + 2 : 0) >= 0;
  }
  found.push({ kind: "math", start, text: lines.slice(start, at).join("\n").trim() });
  return at;
}

/** A list: items of one kind of marker. What is indented by two or more, or as far as the item's text, is the item's. */
function listIn(lines, start, depth, found) {
  const kind = marker => /\d/.test(marker) ? marker.at(-1) : marker;
  const first = ITEM.exec(lines[start])[2], items = [];
  let at = start, match;
  while (at < lines.length && (match = ITEM.exec(lines[at])) && kind(match[2]) === kind(first) && !isRule(lines[at])) {
    const least = match[1].length + match[2].length + 1, width = match[0].length > least + 3 ? least : match[0].length;
    const own = [lines[at].slice(width)], began = at++;
    for (let gap = blank(own[0]); at < lines.length; at++) {
      const line = lines[at], inner = indent(line) >= Math.min(width, match[1].length + 2);
      if (!blank(line) && !inner && (gap || startsBlock(line) || ITEM.test(line))) break;
      gap = blank(line);
      own.push(line.slice(Math.min(width, indent(line))));
    }
    items.push({ start: began, blocks: blocksOf(own, depth + 1) });
  }
  const number = parseInt(first, 10);
  found.push({ kind: "list", start, number, marker: kind(first), items });
  return at;
}

// ---- blocks as nodes

const nodeOf = block => MAKERS[block.kind](block);

const MAKERS = {
  heading: block => make("h" + Math.min(6, block.level + 2), {}, inline(block.text)),
  rule: () => make("hr"),
  quote: block => make("blockquote", {}, ...block.blocks.map(nodeOf)),
  math: block => make("p", { className: "math" }, block.text),
  paragraph: block => make("p", {}, inline(block.text)),
  list: block => {
    const list = make(block.number >= 0 ? "ol" : "ul", {}, ...block.items.map(itemNode));
    if (block.number >= 0 && block.number !== 1) list.start = block.number;
    return list;
  },
  table: block => {
    const head = make("thead", {}, rowNode(block.head, block.align, "th"));
    const body = make("tbody", {}, ...block.rows.map(row => rowNode(row.line, block.align, "td")));
    return make("div", { className: "table", tabIndex: 0 }, make("table", {}, head, body));
  },
  code: block => {
    const pre = make("pre", { tabIndex: 0 });
    const copy = iconButton("copy", "copyCode", () => copyText(copy, pre.textContent.slice(0, -1)));
    fillCode(pre, block.lines);
    return make("figure", { className: "code" }, make("figcaption", {}, make("span", {}, block.name), copy), pre);
  },
};

function itemNode(item) {
  const node = make("li", {}, ...item.blocks.map(nodeOf)), first = node.firstChild?.firstChild;
  const box = node.firstChild?.nodeName === "P" && /^\[([ xX])\] /.exec(first?.data ?? "");
  if (box) first.replaceData(0, 3, box[1] === " " ? "☐" : "☑");
  return node;
}

function rowNode(line, align, name) {
  const row = make("tr"), texts = cells(line);
  align.forEach((side, place) => {
    const cell = make(name, {}, inline(texts[place] ?? ""));
    cell.style.textAlign = side;
    row.append(cell);
  });
  return row;
}

/** Makes a <pre> have these lines, of which it may have the first already; in pieces, so that a long one can grow. */
function fillCode(pre, lines) {
  for (let at = Math.max(0, pre.childElementCount - 1) * TOGETHER; at < lines.length; at += TOGETHER) {
    const text = lines.slice(at, at + TOGETHER).join("\n") + "\n", piece = pre.children[at / TOGETHER];
    if (!piece) pre.append(make("code", {}, text));
    else if (piece.textContent !== text) piece.textContent = text;
  }
}

// ---- what is within a line

const SPECIAL = /[\\`*_~[\]!<$\n]|https?:\/\//g;
const EMPHASIS = { "*": ["em", "strong"], _: ["em", "strong"], "~": [null, "del"] };
const LINK = /\]\([ \t]{0,9}(?:<([^<>\n]{0,2000})>|((?:[^\s()]|\([^\s()]{0,500}\)){0,2000}))(?:[ \t]{1,9}["'(][^\n)]{0,500})?[ \t]{0,9}\)/y;
const DOLLARS = /\$(?![\s$])[^$\n]{0,500}(?<!\s)\$(?!\d)/y;
const ANGLE = /<(?:br ?\/?|((?:https?:\/\/|mailto:)[^\s<>]{1,2000}))>/iy;
const ADDRESS = /https?:\/\/[!#$%&'()*+,\-./\w:;=?@[\]~]{1,2000}/y;

/** An address that may be linked, else null. */
function linkable(text) {
  if (text.length > 2000 || !/^(?:https?:\/\/|mailto:)[^\s\p{Cc}\p{Cf}]+$/iu.test(text) || !URL.canParse(text)) return null;
  const url = new URL(text);
  return ["http:", "https:", "mailto:"].includes(url.protocol) && !url.password ? url.href : null;
}

const anchor = (url, ...children) =>
  make("a", { href: url, title: url, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);

/** The text of a paragraph, heading or cell as a fragment. */
const inline = text => new Inline(text).read();

class Inline {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.out = []; // texts, {node, depth}, and marks that may still become the beginning of something
    this.marks = { "*": [], _: [], "~": [], "[": [] }; // their places in `out`
    this.missing = new Set(); // what ends something and is not in the rest of the text
  }

  read() {
    const { text } = this;
    while (this.at < text.length) {
      SPECIAL.lastIndex = this.at;
      const match = SPECIAL.exec(text), next = match ? match.index : text.length;
      if (next > this.at) this.plain(text.slice(this.at, next));
      if (match) this.special(match[0], text[next + 1] ?? "");
    }
    return this.nodes(this.out);
  }

  nodes(items) {
    const fragment = document.createDocumentFragment();
    let text = "";
    for (const item of [...items, null]) {
      if (item && !item.node) { text += item.mark ? item.mark.repeat(item.size) : item; continue; }
      if (text) fragment.append(text);
      if (item) fragment.append(item.node);
      text = "";
    }
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

  here(pattern) {
    pattern.lastIndex = this.at;
    return pattern.exec(this.text);
  }

  special(mark, next) {
    if (mark === "\n") this.put(make("br"), 1);
    else if (mark === "\\") this.backslash(next);
    else if (mark === "`") this.code();
    else if (mark in EMPHASIS) this.emphasis(mark);
    else if (mark === "[" || (mark === "!" && next === "[")) this.bracket(mark === "[" ? "[" : "![");
    else if (mark === "]") this.link();
    else if (mark === "<") this.angle();
    else if (mark === "$") this.dollar(next);
    else if (mark === "!") this.plain(mark);
    else this.address();
  }

  backslash(next) {
    if (next === "(" && this.verbatim("\\(", "\\)") || next === "[" && this.verbatim("\\[", "\\]")) return;
    if (next === "\n") this.put(make("br"), 2);
    else if (/[!-/:-@[-`{-~]/.test(next)) { this.out.push(next); this.at += 2; }
    else this.plain("\\");
  }

  /** Math, left as it is written. */
  verbatim(open, close) {
    const end = this.missing.has(close) ? -1 : this.text.indexOf(close, this.at + open.length);
    if (end < 0) { this.missing.add(close); return false; }
    this.math(this.text.slice(this.at, end + close.length));
    return true;
  }

  math(text) { this.put(make("span", { className: "math" }, text), text.length); }

  dollar(next) {
    if (next === "$" && this.verbatim("$$", "$$")) return;
    const found = this.here(DOLLARS);
    if (found) this.math(found[0]);
    else this.plain("$");
  }

  code() {
    const { text, at } = this, ticks = /`+/y.exec(text.slice(at, at + 100))[0], size = ticks.length;
    let end = this.missing.has(ticks) ? -1 : at + size;
    while (end >= 0) {
      end = text.indexOf(ticks, end);
      if (end < 0 || (text[end - 1] !== "`" && text[end + size] !== "`")) break;
      while (text[end] === "`") end++;
    }
    if (end < 0) { this.missing.add(ticks); this.plain(ticks); return; }
    const inner = text.slice(at + size, end).replace(/\n/g, " ");
    this.put(make("code", {}, /^ .*[^ ].* $/.test(inner) ? inner.slice(1, -1) : inner), end + size - at);
  }

  emphasis(mark) {
    const { text, at } = this, word = /[\p{L}\p{N}]/u;
    let size = 1;
    while (text[at + size] === mark) size++;
    this.at += size;
    const before = text[at - 1] ?? " ", after = text[at + size] ?? " ", inWord = mark === "_" && word.test(before) && word.test(after);
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
      const place = places.at(-1), open = this.out[place], taken = Math.min(2, size, open.size);
      const inner = this.out.slice(place + 1), depth = 1 + inner.reduce((most, item) => Math.max(most, item.depth ?? 0), 0);
      if (!inner.length || depth > DEEPEST) { places.length = 0; return size; }
      open.size -= taken;
      size -= taken;
      this.wrap(open.size ? place + 1 : place, make(EMPHASIS[mark][taken - 1], {}, this.nodes(inner)), depth);
    }
    return size;
  }

  /** Puts a node in the place of all that came from `place` on; marks in there begin nothing any more. */
  wrap(place, node, depth) {
    this.out.length = place;
    for (const places of Object.values(this.marks)) while (places.at(-1) >= place) places.pop();
    this.out.push({ node, depth });
  }

  bracket(mark) {
    this.marks["["].push(this.out.length);
    this.out.push({ mark, size: 1 });
    this.at += mark.length;
  }

  link() {
    const place = this.marks["["].pop(), found = place === undefined ? null : this.here(LINK);
    const url = found && linkable(found[1] ?? found[2]);
    if (!url) { this.plain("]"); return; }
    const inner = this.out.slice(place + 1);
    this.wrap(place, anchor(url, inner.length ? this.nodes(inner) : url), 1);
    this.marks["["].length = 0; // no link within a link
    this.at += found[0].length;
  }

  angle() {
    const found = this.here(ANGLE), url = found?.[1] && linkable(found[1]);
    if (found && !found[1]) this.put(make("br"), found[0].length);
    else if (url) this.put(anchor(url, found[1]), found[0].length);
    else this.plain("<");
  }

  address() {
    let found = this.here(ADDRESS)?.[0] ?? "";
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
    // settled: characters whose nodes stay. open: the list, table or paragraph that the rest goes on in. loose: the nodes
    // of the rest. code: the block of code that it begins with.
    Object.assign(this, { root, text: "", settled: 0, open: null, loose: [], code: null });
  }

  /** Show more of the text. */
  push(more) {
    this.text += more;
    const lines = this.text.slice(this.settled).split("\n"), places = [0];
    for (const line of lines) places.push(places.at(-1) + line.length + 1);
    const blocks = blocksOf(lines, 0, this.open?.within), placeOf = block => places[block.start] + (block.skip ?? 0);
    const point = this.point(lines, blocks, placeOf), opened = this.open, live = blocks[0]?.kind === "code" ? this.code : null;
    for (const node of this.loose) if (node !== live) node.remove();
    this.loose = [];
    this.code = null;
    blocks.forEach((block, place) => this.show(block, placeOf, point, place ? null : opened, place ? null : live));
    if (!point.inside) this.open = point.paragraph ? { within: "paragraph" } : null;
    this.settled += point.at;
  }

  /** Where the text settles: before the last block, item or row of whole lines, as the last line may still become
      anything; or before the last piece of a paragraph that is very long. */
  point(lines, blocks, placeOf) {
    const whole = blocksOf(lines.slice(0, -1), 0, this.open?.within), firm = whole.at(-1), last = blocks.at(-1);
    const stays = this.open?.within === "paragraph", parts = firm?.items ?? firm?.rows;
    if (last?.skip) return { at: placeOf(last), paragraph: true };
    if (!firm) return { at: 0, inside: Boolean(this.open?.node), paragraph: stays };
    if (parts && (parts.length > 1 || (whole.length === 1 && this.goesOn(firm, this.open)))) return { at: placeOf(parts.at(-1)), inside: true };
    return { at: placeOf(firm), paragraph: stays && placeOf(firm) === 0 };
  }

  goesOn(block, open) {
    return Boolean(open?.node) && block.kind === open.kind && block.marker === open.marker && !block.head;
  }

  show(block, placeOf, point, opened, live) {
    const parts = block.items ?? block.rows, settled = part => placeOf(part) < point.at, goesOn = this.goesOn(block, opened);
    if (goesOn || (parts?.length && settled(parts[0]) && !settled(parts.at(-1)))) {
      if (!goesOn) this.begin(block);
      for (const part of parts) {
        const node = block.items ? itemNode(part) : rowNode(part.line, block.align, "td");
        this.open.node.append(node);
        if (!settled(part)) this.loose.push(node);
      }
      return;
    }
    const node = live ?? nodeOf(block);
    if (live) { live.querySelector("span").textContent = block.name; fillCode(live.lastChild, block.lines); }
    else this.root.append(node);
    if (settled(block)) return;
    this.loose.push(node);
    if (block.kind === "code" && placeOf(block) === point.at) this.code = node;
  }

  begin(block) {
    const node = nodeOf({ ...block, items: [], rows: [] });
    this.root.append(node);
    this.open = { node: node.querySelector("tbody") ?? node, kind: block.kind, marker: block.marker, within: block.align };
  }
}
