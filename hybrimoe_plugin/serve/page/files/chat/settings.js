// The dialog: system prompt, sampling, API key.

import { byId, element } from "../dom.js";
import { keep, kept } from "../kept.js";
import { apiKey, setApiKey } from "../net/api.js";

const NUMBERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05 },
  { name: "top_p", label: "Top p", min: 0.01, max: 1, step: 0.01 },
  { name: "top_k", label: "Top k", min: 0, max: 1000, step: 1 },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01 },
  { name: "max_tokens", label: "Most tokens", min: 1, max: 1000000, step: 1 },
  { name: "seed", label: "Seed", min: 0, max: 2 ** 31, step: 1 },
];

/** Settings of this tab; `keyChanged` is called with each other API key. */
export class Settings {
  constructor(keyChanged) {
    this.dialog = byId("settings");
    this.system = byId("system");
    this.key = byId("key");
    this.inputs = NUMBERS.map(input);
    this.keyChanged = keyChanged;
    byId("numbers").append(...this.inputs.map(({ parentElement }) => parentElement));
    byId("open-settings").addEventListener("click", () => this.open());
    byId("reset-settings").addEventListener("click", () => this.fill({ system: "", numbers: {} }));
    this.dialog.addEventListener("close", () => this.take());
    // A value out of range keeps the dialog open; Escape and "Done" close it otherwise.
    this.dialog.addEventListener("cancel", (event) => {
      if (!this.dialog.querySelector("form").reportValidity()) event.preventDefault();
    });
    this.values = kept("settings", { system: "", numbers: {} });
  }

  /** Show the dialog; with a reason, at the API key. */
  open(reason = "") {
    this.fill(this.values);
    this.key.value = apiKey();
    const usual = "Needed if the server was started with one; kept in this tab.";
    byId("key-note").textContent = reason || usual;
    if (!this.dialog.open) this.dialog.showModal();
    (reason ? this.key : this.system).focus();
  }

  /** The fields of a request. */
  sampling() {
    return { ...this.values.numbers };
  }

  fill({ system, numbers }) {
    this.system.value = system;
    for (const box of this.inputs) box.value = numbers[box.name] ?? "";
  }

  take() {
    const numbers = {};
    for (const box of this.inputs) {
      if (box.value !== "" && box.validity.valid) numbers[box.name] = box.valueAsNumber;
    }
    this.values = { system: this.system.value.trim(), numbers };
    keep("settings", this.values);
    if (this.key.value === apiKey()) return;
    setApiKey(this.key.value);
    this.keyChanged();
  }
}

function input({ name, label, min, max, step }) {
  const id = `setting-${name}`;
  const box = element("input", { id, name, type: "number", min, max, step });
  box.placeholder = "default";
  element("div", {}, element("label", { for: id }, label), box);
  return box;
}
