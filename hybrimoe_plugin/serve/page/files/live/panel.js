// The engine beside the chat.

import { byId, element } from "../dom.js";
import { unpacked } from "./bits.js";
import { Feed } from "./feed.js";
import { Figures } from "./figures.js";
import { Lanes } from "./lanes.js";
import { ExpertMap } from "./map.js";
import { NAMES } from "./palette.js";

/** The right part of the page; `named(model)` is called with the model's name. */
export class Panel {
  constructor(named) {
    this.named = named;
    this.map = new ExpertMap();
    this.lanes = new Lanes();
    this.figures = new Figures();
    this.paused = false;
    this.feed = new Feed((event, body) => this.heard(event, body), (text) => work(text));
    this.narrow = matchMedia("(max-width: 860px)");
    this.narrow.addEventListener("change", () => this.look());
    document.addEventListener("visibilitychange", () => this.look());
    byId("show-chat").addEventListener("click", () => this.show("chat"));
    byId("show-engine").addEventListener("click", () => this.show("engine"));
    byId("pause").addEventListener("click", () => this.pause());
    this.look();
  }

  /** Connect while the panel is in sight. Before the first event nobody knows if there is one. */
  look() {
    const behind = this.narrow.matches && this.model && document.body.dataset.view !== "engine";
    this.feed.want(!document.hidden && !this.paused && !behind);
  }

  show(view) {
    document.body.dataset.view = view;
    for (const name of ["chat", "engine"]) {
      byId(`show-${name}`).setAttribute("aria-pressed", String(name === view));
    }
    this.look();
  }

  pause() {
    this.paused = !this.paused;
    const button = byId("pause");
    button.setAttribute("aria-pressed", String(this.paused));
    button.textContent = this.paused ? "Resume" : "Pause";
    work(this.paused ? "paused" : "");
    this.look();
  }

  heard(event, body) {
    if (event === "model") this.begin(body);
    else if (event === "sample") this.take(body);
  }

  begin(model) {
    this.named(model.model);
    const nothing = model.layers.length === 0;
    byId("engine").hidden = byId("tabs").hidden = nothing;
    this.feed.finished = nothing;
    if (nothing) return;
    this.model = model;
    const { layers, experts, accelerator } = model;
    const [across, down] = experts >= layers.length ? ["experts", "layers"] : ["layers", "experts"];
    const size = `${layers.length} layers of ${experts} experts`;
    byId("map-note").textContent = `${size}: ${across} across, ${down} down.`;
    this.legend(model);
    this.map.begin(model);
    this.lanes.begin(model);
    this.figures.begin(model);
    byId("engine").dataset.accelerator = accelerator;
    this.look();
  }

  legend({ accelerator, flash }) {
    const slots = accelerator === "none" ? ["cpu"] : ["accelerator", "in_flight", "cpu"];
    const names = flash ? ["cpu", "flash"] : slots;
    this.counts = Object.fromEntries(names.map((name) => [name, element("span")]));
    const item = (name) => element("li", {}, swatch(name), NAMES[name], this.counts[name]);
    const items = names.map(item);
    items.push(element("li", { class: "note" }, "The stronger shade: just used."));
    byId("legend").replaceChildren(...items);
  }

  take(sample) {
    const count = this.model.layers.length * this.model.experts;
    const places = unpacked(sample.places, 2, count);
    this.map.take(places, unpacked(sample.used, 1, count), sample.counts);
    for (const [name, place] of Object.entries(this.counts)) {
      place.textContent = String(sample.counts[name]);
    }
    const shares = this.lanes.take(sample.lanes);
    // Emulated time stands still without calls, and so do its lanes.
    const rests = this.model.accelerator === "emulated" && !sample.tokens_s && !sample.prompt_s;
    this.figures.take({ ...sample, ...(rests ? {} : shares) });
    work(load(sample));
  }
}

function load({ running, waiting }) {
  if (!running && !waiting) return "idle";
  return `${running} answering${waiting ? `, ${waiting} waiting` : ""}`;
}

function work(text) {
  const place = byId("work");
  if (place.textContent !== text) place.textContent = text;
}

function swatch(name) {
  return element("span", { class: `swatch ${name}`, "aria-hidden": "true" });
}
