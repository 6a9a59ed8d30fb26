// The conversation: asking, stopping, asking again.

import { byId, element } from "../dom.js";
import { answer, modelName } from "../net/api.js";
import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { Answer, question } from "./message.js";
import { Scroll } from "./scroll.js";

const SUGGESTIONS = [
  "What is the capital of France?",
  "What is a mixture-of-experts model?",
  "Write a short poem about memory.",
];

/** The left part of the page. */
export class Chat {
  constructor(settings) {
    this.settings = settings;
    this.model = ""; // until the server has said
    this.running = null; // AbortController of the answer that is being written
    this.conversation = new Conversation();
    this.composer = new Composer((text) => this.ask(text), () => this.stop());
    this.scroll = new Scroll();
    this.list = byId("messages");
    byId("new").addEventListener("click", () => this.restart());
    byId("suggestions").append(...SUGGESTIONS.map((text) => this.suggestion(text)));
    this.draw();
  }

  /** The server's name for the model. */
  set name(name) {
    this.model = name;
    byId("greeting").textContent = `Ask ${name}`;
  }

  ask(text) {
    this.conversation.add({ role: "user", content: text });
    this.answer();
  }

  /** Answer the last question; what an earlier answer to it said is gone. */
  async answer() {
    this.stop();
    const { conversation, settings } = this;
    while (conversation.turns.at(-1)?.role === "assistant") {
      conversation.cutFrom(conversation.turns.length - 1);
    }
    const messages = conversation.messages(settings.values.system);
    const turn = conversation.add({ role: "assistant", content: "" });
    const running = new AbortController();
    this.running = running;
    const shown = this.draw();
    shown.busy = this.composer.busy = true;
    this.scroll.toEnd();
    this.say("Answering.");
    await this.write(turn, shown, { messages, ...settings.sampling() }, running);
    shown.busy = false;
    conversation.save();
    if (this.running !== running) return; // another one has begun
    this.running = null;
    this.composer.busy = false;
    this.scroll.grown();
    this.say(turn.problem ? "" : (turn.note ?? "The answer is complete."));
  }

  async write(turn, shown, body, running) {
    const asked = performance.now();
    let first = 0;
    const heard = ({ text, thinking }) => {
      first ||= performance.now();
      turn.content += text;
      if (thinking) turn.thinking = (turn.thinking ?? "") + thinking;
      shown.grow(() => this.scroll.grown());
    };
    try {
      body.model = this.model || await modelName();
      const { finish, usage } = await answer(body, running.signal, heard);
      if (finish === "length") turn.note = "cut off: the limit of tokens is reached";
      turn.facts = facts(usage, asked, first);
    } catch (error) {
      if (running.signal.aborted) turn.note = "stopped";
      else turn.problem = this.explained(error);
    }
  }

  explained(error) {
    if (error.status === 401) this.settings.open("The server asks for its API key.");
    if (error instanceof TypeError) return "The server cannot be reached.";
    return error.message;
  }

  /** End the answer that is being written; what there is of it stays. */
  stop() {
    this.running?.abort();
  }

  restart() {
    this.stop();
    this.conversation.cutFrom(0);
    this.draw();
    this.say("A new conversation.");
    this.composer.focus();
  }

  /** Show all turns; gives the last answer. */
  draw() {
    const { turns } = this.conversation;
    byId("empty").hidden = turns.length > 0;
    let last = null;
    this.list.replaceChildren(...turns.map((turn, at) => {
      if (turn.role === "user") return question(turn, (text) => this.editAt(at, text));
      last = new Answer(turn, () => this.regenerate());
      last.last = at === turns.length - 1;
      return last.item;
    }));
    this.scroll.grown();
    return last;
  }

  regenerate() {
    this.answer();
    this.composer.focus(); // the button is gone
  }

  editAt(index, text) {
    this.conversation.cutFrom(index);
    this.ask(text);
    this.composer.focus();
  }

  suggestion(text) {
    const send = () => {
      this.ask(text);
      this.composer.focus();
    };
    return element("button", { type: "button", onclick: send }, text);
  }

  /** Tell screen readers. */
  say(text) {
    byId("status").textContent = text;
  }
}

/** A line on tokens and time; empty where the server tells nothing. */
function facts(usage, asked, first) {
  if (!usage || !first) return "";
  const tokens = usage.completion_tokens;
  const spent = (performance.now() - first) / 1000;
  const parts = [`${tokens} token${tokens === 1 ? "" : "s"}`];
  if (tokens > 1 && spent > 0.05) parts.push(`${((tokens - 1) / spent).toFixed(1)} tokens/s`);
  parts.push(`first after ${((first - asked) / 1000).toFixed(1)} s`);
  const reused = usage.prompt_tokens_details?.cached_tokens;
  if (reused) parts.push(`${reused} of ${usage.prompt_tokens} prompt tokens reused`);
  return parts.join(" · ");
}
