// The box to write in, and the keys.

import { byId } from "../dom.js";

/** Calls `send(text)` and `stop()`. */
export class Composer {
  constructor(send, stop) {
    this.box = byId("question");
    this.sendButton = byId("send");
    this.stopButton = byId("stop");
    this.answering = false;
    this.send = send;
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    this.box.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.submit();
    });
    this.box.addEventListener("input", () => this.fit());
    this.stopButton.addEventListener("click", () => stop());
    document.addEventListener("keydown", (event) => {
      const free = !document.querySelector("dialog[open]");
      if (event.key === "Escape" && this.answering && free) stop();
    });
  }

  submit() {
    const text = this.box.value.trim();
    if (!text || this.answering) return;
    this.box.value = "";
    this.fit();
    this.send(text);
  }

  /** Stop stands where Send was, and keeps its focus. */
  set busy(busy) {
    const buttons = [this.sendButton, this.stopButton];
    const focused = buttons.includes(document.activeElement);
    this.answering = busy;
    this.sendButton.hidden = busy;
    this.stopButton.hidden = !busy;
    if (focused) (busy ? this.stopButton : this.box).focus();
  }

  focus() {
    this.box.focus();
  }

  fit() {
    this.box.style.height = "auto";
    this.box.style.height = `${this.box.scrollHeight + 2}px`;
  }
}
