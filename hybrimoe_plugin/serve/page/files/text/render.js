// An answer as elements. Those of blocks that have not changed are kept while it grows.

import { copyButton, element } from "../dom.js";
import { blocks } from "./blocks.js";
import { inline } from "./inline.js";
import { safeText } from "./safe.js";

/** Shows a growing text in an element. */
export class Rendered {
  constructor(place) {
    this.place = place;
    this.shown = []; // {source, node}
  }

  show(text) {
    const found = blocks(text);
    let same = 0;
    while (same < found.length && this.shown[same]?.source === found[same].source) same += 1;
    for (const { node } of this.shown.splice(same)) node.remove();
    for (const block of found.slice(same)) {
      const node = made(block);
      this.place.append(node);
      this.shown.push({ source: block.source, node });
    }
  }
}

function made(block) {
  switch (block.kind) {
    case "code":
      return code(block);
    case "heading":
      // The page's own headings come before those of an answer.
      return element(`h${Math.min(block.level + 2, 5)}`, { dir: "auto" }, ...inline(block.text));
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", {}, ...block.blocks.map(made));
    case "list":
      return list(block);
    case "table":
      return table(block);
    default:
      return element("p", { dir: "auto" }, ...inline(block.text));
  }
}

function code({ language, text }) {
  const head = element("div", { class: "code-head" }, element("span", {}, ...safeText(language)));
  head.append(copyButton(() => text));
  // It may be wider than the page: with the focus, arrow keys scroll it.
  const pre = element("pre", { tabindex: "0", dir: "ltr" }, element("code", {}, ...safeText(text)));
  return element("div", { class: "code" }, head, pre);
}

function list({ ordered, start, items }) {
  const whole = element(ordered ? "ol" : "ul");
  if (ordered && start !== 1) whole.start = start;
  for (const item of items) whole.append(element("li", { dir: "auto" }, ...item.map(made)));
  return whole;
}

function table({ head, rows }) {
  const cell = (tag) => (text) => element(tag, { dir: "auto" }, ...inline(text));
  const top = element("thead", {}, element("tr", {}, ...head.map(cell("th"))));
  const body = element("tbody");
  for (const row of rows) {
    body.append(element("tr", {}, ...head.map((_, at) => cell("td")(row[at] ?? ""))));
  }
  const whole = element("table", {}, top, body);
  return element("div", { class: "table", tabindex: "0" }, whole);
}
