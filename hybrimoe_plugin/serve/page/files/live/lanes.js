// How busy CPU, accelerator and link were: one strip for each.

import { byId, element, themed } from "../dom.js";
import { bytes } from "./bits.js";

const COLOURS = {
  cpu: "--cpu-used",
  accelerator: "--accelerator-used",
  link: "--in_flight-used",
};
const NAMES = { cpu: "CPU", accelerator: "Accelerator", link: "Link" };

/** The strips on the page. */
export class Lanes {
  begin({ accelerator, window_ms: window }) {
    const names = accelerator === "none" ? ["cpu"] : ["cpu", "accelerator", "link"];
    this.strips = names.map((name) => ({
      name,
      canvas: element("canvas", { "aria-hidden": "true", height: "28" }),
      share: element("span", { class: "share" }),
    }));
    const parts = this.strips.flatMap(({ name, canvas, share }) => [NAMES[name], canvas, share]);
    byId("lanes").replaceChildren(...parts);
    const emulated = accelerator === "emulated";
    const span = window >= 1000 ? "second" : `${window} ms`;
    byId("lanes-note").textContent = emulated
      ? `Last ${span} of emulated time: there is no such accelerator here.`
      : `Experts alone, last ${span}: the CPU measured per call${
        names.length > 1 ? ", accelerator and link as planned" : ""}.`;
  }

  /** Show a sample; gives each lane's share of the window. */
  take(lanes) {
    byId("lanes-section").hidden = !lanes;
    const shares = {};
    for (const { name, canvas, share } of lanes ? this.strips : []) {
      const heights = bytes(lanes[name]);
      shares[name] = heights.reduce((sum, height) => sum + height, 0) / heights.length / 255;
      share.textContent = `${Math.round(100 * shares[name])} %`;
      draw(canvas, heights, themed(COLOURS[name]));
    }
    return shares;
  }
}

function draw(canvas, heights, colour) {
  const width = Math.round(canvas.clientWidth * devicePixelRatio);
  const height = Math.round(canvas.clientHeight * devicePixelRatio);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const pen = canvas.getContext("2d");
  pen.clearRect(0, 0, width, height);
  pen.fillStyle = colour;
  heights.forEach((value, at) => {
    const left = Math.round((at * width) / heights.length);
    const right = Math.round(((at + 1) * width) / heights.length);
    const tall = Math.round((value / 255) * height);
    pen.fillRect(left, height - tall, right - left, tall);
  });
}
