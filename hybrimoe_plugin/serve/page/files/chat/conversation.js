// The turns of a conversation, kept in this tab.

import { keep, kept } from "../kept.js";

/**
 * A turn is {role, content} of a user, or of the assistant with more of these:
 * thinking, facts (a line on tokens and time), note (why it ended early), problem (an error).
 */
export class Conversation {
  constructor() {
    this.turns = kept("turns", []);
  }

  /** Add a turn, and give it. */
  add(turn) {
    this.turns.push(turn);
    this.save();
    return turn;
  }

  /** Leave out this turn and all behind it. */
  cutFrom(index) {
    this.turns.splice(index);
    this.save();
  }

  save() {
    keep("turns", this.turns);
  }

  /** What the server is sent: without answers that hold nothing. */
  messages(system) {
    const turns = this.turns.filter(({ role, content }) => role === "user" || content);
    const said = turns.map(({ role, content }) => ({ role, content }));
    return system ? [{ role: "system", content: system }, ...said] : said;
  }
}
