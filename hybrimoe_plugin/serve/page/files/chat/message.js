// One turn on the page.

import { copyButton, element } from "../dom.js";
import { Rendered } from "../text/render.js";
import { safeText } from "../text/safe.js";

/** The list item of a user's turn. `edited(text)` is called when it is sent again. */
export function question(turn, edited) {
  const body = element("div", { class: "body", dir: "auto" }, ...safeText(turn.content));
  const edit = element("button", { type: "button", class: "quiet" }, "Edit");
  const foot = element("div", { class: "foot" }, edit, copyButton(() => turn.content));
  const item = element("li", { class: "message user" }, who("You"), body, foot);
  edit.addEventListener("click", () => {
    const form = editor(turn.content, edited, () => {
      form.replaceWith(body);
      foot.hidden = false;
      edit.focus();
    });
    body.replaceWith(form);
    foot.hidden = true;
    form.querySelector("textarea").focus();
  });
  return item;
}

function editor(text, edited, left) {
  const box = element("textarea", { "aria-label": "Edit the message", dir: "auto", rows: "3" });
  box.value = text;
  const send = element("button", { type: "submit", class: "main" }, "Send");
  const cancel = element("button", { type: "button", onclick: left }, "Cancel");
  const form = element("form", { class: "edit" }, box, element("div", {}, send, cancel));
  const submit = (event) => {
    event.preventDefault();
    if (box.value.trim()) edited(box.value.trim());
  };
  form.addEventListener("submit", submit);
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      left();
    }
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
  });
  return form;
}

/** The assistant's turn, which grows. */
export class Answer {
  constructor(turn, regenerate) {
    this.turn = turn;
    this.body = element("div", { class: "body", dir: "auto" });
    this.rendered = new Rendered(this.body);
    this.thought = element("div", { dir: "auto" });
    this.thinking = element("details", { class: "thinking", hidden: "" });
    this.thinking.append(element("summary", {}, "Thinking"), this.thought);
    this.facts = element("span", { class: "facts" });
    this.again = element("button", { type: "button", class: "quiet", onclick: regenerate });
    this.again.append("Regenerate");
    this.foot = element("div", { class: "foot" }, this.facts, this.again);
    this.foot.append(copyButton(() => turn.content));
    this.problem = element("p", { class: "problem", role: "alert", hidden: "" });
    this.item = element("li", { class: "message assistant" }, who("Model"));
    this.item.append(this.thinking, this.body, this.problem, this.foot);
    this.timer = null;
    this.cost = 0;
    this.show();
  }

  /** Show what the turn holds soon: the longer that takes, the less often. */
  grow(shown) {
    if (this.timer !== null) return;
    const pause = Math.max(50, 4 * this.cost);
    this.timer = setTimeout(() => {
      this.timer = null;
      this.show();
      shown();
    }, pause);
  }

  /** Show what the turn holds now. */
  show() {
    const began = performance.now();
    const { turn } = this;
    this.rendered.show(turn.content);
    this.thinking.hidden = !turn.thinking;
    if (turn.thinking) this.thought.replaceChildren(...safeText(turn.thinking));
    this.facts.textContent = [turn.facts, turn.note].filter(Boolean).join(" · ");
    this.problem.hidden = !turn.problem;
    this.problem.textContent = turn.problem ?? "";
    this.cost = performance.now() - began;
  }

  /** Whether it is being written. Screen readers are told of it when it is done. */
  set busy(busy) {
    this.item.setAttribute("aria-busy", String(busy));
    this.body.classList.toggle("waiting", busy);
    this.foot.hidden = busy;
    if (busy) return;
    clearTimeout(this.timer);
    this.timer = null;
    this.show();
  }

  /** Only the last answer can be made again. */
  set last(last) {
    this.again.hidden = !last;
  }
}

function who(name) {
  return element("p", { class: "who" }, name);
}
