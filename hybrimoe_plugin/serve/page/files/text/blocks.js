// Markdown's blocks, line by line: {kind, source, ...}. Unknown markup stays text.

const DEPTH = 8; // of lists and quotes within one another
const LONG = 2000; // a longer line begins nothing but a paragraph
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:\s+|$)/;
const DASHES = /^\s*:?-+:?\s*$/;

/** The blocks of a text. */
export function blocks(text) {
  return parse(text.replaceAll("\r", "").split("\n"), 0);
}

function parse(lines, depth) {
  const found = [];
  for (let at = 0; at < lines.length;) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const block = begun(lines, at, depth);
    block.source = lines.slice(at, block.end).join("\n");
    at = block.end;
    found.push(block);
  }
  return found;
}

function begun(lines, at, depth) {
  const line = lines[at];
  if (line.length <= LONG && depth < DEPTH) {
    if (FENCE.test(line)) return code(lines, at);
    if (HEADING.test(line)) return heading(line, at);
    if (RULE.test(line)) return { kind: "rule", end: at + 1 };
    if (line.trimStart().startsWith(">")) return quote(lines, at, depth);
    if (ITEM.test(line)) return list(lines, at, depth);
    if (isTable(lines, at)) return table(lines, at);
  }
  return paragraph(lines, at);
}

function code(lines, at) {
  const [, fence, information] = FENCE.exec(lines[at]);
  let end = at + 1;
  while (end < lines.length && !closes(lines[end], fence)) end += 1;
  const text = lines.slice(at + 1, end).join("\n");
  const [language] = information.trim().split(/\s/);
  return { kind: "code", language, text, end: Math.min(end + 1, lines.length) };
}

function closes(line, fence) {
  const bare = line.trim();
  return bare.length >= fence.length && bare === fence[0].repeat(bare.length);
}

function heading(line, at) {
  const [, marks, text] = HEADING.exec(line);
  return { kind: "heading", level: marks.length, text: text.replace(/\s#+$/, ""), end: at + 1 };
}

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && lines[end].trimStart().startsWith(">")) end += 1;
  const inside = lines.slice(at, end).map((line) => line.trimStart().replace(/^> ?/, ""));
  return { kind: "quote", blocks: parse(inside, depth + 1), end };
}

function list(lines, at, depth) {
  const ordered = /\d/.test(ITEM.exec(lines[at])[2]);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const marker = ITEM.exec(lines[end]);
    if (!marker || /\d/.test(marker[2]) !== ordered || RULE.test(lines[end])) break;
    const width = marker[1].length + marker[2].length + 1;
    const inside = [lines[end].slice(marker[0].length)];
    end += 1;
    while (end < lines.length && belongs(lines, end, width)) {
      inside.push(outdented(lines[end], width));
      end += 1;
    }
    items.push(parse(inside, depth + 1));
    const next = end + blanks(lines, end);
    if (next > end && next < lines.length && ITEM.test(lines[next])) end = next;
  }
  const start = ordered ? parseInt(lines[at], 10) : 1;
  return { kind: "list", ordered, start, items, end };
}

/** Whether a line goes on with a list item whose text begins at a column. */
function belongs(lines, at, width) {
  const inside = (other) => indent(other) >= Math.min(width, 2);
  const line = lines[at];
  if (line.trim()) return inside(line) || (!starts(line) && lines[at - 1].trim() !== "");
  const next = at + blanks(lines, at);
  return next < lines.length && inside(lines[next]);
}

function blanks(lines, at) {
  let count = 0;
  while (at + count < lines.length && !lines[at + count].trim()) count += 1;
  return count;
}

function indent(line) {
  return line.length - line.trimStart().length;
}

function outdented(line, width) {
  return line.slice(Math.min(width, indent(line)));
}

/** Whether a line cannot be the next one of a paragraph. */
function starts(line) {
  if (line.length > LONG) return false;
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line)) return true;
  return ITEM.test(line) || line.trimStart().startsWith(">");
}

function isTable(lines, at) {
  const next = lines[at + 1] ?? "";
  if (!lines[at].includes("|") || !next.includes("-") || next.length > LONG) return false;
  const marks = cells(next);
  return marks.every((mark) => DASHES.test(mark)) && marks.length === cells(lines[at]).length;
}

function table(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|") && lines[end].trim()) end += 1;
  const rows = lines.slice(at + 2, end).map(cells);
  return { kind: "table", head: cells(lines[at]), rows, end };
}

function cells(line) {
  const bare = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return bare.split("|").map((cell) => cell.trim());
}

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !starts(lines[end])) end += 1;
  return { kind: "paragraph", text: lines.slice(at, end).join("\n"), end };
}
