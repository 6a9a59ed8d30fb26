// A few numbers, each with its curve over the last minute.

import { byId, element } from "../dom.js";

const POINTS = 150;
const EVERY = 2; // samples to a point
const SVG = "http://www.w3.org/2000/svg";

const TOKENS = { name: "tokens_s", label: "Tokens/s", text: (value) => value.toFixed(1) };
const PROMPT = { name: "prompt_s", label: "Prompt tokens/s", text: (value) => value.toFixed(0) };
const HITS = { name: "hit_rate", label: "Cache hits", most: 1, text: percent };
const LINK = { name: "link", label: "Link busy", most: 1, text: percent };
const CPU = { name: "cpu", label: "CPU in experts", most: 1, text: percent };

/** The numbers on the page. */
export class Figures {
  begin({ accelerator, flash }) {
    const chosen = accelerator === "none" ? [TOKENS, PROMPT, CPU] : [TOKENS, HITS, LINK];
    this.shown = flash ? [] : chosen.map(figure);
    this.count = 0;
    byId("figures").replaceChildren(...this.shown.map(({ item }) => item));
  }

  /** Show a sample: name -> value, null where it is not known. */
  take(values) {
    this.count += 1;
    for (const { name, most, text, value, line, points } of this.shown) {
      const now = values[name] ?? null;
      const said = now === null ? "–" : text(now);
      if (value.textContent !== said) value.textContent = said;
      if (this.count % EVERY) continue;
      points.push(now ?? points.at(-1) ?? 0);
      if (points.length > POINTS) points.shift();
      line.setAttribute("points", curve(points, most ?? Math.max(1, ...points)));
    }
  }
}

function figure(described) {
  const value = element("div", { class: "value" }, "–");
  const line = document.createElementNS(SVG, "polyline");
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("viewBox", `0 0 ${POINTS} 30`);
  picture.setAttribute("preserveAspectRatio", "none");
  picture.setAttribute("aria-hidden", "true");
  picture.append(line);
  const item = element("div", {}, element("dt", {}, described.label));
  item.append(element("dd", {}, value, picture));
  return { ...described, value, line, item, points: [] };
}

function curve(points, most) {
  const first = POINTS - points.length;
  const height = (value) => (29 - 28 * (value / most)).toFixed(1);
  return points.map((value, at) => `${first + at},${height(value)}`).join(" ");
}

function percent(share) {
  return `${Math.round(100 * share)} %`;
}
