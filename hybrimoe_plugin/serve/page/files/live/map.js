// Layers and experts as a grid. The longer side lies across; only cells that changed are drawn.

import { byId } from "../dom.js";
import { HEATS, NAMES, PLACES, palette } from "./palette.js";

const LARGEST = 16; // a cell's height in CSS pixels
const SMALLEST = 4;
const TALL = 1.3; // of its width, between these
const COOLING = 0.62; // from sample to sample
const CALM = 0.2; // how far a cell moves towards its use where less motion is wished for

/** The map on the page. */
export class ExpertMap {
  constructor() {
    this.canvas = byId("map");
    this.line = byId("map-cell");
    this.pen = this.canvas.getContext("2d");
    this.calm = matchMedia("(prefers-reduced-motion: reduce)");
    this.layers = [];
    this.cursor = null; // {column, row} that somebody points at
    new ResizeObserver(() => this.resize()).observe(this.canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.recolour());
    this.canvas.addEventListener("pointermove", (event) => this.pointed(event));
    this.canvas.addEventListener("pointerleave", () => this.moveTo(null));
    this.canvas.addEventListener("blur", () => this.moveTo(null));
    this.canvas.addEventListener("keydown", (event) => this.pressed(event));
  }

  /** Begin with a model. */
  begin({ layers, experts }) {
    this.layers = layers;
    this.experts = experts;
    const count = layers.length * experts;
    this.places = new Uint8Array(count);
    this.heat = new Float32Array(count);
    this.across = experts >= layers.length; // experts are columns
    this.columns = this.across ? experts : layers.length;
    this.rows = this.across ? layers.length : experts;
    this.recolour();
    this.resize();
  }

  /** Show a sample. */
  take(places, used, counts) {
    this.places = places;
    for (let at = 0; at < used.length; at += 1) {
      if (this.calm.matches) this.heat[at] += CALM * (used[at] - this.heat[at]);
      else this.heat[at] = used[at] ? 1 : this.heat[at] * COOLING;
    }
    this.draw();
    this.describe();
    const there = PLACES.filter((name) => counts[name]);
    const said = there.map((name) => `${counts[name]} ${NAMES[name]}`);
    this.canvas.setAttribute("aria-label", `Map of ${this.layers.length} layers by ${this.experts} `
      + `experts: ${said.join(", ")}. Arrow keys name single experts.`);
  }

  resize() {
    if (!this.columns) return;
    const width = this.canvas.clientWidth;
    if (!width) return; // behind a tab
    const scale = devicePixelRatio;
    const cell = Math.min(LARGEST, Math.max(SMALLEST, (TALL * width) / this.columns));
    const height = Math.round(cell * this.rows);
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    this.drawn = null;
    this.draw();
  }

  recolour() {
    this.colours = palette();
    this.drawn = null;
    this.draw();
  }

  draw() {
    if (!this.columns || !this.canvas.width) return;
    this.drawn ??= new Int16Array(this.places.length).fill(-1);
    for (let at = 0; at < this.places.length; at += 1) {
      const colour = this.places[at] * HEATS + Math.round(this.heat[at] * (HEATS - 1));
      if (colour === this.drawn[at]) continue;
      this.drawn[at] = colour;
      this.fill(at, this.colours[colour]);
    }
  }

  fill(at, colour) {
    const { column, row } = this.cellOf(at);
    const { width, height } = this.canvas;
    const left = Math.round((column * width) / this.columns);
    const right = Math.round(((column + 1) * width) / this.columns);
    const top = Math.round((row * height) / this.rows);
    const bottom = Math.round(((row + 1) * height) / this.rows);
    this.pen.fillStyle = colour;
    const across = right - left;
    const down = bottom - top;
    this.pen.fillRect(left, top, across - gap(across), down - gap(down));
  }

  cellOf(at) {
    const layer = Math.floor(at / this.experts);
    const expert = at % this.experts;
    return this.across ? { column: expert, row: layer } : { column: layer, row: expert };
  }

  pointed(event) {
    if (!this.columns) return;
    const column = Math.floor((event.offsetX / this.canvas.clientWidth) * this.columns);
    const row = Math.floor((event.offsetY / this.canvas.clientHeight) * this.rows);
    this.moveTo({ column, row });
  }

  pressed(event) {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const step = by[event.key];
    if (!step || !this.columns) return;
    event.preventDefault();
    const { column, row } = this.cursor ?? { column: -step[0], row: -step[1] };
    this.moveTo({ column: column + step[0], row: row + step[1] });
  }

  moveTo(cell) {
    this.cursor = cell && {
      column: Math.min(Math.max(cell.column, 0), this.columns - 1),
      row: Math.min(Math.max(cell.row, 0), this.rows - 1),
    };
    this.describe();
  }

  /** Name the cell that somebody points at. */
  describe() {
    let text = "";
    if (this.cursor) {
      const { column, row } = this.cursor;
      const [layer, expert] = this.across ? [row, column] : [column, row];
      const place = PLACES[this.places[layer * this.experts + expert]];
      text = `Layer ${this.layers[layer]}, expert ${expert}: ${NAMES[place]}`;
    }
    if (this.line.textContent !== text) this.line.textContent = text;
  }
}

/** Pixels between cells of a size; small cells touch. */
function gap(size) {
  return size >= 5 * devicePixelRatio ? Math.max(1, Math.round(devicePixelRatio)) : 0;
}
