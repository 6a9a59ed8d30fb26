// Markup within a line: code, emphasis, links. Each search is bounded: hostile text costs little.

import { safeLink, safeText } from "./safe.js";

const LONGEST = 20000; // longer text is shown as it is
const REACH = 2000; // of an emphasis
const DEPTH = 6;
const CODE = /(`+)/y;
const LINK = /!?\[([^[\]]{0,500})\]\(\s?<?([^\s()<>]{1,2000})>?(?:\s"[^"]{0,200}")?\s?\)/y;
const ADDRESS = /<?(https?:\/\/[^\s<>"'`]{1,2000})>?/y;
const EMPHASIS = { "**": "strong", "__": "strong", "~~": "del", "*": "em", "_": "em" };
const WORD = /[\p{L}\p{N}]/u;

/** Nodes for a piece of text; a link's own text has no links in it. */
export function inline(text, depth = 0, linked = false) {
  if (text.length > LONGEST || depth > DEPTH) return safeText(text);
  const nodes = [];
  let plain = "";
  const flush = () => {
    if (plain) nodes.push(...safeText(plain));
    plain = "";
  };
  for (let at = 0; at < text.length;) {
    const found = piece(text, at, depth, linked);
    if (!found) {
      plain += text[at];
      at += 1;
    } else if (typeof found.node === "string") {
      plain += found.node;
      at = found.end;
    } else {
      flush();
      nodes.push(found.node);
      at = found.end;
    }
  }
  flush();
  return nodes;
}

/** What begins at a place: {node, end}, or null for an ordinary character. */
function piece(text, at, depth, linked) {
  switch (text[at]) {
    case "\\":
      return /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "") ? { node: text[at + 1], end: at + 2 } : null;
    case "`":
      return code(text, at);
    case "!":
    case "[":
      return linked ? null : link(text, at, depth);
    case "<":
    case "h":
      return linked ? null : address(text, at);
    case "*":
    case "_":
    case "~":
      return emphasis(text, at, depth, linked);
    case "\n":
      return / {2}$/.test(text.slice(at - 2, at)) ? { node: make("br", []), end: at + 1 } : null;
    default:
      return null;
  }
}

function code(text, at) {
  CODE.lastIndex = at;
  const [run] = CODE.exec(text);
  const from = at + run.length;
  let end = text.indexOf(run, from);
  while (end >= 0 && text[end + run.length] === "`") {
    while (text[end] === "`") end += 1;
    end = text.indexOf(run, end);
  }
  if (end < 0) return { node: run, end: from };
  return { node: make("code", safeText(text.slice(from, end).trim())), end: end + run.length };
}

function link(text, at, depth) {
  LINK.lastIndex = at;
  const found = LINK.exec(text);
  if (!found) return null;
  const [whole, label, target] = found;
  const made = safeLink(target);
  if (!made) return { node: whole, end: at + whole.length };
  // A picture is never loaded, only named.
  made.append(...inline(label || target, depth + 1, true));
  return { node: made, end: at + whole.length };
}

function address(text, at) {
  if (at > 0 && WORD.test(text[at - 1])) return null;
  ADDRESS.lastIndex = at;
  const found = ADDRESS.exec(text);
  if (!found) return null;
  const framed = text[at] === "<" && found[0].endsWith(">");
  const target = framed ? found[1] : found[1].replace(/[.,;:!?)\]}*_~]+$/, "");
  const made = text[at] === "<" && !framed ? null : safeLink(target);
  if (!made) return null;
  made.append(...safeText(target));
  return { node: made, end: framed ? at + found[0].length : at + target.length };
}

function emphasis(text, at, depth, linked) {
  const double = text.slice(at, at + 2);
  const mark = EMPHASIS[double] ? double : text[at];
  if (!EMPHASIS[mark]) return null;
  const skip = { node: mark, end: at + mark.length };
  const from = at + mark.length;
  if (/\s/.test(text[from] ?? " ")) return skip;
  if (mark[0] === "_" && at > 0 && WORD.test(text[at - 1])) return skip;
  const end = closing(text, mark, from);
  if (end < 0) return skip;
  const inner = inline(text.slice(from, end), depth + 1, linked);
  return { node: make(EMPHASIS[mark], inner), end: end + mark.length };
}

/** Where an emphasis ends; -1 where it does not. */
function closing(text, mark, from) {
  const last = Math.min(text.length, from + REACH);
  let end = text.indexOf(mark, from + 1);
  while (end >= 0 && end < last) {
    let run = end;
    while (text[run] === mark[0]) run += 1;
    const length = run - end;
    const inWord = mark[0] === "_" && WORD.test(text[run] ?? "");
    const fits = mark.length === 2 ? length >= 2 : length !== 2;
    if (fits && !inWord && !/\s/.test(text[end - 1])) return run - mark.length;
    end = text.indexOf(mark, run);
  }
  return -1;
}

function make(tag, nodes) {
  const made = document.createElement(tag);
  made.append(...nodes);
  return made;
}
